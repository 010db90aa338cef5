"""Charts of what `luve spectra` and the callback DenoisingSpectra write: when frequency bands resolve."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luve_lightning.analysis.denoising_spectra import COLUMNS, PAPER_SIGMA_SWITCH
from luve_lightning.reporting.chart import Chart, Mark, Series
from luve_lightning.reporting.provenance import Origin, Unreadable, in_words, read_json


@dataclass(frozen=True)
class SpectraPlots:
    """Both charts of one measurement.

    Attributes:
        name: in the configuration.
        resolved: share of each band that is settled, over the denoising steps.
        power: power of each band as a multiple of the last step's.
        sentence: what was measured, in words; empty when nothing says so.
        provenance: None without a `switch.json`.
    """

    name: str
    resolved: Chart
    power: Chart
    sentence: str
    provenance: Origin | None


def read_spectra(name: str, path: Path) -> SpectraPlots:
    """Draw a table of spectra.

    Args:
        name: of the measurement.
        path: the CSV file, or the folder that `luve spectra` wrote: with `spectra.csv` and `switch.json`.

    Raises:
        FileNotFoundError: no such file.
        Unreadable: another table.
    """
    table = path / "spectra.csv" if path.is_dir() else path
    if not table.is_file():
        raise FileNotFoundError("missing")
    steps, sigmas, bands = _read(table)
    beside = table.with_name("switch.json")
    switch = read_json(beside) if beside.is_file() and table.name == "spectra.csv" else None
    marks = []
    if switch is not None and isinstance(switch.get("sigma"), int | float):
        sigma = float(switch["sigma"])
        marks.append(Mark(f"sigma_switch suggested here: {sigma:.3f}", _step_of(sigma, steps, sigmas)))
    marks.append(
        Mark(
            f"of the released checkpoints: {PAPER_SIGMA_SWITCH:g}",
            _step_of(PAPER_SIGMA_SWITCH, steps, sigmas),
        )
    )
    label = f"denoising step (sigma {sigmas[0]:.2f} to {sigmas[-1]:.2f})"
    series = [
        [Series(f"{band} of Nyquist", steps, values[:, k]) for band, values in bands.items()] for k in (0, 1)
    ]
    positive = min(line.y.min() for line in series[1]) > 0
    charts = (
        Chart(
            f"{name}: share of each band that is settled",
            label,
            "share settled",
            series[0],
            marks,
            (0.0, 1.0),
        ),
        Chart(
            f"{name}: power of each band, of the final one",
            label,
            "power, 1 is the final",
            series[1],
            marks,
            logarithmic=positive,
        ),
    )
    provenance = None if switch is None else Origin(f"spectra.{name}", str(beside), _facts(switch))
    return SpectraPlots(name, *charts, _sentence(switch), provenance)


def _read(table: Path) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Steps, their sigmas, and for each band steps x (resolved, power)."""
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


def _step_of(sigma: float, steps: np.ndarray, sigmas: np.ndarray) -> float:
    """The noise level's place between the steps; sigmas fall."""
    return float(np.interp(sigma, sigmas[::-1], steps[::-1]))


def _sentence(switch: dict[str, Any] | None) -> str:
    settings = (switch or {}).get("settings")
    if not isinstance(settings, dict):
        return ""
    prompts = settings.get("prompts")
    videos = f"{len(prompts)} videos, " if isinstance(prompts, list) else ""
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
