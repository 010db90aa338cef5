"""`luve bench --subject evaluate` with few small videos."""

from __future__ import annotations

import json

import pytest
import torch

from luve_lightning.analysis.benchmarks import evaluate as benchmark
from luve_lightning.analysis.benchmarks.evaluate import FAULTS
from luve_lightning.cli.costs import bench
from luve_lightning.metrics import FrechetClipDistance
from tests.metrics.test_frechet_patch_clips import Means


@pytest.mark.slow
def test_compares_evaluation_with_decoding(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HEIGHT": 256, "WIDTH": 320, "FRAMES": 5}.items():
        monkeypatch.setattr(benchmark, name, value)
    bench("evaluate", device="cpu", repeats=2, videos=6)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["what"] for row in rows] == ["decode", "evaluate"]
    assert [row["size"] for row in rows] == [[5, 256, 320]] * 2
    assert rows[0]["of_decode_speed"] == 1
    decode, evaluate = (row["videos_per_second"] for row in rows)
    assert rows[1]["of_decode_speed"] == pytest.approx(evaluate / decode, rel=0.01, abs=1e-3)
    with pytest.raises(ValueError, match="videos: expected at least 1, got 0"):
        bench("evaluate", device="cpu", videos=0)


@pytest.mark.slow
def test_mean_colours_rank_other_photographs_but_no_blur(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SIDE", 32)
    # What each of the others does to a clip is tested in test_evaluate_faults.py.
    monkeypatch.setattr(benchmark, "FAULTS", {fault: FAULTS[fault] for fault in ("blur", "photograph")})
    found = list(benchmark.rank_faults([FrechetClipDistance(Means())], torch.device("cpu"), 1, 12, 24))
    assert [row["fault"] for row in found] == ["blur", "photograph"]
    assert all(row["metric"] == "fd_means" for row in found)
    ranks = {row["fault"]: row["ranked"] for row in found}
    assert ranks["photograph"]
    assert not ranks["blur"]


def test_a_rank_is_right_where_distances_rise_from_both_sets_without_the_fault() -> None:
    assert benchmark.ranked([1, 2, 3, 4, 5])
    assert not benchmark.ranked([1, 3, 2, 4, 5])  # a mild fault is nearer than other clips without any
    assert not benchmark.ranked([3, 1, 2, 4, 5])
    assert not benchmark.ranked([1, 2, 3, 5, 4])
