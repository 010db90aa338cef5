"""What tells results of one metric from those of another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from luve_lightning.data.fingerprints import FileHashes
from luve_lightning.evaluation.measures import prepare_measures
from luve_lightning.evaluation.result_cache import code_digest, describe_metric, digest_of
from luve_lightning.functional.patches import PatchPlan
from luve_lightning.metrics import FrechetPatchDistance, SpectralDistance, VideoMetric
from tests.helpers.evaluation_metrics import Means, Redness

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
    [measure], _ = prepare_measures(
        {"m": metric},  # type: ignore[dict-item]
        torch.device("cpu"),
        True,
        FileHashes(folder),
        folder,
    )
    return measure.identity


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
        "from luve_lightning.data.fingerprints import FileHashes\n"
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
