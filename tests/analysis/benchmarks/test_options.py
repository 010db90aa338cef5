"""`luve bench --subject options` on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luve_lightning.analysis.benchmarks.options import VARIANTS
from luve_lightning.cli.costs import bench


def rows_of(printed: str) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in printed.splitlines()]
    assert all(row["seconds"] > 0 and row["peak_mib"] >= 0 for row in rows)
    return {row["option"]: row for row in rows}


@pytest.mark.slow
def test_every_option_that_a_cpu_has_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    bench("options", device="cpu", video=(5, 32, 32))
    rows = rows_of(capsys.readouterr().out)
    assert {row["repeats"] for row in rows.values()} == {1}  # a run takes minutes on a GPU, 20 of them would take hours
    assert list(rows) == [variant.name for variant in VARIANTS if not variant.needs_gpu]
    assert rows["none"]["ratio"] == 1
    assert rows["none"]["difference"] == 0
    assert 0 < rows["guidance batched"]["difference"] < 1e-4  # rounding
    for name in ("guidance for sigma in [0.5, 0.95]", "cache taylorseer, interval 3"):
        assert rows[name]["difference"] > 1e-3


@pytest.mark.slow
def test_with_weights(tiny_cascade: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone, refiner = str(tiny_cascade / "wan"), str(tiny_cascade / "refiner")
    bench("options", "cpu", 1, backbone=backbone, refiner=refiner, video=(5, 32, 32), prompt="a red boat")
    rows = rows_of(capsys.readouterr().out)
    assert {row["weights"] for row in rows.values()} == {backbone}
    assert all(row["latents"] == [2, 4, 4] for row in rows.values())


def test_impossible_sizes() -> None:
    with pytest.raises(ValueError, match=r"6 frames: expected 4k \+ 1, nearest are 5 and 9"):
        bench("options", device="cpu", repeats=1, video=(6, 32, 32))
