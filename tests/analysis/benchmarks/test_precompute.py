"""`luve bench --subject precompute` on a CPU."""

from __future__ import annotations

import json

import pytest

from luve_lightning.cli.costs import bench


@pytest.mark.slow
def test_measures_each_size_a_clip_and_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    bench("precompute", device="cpu", repeats=1, clips=2)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["what"], row["size"]) for row in rows[:6]] == [
        ("encode", [5, 48, 96]),
        ("encode", [5, 32, 64]),
        ("encode", [5, 24, 48]),
        ("encode", [5, 16, 32]),
        ("encode, diffusers", [5, 24, 48]),
        ("clip at all sizes", [5, 48, 96]),
    ]
    assert rows[5]["sizes"] == [row["size"][1:] for row in rows[:4]]
    assert rows[5]["tflop"] == pytest.approx(sum(row["tflop"] for row in rows[:4]), abs=2e-4)
    assert [row["what"] for row in rows[6:9]] == ["decode"] * 3
    assert all(row["seconds"] > 0 and row["peak_gib"] is None for row in rows[:9])
    assert [(row["what"], row["form"]) for row in rows[9:]] == [
        ("error of bfloat16, encode", "here"),
        ("error of bfloat16, encode", "diffusers"),
        ("error of bfloat16, decode", "here"),
        ("error of bfloat16, decode", "diffusers"),
    ]
    assert all(1e-4 < row["error"] < 0.1 for row in rows[9:])


def test_a_clip_at_least() -> None:
    with pytest.raises(ValueError, match="clips: expected at least 1, got 0"):
        bench("precompute", device="cpu", clips=0)
