"""Results on disk: what was put in comes out, what is damaged counts as missing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from luve_lightning.evaluation.result_cache import ResultCache, Score, result_key

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
