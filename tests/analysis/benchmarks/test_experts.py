"""`luve bench --subject experts` on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luve_lightning.cli.costs import bench


def test_compares_each_expert_with_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench("experts", device="cpu", repeats=2, output=tmp_path / "rows.jsonl")
    printed = capsys.readouterr().out
    assert (tmp_path / "rows.jsonl").read_text() == printed
    rows = {row["expert"]: row for row in map(json.loads, printed.splitlines())}
    assert list(rows) == ["base", "lfe", "hfe"]
    assert rows["base"]["ratio"] == 1
    for row in rows.values():
        assert row["model"] == "mini"
        assert row["ms_min"] <= row["ms"] <= row["ms_max"]


def test_another_attention_its_share_and_the_kernels_of_a_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "tables" / "kernels.txt"
    bench("experts", device="cpu", repeats=1, size="4k", attention="windows", profile=table)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(row["size"], tuple(row["latents"])) for row in rows} == {("4k", (5, 34, 36))}
    for row in rows:
        assert row["attention"].startswith("Windows(cuts=((13, 1, 1), (1, 8, 12)")
        assert 0 < row["attention_share"] < 1
    total, _, *lines = table.read_text().splitlines()
    assert total.endswith(" ms in all")
    assert len(lines) == 25
    assert any("scaled_dot_product" in line for line in lines)
    with pytest.raises(
        ValueError, match="attention 'window pane': expected own, a record, or the beginning of dense; "
    ):
        bench("experts", device="cpu", repeats=1, attention="window pane")
