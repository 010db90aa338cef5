"""`luve bench --subject generate` on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from luve_lightning.analysis.benchmarks import generate
from luve_lightning.analysis.benchmarks.generate import _Bench, mini
from luve_lightning.cli.costs import bench
from luve_lightning.models.attention.windows import Windows


@pytest.mark.slow
def test_measures_each_stage_beside_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench("generate", device="cpu", repeats=1, sizes="720p,2k", output=tmp_path / "rows.jsonl")
    printed = capsys.readouterr().out
    assert (tmp_path / "rows.jsonl").read_text() == printed
    rows = [json.loads(line) for line in printed.splitlines()]
    assert [(row["size"], row["stage"]) for row in rows] == [
        ("720p", "text"), ("720p", "motion"), ("720p", "decode"), ("720p", "decode"),
        ("2k", "upsample"), ("2k", "refine"), ("2k", "refine"), ("2k", "decode"), ("2k", "decode"),
    ]  # fmt: skip
    assert [row["expert"] for row in rows if "expert" in row] == ["lfe", "hfe"]
    assert [row["tile"] for row in rows if "tile" in row] == [[6, 6], None] * 2
    for row in rows:
        assert row["seconds"] > 0
        assert row["peak_mib"] > 0
        assert row["plan_peak_mib"] > 0
        expected = row["plan_peak_mib"] / row["peak_mib"] - 1
        assert row["peak_error"] == pytest.approx(expected, abs=0.2)  # both are rounded to 0.1 MiB
        assert row["plan_seconds"] is None  # no speed is known of a CPU


@pytest.mark.slow
def test_a_replaced_attention_is_measured_in_the_third_stage_alone() -> None:
    sparse = Windows(cuts=((1, 2, 2),), dense_above=0.9)
    rows = list(generate.measure(torch.device("cpu"), 0, "720p,2k", attention=json.dumps(sparse.record())))
    refine = [row for row in rows if row["stage"] == "refine"]
    assert [row["attention"] for row in refine] == [str(sparse)] * 2
    plain = [row for row in generate.measure(torch.device("cpu"), 0, "2k") if row["stage"] == "refine"]
    # The low-frequency expert's step is dense, the high-frequency one's is not.
    assert refine[0]["tflop"] == plain[0]["tflop"]
    assert refine[1]["tflop"] < plain[1]["tflop"]
    (motion,) = (row for row in rows if row["stage"] == "motion")
    assert "attention" not in motion


@pytest.mark.slow
def test_a_stage_is_measured_with_its_own_model_alone() -> None:
    """The VLUer's peak once held the VAE's weights, which had been asked for their channels."""
    bench = _Bench(mini(), torch.device("cpu"), 1, torch.float32)
    stages = bench.later_stages("2k")
    for stage, own in (("upsample", "vluer"), ("refine", "transformer")):
        assert next(stages)["stage"] == stage
        assert set(bench.parts._made) == {own}


def test_unknown_sizes() -> None:
    with pytest.raises(ValueError, match="sizes: expected some of 720p, 2k, 4k, got 8k"):
        bench("generate", device="cpu", sizes="720p,8k")
