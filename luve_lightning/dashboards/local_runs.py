"""Curves of local runs, from the `metrics.csv` of Lightning's CSVLogger; results from the tables of ablations."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from luve_lightning.pages.training_log import Curve, log_files, read_log

_COLUMNS = (
    "row", "metric", "better", "seeds", "mean", "low", "high",
    "difference", "difference_low", "difference_high", "paper", "direction",
)  # fmt: skip


@dataclass(frozen=True)
class LocalRun:
    """One run folder.

    Attributes:
        name: the folder, as found.
        curves: steps, rising, and finite values by metric.
    """

    name: str
    curves: dict[str, Curve]


@dataclass(frozen=True)
class Result:
    """One line of an ablation's table; numbers as text, as the file has them."""

    file: str
    row: str
    metric: str
    better: str
    seeds: str
    mean: str
    low: str
    high: str
    difference: str
    difference_low: str
    difference_high: str
    paper: str
    direction: str


def find_runs(patterns: Iterable[str], root: Path) -> list[LocalRun]:
    """Every run below the folders that the patterns match under `root`, the last changed first.

    Raises:
        ValueError: for a `metrics.csv` that no CSVLogger wrote.
    """
    folders = {folder for pattern in patterns for folder in root.glob(pattern) if folder.is_dir()}
    found = {run: files for folder in sorted(folders) for run, files in log_files(folder).items()}
    runs = []
    for folder, files in found.items():
        name = str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)
        runs.append((-max(file.stat().st_mtime for file in files), LocalRun(name, read_log(files))))
    return [run for _, run in sorted(runs, key=lambda item: (item[0], item[1].name))]


def read_results(patterns: Sequence[str], root: Path) -> list[Result]:
    """Lines of the tables of ablations that the patterns match under `root`.

    Raises:
        ValueError: for a CSV file without their columns.
    """
    found = []
    for path in _files(patterns, root):
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = set(_COLUMNS) - set(reader.fieldnames or ())
            if missing:
                raise ValueError(
                    f"results: {path} is no table of `luve ablate`: no column {sorted(missing)[0]}"
                )
            name = str(path.relative_to(root))
            found += [Result(name, *(line[column] for column in _COLUMNS)) for line in reader]
    return found


def read_worlds(patterns: Sequence[str], root: Path) -> dict[str, list[str]]:
    """What these tables say of whose numbers they are, from the JSON beside each, and the files that say so."""
    worlds: dict[str, list[str]] = {}
    for path in _files(patterns, root):
        about = path.with_suffix(".json")
        try:
            known = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{about}: not JSON: {error}") from None
        given = known.get("world") if isinstance(known, dict) else None
        world = str(given or "not recorded whose numbers these are")
        worlds.setdefault(world, []).append(str(path.relative_to(root)))
    return worlds


def _files(patterns: Sequence[str], root: Path) -> list[Path]:
    return sorted({path for pattern in patterns for path in root.glob(pattern)})
