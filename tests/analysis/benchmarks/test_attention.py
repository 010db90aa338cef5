"""`luve bench --subject attention` on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from luve_lightning.analysis.benchmarks.attention import CUTS, kinds
from luve_lightning.cli.costs import bench
from luve_lightning.models.attention.windows import Windows


@pytest.mark.slow
def test_every_kind_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    bench("attention", device="cpu", repeats=1)
    rows = {row["attention"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(rows) == list(kinds("small"))
    assert all(row["forward_ms"] > 0 and row["forward_and_backward_ms"] > 0 for row in rows.values())
    assert rows["dense"]["pairs_percent"] == 100
    assert rows["windows, alternate"]["pairs_percent"] < rows["windows"]["pairs_percent"]
    assert len(rows["windows"]["forward_ms_by_layer"]) == 5
    assert len(rows["windows, alternate"]["forward_and_backward_ms_by_layer"]) == 10


def test_the_cuts_are_those_that_are_trained() -> None:
    for size in ("2k", "4k"):
        file = Path("experiments/experts", f"adaptation-{size}-windows.yaml")
        attention = yaml.safe_load(file.read_text())["model"]["init_args"]["attention"]["init_args"]
        assert Windows(**attention) == kinds(size)["windows"]
    attention = yaml.safe_load(Path("experiments/generate/t3.yaml").read_text())["attention"]["init_args"]
    assert Windows(**attention) == Windows(CUTS["t3"])


def test_some_kinds_and_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    bench("attention", device="cpu", repeats=1, size="small", only="tiles 4x8x8, nearest 4x5x5", backward=False)
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["attention"] == "tiles 4x8x8, nearest 4x5x5"
    assert "forward_and_backward_ms" not in row
    with pytest.raises(ValueError, match="size 2k: expected one of small"):
        bench("attention", device="cpu", size="2k")
