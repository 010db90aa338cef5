"""`luve bench --subject evaluate` with few small videos."""

from __future__ import annotations

import json

import pytest

from luve_lightning.analysis.benchmarks import evaluate as benchmark
from luve_lightning.cli.costs import bench


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
