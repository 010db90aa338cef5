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
