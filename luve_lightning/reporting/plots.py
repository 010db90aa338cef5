"""Charts of what runs logged, and of when frequency bands resolve."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luve_lightning.files import read_json
from luve_lightning.reporting.page import Chart, Mark, Origin, Series, Unreadable, in_words, of_run
from luve_lightning.terminal import amount

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
Logged = dict[str, dict[int, float]]

_VERSION = re.compile(r"version_(\d+)")


def log_files(folder: Path) -> dict[Path, list[Path]]:
    """The files of every run below a folder, `<run>/<logger>/version_<n>/metrics.csv`, by run, in the order of n."""
    runs: dict[Path, dict[int, Path]] = {}
    for file in sorted(folder.rglob("version_*/metrics.csv")):
        number = _VERSION.fullmatch(file.parent.name)
        if number:
            runs.setdefault(file.parents[2], {})[int(number[1])] = file
    return {run: [files[number] for number in sorted(files)] for run, files in runs.items()}


def read_log(files: Sequence[Path]) -> dict[str, Curve]:
    """One run's curves: rising steps and finite values, by metric.

    A later file of training (a resume, or a new run in the folder) replaces what was logged before from its first
    step on. `luve test` logs into files of its own, at its own steps: from these, what begins with `test/` is
    added.

    Args:
        files: files of one run, in the order of writing.

    Raises:
        ValueError: for a file without a column `step`.
    """
    versions = [_read(file) for file in files]
    curves: Logged = {}
    for values in filter(_is_training, versions):
        begin = min(step for column in values.values() for step in column)
        kept = {metric: {s: v for s, v in column.items() if s < begin} for metric, column in curves.items()}
        curves = {metric: kept.get(metric, {}) | values.get(metric, {}) for metric in {**kept, **values}}
    for values in versions:
        if not _is_training(values):  # `luve validate` logs under training's names, at step 0
            curves |= {metric: column for metric, column in values.items() if metric.startswith("test/")}
    return {metric: _curve(column) for metric, column in curves.items() if column}


def _read(file: Path) -> Logged:
    """Finite values by metric and step; a line cut short by a kill is left out."""
    found: Logged = {}
    with file.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        if "step" not in (reader.fieldnames or ()):
            raise ValueError(f"{file}: expected a CSVLogger's file, it has no column step")
        for line in reader:
            step = _number(line["step"])
            if step is None:
                continue
            for metric, text in line.items():
                value = None if metric in (None, "step", "epoch") else _number(text)
                if value is not None:
                    found.setdefault(metric, {})[int(step)] = value
    return found


def _number(text: object) -> float | None:
    try:
        value = float(text) if isinstance(text, str) else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _is_training(values: Logged) -> bool:
    return any(metric.startswith("train/") for metric in values)


def _curve(values: dict[int, float]) -> Curve:
    steps = sorted(values)
    return np.array(steps, dtype=np.float64), np.array([values[step] for step in steps], dtype=np.float64)


@dataclass(frozen=True)
class RunCurves:
    """A run's chart, and its provenance."""

    chart: Chart
    provenance: Origin | None


def read_curves(name: str, folder: Path, columns: Sequence[str]) -> RunCurves:
    """Draw the columns of a run that match one of some patterns such as `*loss*`; for a resumed run see `read_log`.

    The `metrics.csv` files may lie in subfolders.

    Raises:
        FileNotFoundError: no such folder, or no `metrics.csv` in it.
        Unreadable: not a CSV of a CSVLogger, or no such column.
    """
    if not folder.is_dir():
        raise FileNotFoundError("missing")
    runs = log_files(folder)
    if not runs:
        raise FileNotFoundError("no metrics.csv there: missing, or the run logged elsewhere")
    logged: dict[str, Curve] = {}
    for run, files in runs.items():
        try:
            curves = read_log(files)
        except ValueError as error:
            raise Unreadable(str(error)) from None
        inside = "" if run == folder else f"{run.relative_to(folder)} "
        logged |= {f"{inside}{metric}": curve for metric, curve in curves.items()}
    chosen = [c for c in sorted(logged) if any(fnmatch(c.rpartition(" ")[2], p) for p in columns)]
    if not chosen:
        raise Unreadable(f"no column like {' or '.join(columns)} in its metrics.csv")
    series = [Series(column, *logged[column]) for column in chosen]
    return RunCurves(Chart(name, "optimiser step", "logged", series), of_run(f"curves.{name}", folder))


@dataclass(frozen=True)
class SpectraPlots:
    """Both charts of one measurement.

    Attributes:
        name: name in the configuration.
        resolved: settled share of each band, over the denoising steps.
        power: power of each band, relative to the last step's.
        sentence: what was measured, in words; empty when nothing says so.
        provenance: None without a `switch.json`.
    """

    name: str
    resolved: Chart
    power: Chart
    sentence: str
    provenance: Origin | None


def read_spectra(name: str, path: Path) -> SpectraPlots:
    """Draw a table of spectra: a CSV file, or a folder from `luve spectra` with `spectra.csv` and `switch.json`.

    Raises:
        FileNotFoundError: no such file.
        Unreadable: another kind of table.
    """
    from luve_lightning.evaluation.denoising_spectra import PAPER_SIGMA_SWITCH  # with diffusers, for seconds

    table = path / "spectra.csv" if path.is_dir() else path
    if not table.is_file():
        raise FileNotFoundError("missing")
    steps, sigmas, bands = _read_spectra(table)
    beside = table.with_name("switch.json")
    switch = read_json(beside) if beside.is_file() and table.name == "spectra.csv" else None
    switches = {f"of the released checkpoints: {PAPER_SIGMA_SWITCH:g}": PAPER_SIGMA_SWITCH}
    if switch is not None and isinstance(switch.get("sigma"), int | float):
        switches = {f"sigma_switch suggested here: {switch['sigma']:.3f}": float(switch["sigma"])} | switches
    # Sigmas fall with the steps.
    marks = [Mark(label, float(np.interp(s, sigmas[::-1], steps[::-1]))) for label, s in switches.items()]
    label = f"denoising step (sigma {sigmas[0]:.2f} to {sigmas[-1]:.2f})"
    resolved, power = (
        [Series(f"{band} of Nyquist", steps, values[:, k]) for band, values in bands.items()] for k in (0, 1)
    )
    positive = min(line.y.min() for line in power) > 0
    charts = (
        Chart(f"{name}: share of each band that is settled", label, "share settled", resolved, marks, (0.0, 1.0)),
        Chart(f"{name}: power of each band, of the final one", label, "power, 1 is the final", power, marks,
              logarithmic=positive),
    )  # fmt: skip
    provenance = None if switch is None else Origin(f"spectra.{name}", str(beside), _facts(switch))
    return SpectraPlots(name, *charts, _sentence(switch), provenance)


def _read_spectra(table: Path) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Steps, their sigmas, and for each band steps x (resolved, power)."""
    from luve_lightning.evaluation.denoising_spectra import COLUMNS

    found: dict[str, dict[int, tuple[float, float]]] = {}
    sigmas: dict[int, float] = {}
    with table.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if not set(COLUMNS) <= set(reader.fieldnames or ()):
            raise Unreadable(f"no table of spectra: expected the columns {', '.join(COLUMNS)}")
        for row in reader:
            try:
                step = int(row["step"])
                sigmas[step] = float(row["sigma"])
                found.setdefault(row["band"], {})[step] = (float(row["resolved"]), float(row["power"]))
            except (TypeError, ValueError):
                raise Unreadable(f"line {reader.line_num}: expected numbers") from None
    steps = sorted(sigmas)
    if len(steps) < 2 or any(sorted(values) != steps for values in found.values()):
        raise Unreadable("expected at least two denoising steps, each with every band")
    bands = {band: np.array([values[step] for step in steps]) for band, values in found.items()}
    return np.array(steps, dtype=np.float64), np.array([sigmas[step] for step in steps]), bands


def _sentence(switch: dict[str, Any] | None) -> str:
    settings = (switch or {}).get("settings")
    if not isinstance(settings, dict):
        return ""
    prompts = settings.get("prompts")
    videos = f"{amount(len(prompts), 'video')}, " if isinstance(prompts, list) else ""
    names = ("backbone", "height", "width", "frames", "steps", "guidance")
    told = ", ".join(f"{name} {in_words(settings[name])}" for name in names if name in settings)
    return f"Measured on {videos}{told}."


def _facts(switch: dict[str, Any]) -> dict[str, str]:
    settings = switch.get("settings")
    return {
        key: in_words(value)
        for key, value in (settings if isinstance(settings, dict) else {}).items()
        if key not in ("prompts", "edges") and value is not None
    }
