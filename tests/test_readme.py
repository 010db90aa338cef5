"""README's table of ablations says what the committed results say."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "experiments/results/mini"
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
HOLDS = {"same": "yes", "opposite": "**no, opposite**", "none": "not told apart"}
NUMBER = re.compile(r"[-+]?\d[\d.]*")


def results(table: str) -> dict[tuple[str, str], dict[str, str]]:
    with (RESULTS / f"{table}.csv").open(newline="", encoding="utf-8") as file:
        return {(line["title"], line["metric"]): line for line in csv.DictReader(file)}


def readme_rows() -> dict[str, list[str]]:
    section = README.split("## Repeat the paper's tables")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in rows[2:]}


def numbers(cell: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(cell)]


@pytest.mark.parametrize("table", ["experts", "upsampling"])
def test_every_row_of_the_results_stands_in_readme(table: str) -> None:
    lines, rows = results(table), readme_rows()
    shown = 0
    for title in {title for title, _ in lines}:
        measured, spectral = (lines[title, metric] for metric in ("fd_patch_vae", "spectral_distance"))
        if not measured["direction"]:
            continue  # the reference row, whose name README gives with the table's
        for cell, line in zip(rows[title], (measured, spectral), strict=False):
            keys = ("difference", "difference_low", "difference_high")
            assert numbers(cell) == pytest.approx([float(line[key]) for key in keys], rel=6e-3)
        assert numbers(rows[title][2]) == [float(measured["paper_difference"])]
        assert rows[title][3] == HOLDS[measured["direction"]]
        shown += 1
    assert shown == {"experts": 7, "upsampling": 2}[table]


@pytest.mark.parametrize(
    ("table", "named", "row"),
    [
        ("experts", "**Table 6: full cascade**", "full"),
        ("upsampling", "**Table 5: VLUer**", "VLUer"),
    ],
)
def test_the_row_that_the_others_are_compared_with(table: str, named: str, row: str) -> None:
    lines, cells = results(table), readme_rows()[named]
    for cell, metric in zip(cells, ("fd_patch_vae", "spectral_distance"), strict=False):
        assert numbers(cell) == pytest.approx([float(lines[row, metric]["mean"])], rel=6e-3)
    assert numbers(cells[2]) == [float(lines[row, "fd_patch_vae"]["paper"])]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_say_where_they_are_from(path: Path) -> None:
    about = json.loads(path.read_text(encoding="utf-8"))
    assert "mini world" in about["world"]
    assert len(about["seeds"]) >= 3
    assert not about["failed"]
    assert not about["missing"]
    assert re.fullmatch(r"[0-9a-f]{40}", about["revision"])
    assert about["command"].startswith(f"luve ablate {path.stem}")
    for key in ("device", "date", "packages", "settings"):
        assert about[key]
