"""Results on disk: what was put in comes out, what is damaged counts as missing."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from luve_lightning.data.hashes import FileHashes
from luve_lightning.evaluation.prepared_metrics import prepare_metrics
from luve_lightning.evaluation.result_cache import (
    ResultCache,
    Score,
    code_digest,
    describe_metric,
    digest_of,
    result_key,
)
from luve_lightning.functional.patches import PatchPlan
from luve_lightning.metrics import FrechetPatchDistance, SpectralDistance, VideoMetric
from tests.helpers.evaluation_metrics import Means, Redness
from tests.helpers.unwritable import forbid_writing

KEY = result_key("metric", "video")


@pytest.mark.parametrize("value", [0.1 + 0.2, -1e-30, math.inf, 3.0])
def test_scores_come_back_to_the_bit(tmp_path: Path, value: float) -> None:
    score = Score(value, 48.0, {"torch": "2.12.1"})
    assert ResultCache(tmp_path).score(KEY) is None
    ResultCache(tmp_path).put_score(KEY, score, {"video": "a.mp4"})
    assert ResultCache(tmp_path).score(KEY) == score


def test_features_come_back_to_the_bit(tmp_path: Path) -> None:
    cache, features = ResultCache(tmp_path), torch.randn(7, 3)
    assert cache.features(KEY) is None
    assert cache.features(KEY) is None
    cache.put_features(KEY, features)
    assert cache.features(KEY) is not None
    found = cache.features(KEY)
    assert found is not None
    assert torch.equal(found, features)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_damaged_files_count_as_missing_and_are_replaced(tmp_path: Path, share: float) -> None:
    cache, score = ResultCache(tmp_path), Score(1.0, 1.0, {})
    cache.put_score(KEY, score, {})
    cache.put_features(KEY, torch.randn(50, 8))
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            path.write_bytes(content[: int(share * len(content)) - 2 if share > 0.9 else int(share * len(content))])
    assert cache.score(KEY) is None
    assert cache.features(KEY) is None
    assert cache.features(KEY) is None
    cache.put_score(KEY, score, {})
    assert cache.score(KEY) == score


def test_every_part_of_a_key_counts() -> None:
    keys = {
        result_key(*parts)
        for parts in [("a", "b"), ("b", "a"), ("ab", ""), ("a", "b", "c"), ("a", "b", None, "c"), ("a", "b", "c", "c")]
    }
    assert len(keys) == 6


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_may_not_be_written_is_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    ResultCache(tmp_path).put_score(KEY, Score(1.0, 2.0, {}), {})
    other = result_key("metric", "another")
    forbid_writing(monkeypatch, tmp_path, number)
    cache, score, features = ResultCache(tmp_path), Score(3.0, 1.0, {"torch": "2"}), torch.randn(7, 3)
    with pytest.warns(UserWarning, match=f"{tmp_path}: cannot be written"):
        cache.put_score(other, score, {})
    with warnings.catch_warnings(action="error"):  # once is enough
        cache.put_features(other, features)
    assert cache.score(other) == score
    assert cache.features(other) is not None
    found = cache.features(other)
    assert found is not None
    assert torch.equal(found, features)
    assert cache.score(KEY) == Score(1.0, 2.0, {})
    assert ResultCache(tmp_path).score(other) is None


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "5", '{"value": [], "weight": 1, "versions": {}}'])
def test_strange_scores_count_as_missing(tmp_path: Path, text: str) -> None:
    cache = ResultCache(tmp_path)
    cache.put_score(KEY, Score(1.0, 2.0, {}), {})
    (path,) = tmp_path.glob("*/*.json")
    path.write_text(text)
    assert cache.score(KEY) is None


def test_flipped_bits_count_as_missing(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path)
    cache.put_score(KEY, Score(0.731, 2.0, {}), {})
    cache.put_features(KEY, torch.randn(7, 3))
    (score,), (features,) = tmp_path.glob("*/*.json"), tmp_path.glob("*/*.safetensors")
    score.write_text(score.read_text().replace("0.731", "0.331"))
    content = features.read_bytes()
    features.write_bytes(bytes([*content[:-1], content[-1] ^ 0x80]))
    assert cache.score(KEY) is None
    assert cache.features(KEY) is None
    assert cache.features(KEY) is None


def test_scores_of_before_the_digest_are_found(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path)
    cache.put_score(KEY, Score(0.731, 2.0, {"torch": "2"}), {})
    (path,) = tmp_path.glob("*/*.json")
    record = json.loads(path.read_text())
    del record["sha256"]
    path.write_text(json.dumps(record))
    assert cache.score(KEY) == Score(0.731, 2.0, {"torch": "2"})


REPOSITORY = Path(__file__).resolve().parents[2]


class WithNetwork(VideoMetric):
    """Loads what it is told to."""

    name = "network"
    resolution = "native"

    def __init__(self, given: nn.Module | None = None) -> None:
        super().__init__()
        self.given = given
        self.network: nn.Module | None = None

    def load(self) -> None:
        self.network = layer(LOADED[0])

    def measure(self, frames: Tensor, reference: Tensor | None) -> float:
        return 0.0


LOADED = {0: 1.0}  # stands for a file in one of the usual places


def layer(value: float) -> nn.Module:
    linear = nn.Linear(2, 2)
    nn.init.constant_(linear.weight, value)
    nn.init.zeros_(linear.bias)
    return linear


def identity(metric: object, folder: Path) -> str:
    [metric], _ = prepare_metrics(
        {"m": metric},  # type: ignore[dict-item]
        torch.device("cpu"),
        True,
        FileHashes(folder),
        folder,
    )
    return metric.identity


def test_another_argument_is_another_metric(tmp_path: Path) -> None:
    same = identity(SpectralDistance(bands=8), tmp_path)
    assert same == identity(SpectralDistance(8), tmp_path)
    assert same != identity(SpectralDistance(bands=9), tmp_path)
    assert identity(Redness(gain=1), tmp_path) != identity(Redness(gain=2), tmp_path)


def test_another_file_at_the_same_path_is_another_metric(tmp_path: Path) -> None:
    class WithFile(Redness):
        def __init__(self, file: Path) -> None:
            super().__init__()
            self.file = file

    (tmp_path / "weights").write_text("one")
    first = identity(WithFile(tmp_path / "weights"), tmp_path)
    (tmp_path / "weights").write_text("other")
    assert identity(WithFile(tmp_path / "weights"), tmp_path) != first


def test_given_and_loaded_networks_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = identity(WithNetwork(layer(1)), tmp_path)
    assert identity(WithNetwork(layer(1)), tmp_path) == first
    assert identity(WithNetwork(layer(2)), tmp_path) != first
    assert identity(WithNetwork(), tmp_path) != first
    monkeypatch.setitem(LOADED, 0, 2.0)
    assert identity(WithNetwork(layer(1)), tmp_path) != first, "loaded weights differ, at the same place"


def test_features_depend_on_patches_and_extractor_and_not_on_the_reference(tmp_path: Path) -> None:
    def distance(**plan: object) -> FrechetPatchDistance:
        return FrechetPatchDistance(extractor=Means(), patches=PatchPlan(**plan))  # type: ignore[arg-type]

    first = identity(distance(size=8), tmp_path)
    assert identity(distance(size=9), tmp_path) != first
    batched = FrechetPatchDistance(extractor=Means(), patches=PatchPlan(size=8), batch_size=3)
    assert identity(batched, tmp_path) == first


@pytest.mark.slow
def test_another_process_finds_the_same(tmp_path: Path) -> None:
    program = (
        "from luve_lightning.data.hashes import FileHashes\n"
        "from luve_lightning.evaluation.result_cache import describe_metric, digest_of\n"
        "from tests.helpers.evaluation_metrics import Redness\n"
        f"print(digest_of(describe_metric(Redness(gain=3), FileHashes({str(tmp_path)!r}))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = describe_metric(Redness(gain=3), FileHashes(tmp_path))
    assert done.stdout.strip() == digest_of(here)
    assert json.loads(json.dumps(here)) == here


def test_code_counts_with_all_that_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of two modules of a package of this name, of which the one imported changes."""
    package = tmp_path / "luve_lightning"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "outer_part.py").write_text("from luve_lightning.inner_part import VALUE\n")
    (package / "inner_part.py").write_text("VALUE = 1\n")
    import luve_lightning

    monkeypatch.setattr(luve_lightning, "__path__", [*luve_lightning.__path__, str(package)])
    code_digest.cache_clear()
    before = code_digest("luve_lightning.outer_part")
    (package / "inner_part.py").write_text("VALUE = 2\n")
    assert code_digest("luve_lightning.outer_part") == before, "read once a process"
    code_digest.cache_clear()
    assert code_digest("luve_lightning.outer_part") != before
