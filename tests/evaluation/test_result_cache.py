"""Results on disk: what was put in comes out, what is damaged counts as missing."""

from __future__ import annotations

import errno
import json
import math
import warnings
from pathlib import Path

import pytest
import torch

from luve_lightning.evaluation.result_cache import ResultCache, Score, result_key
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
    assert not cache.has_features(KEY)
    assert cache.features(KEY) is None
    cache.put_features(KEY, features)
    assert cache.has_features(KEY)
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
            path.write_bytes(
                content[: int(share * len(content)) - 2 if share > 0.9 else int(share * len(content))]
            )
    assert cache.score(KEY) is None
    assert not cache.has_features(KEY)
    assert cache.features(KEY) is None
    cache.put_score(KEY, score, {})
    assert cache.score(KEY) == score


def test_every_part_of_a_key_counts() -> None:
    keys = {
        result_key(*parts)
        for parts in [
            ("a", "b"),
            ("b", "a"),
            ("ab", ""),
            ("a", "b", "c"),
            ("a", "b", None, "c"),
            ("a", "b", "c", "c"),
        ]
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
    assert cache.has_features(other)
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
    assert not cache.has_features(KEY)
    assert cache.features(KEY) is None


def test_scores_of_before_the_digest_are_found(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path)
    cache.put_score(KEY, Score(0.731, 2.0, {"torch": "2"}), {})
    (path,) = tmp_path.glob("*/*.json")
    record = json.loads(path.read_text())
    del record["sha256"]
    path.write_text(json.dumps(record))
    assert cache.score(KEY) == Score(0.731, 2.0, {"torch": "2"})
