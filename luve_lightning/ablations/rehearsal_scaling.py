"""Rehearsals on one GPU and on more, side by side: seconds, memory, efficiency, and where the time goes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from sys import float_info
from typing import Any

from rich.table import Table as RichTable

from luve_lightning.ablations.rehearsal_table import GIB_WITHIN, TABLE, RehearsalRow, both_text, number_text, spent
from luve_lightning.evaluation.tables import table_markdown, table_rich
from luve_lightning.files import read_json, write_text

SCALING = "scaling"
_SAME = {"of": "is of", "gpu": "ran on", "versions": "ran with"}  # facts without which seconds cannot be compared
_NAMED = {"clips": "clips", "revision": "revision"}
_DEVICES = ("devices", "video_devices")
_NUMBER = r"[1-9]\d{0,8}"
_MOST = float_info.max


@dataclass(frozen=True)
class DoneRehearsal:
    """A rehearsal as its rehearsal.json tells it.

    Attributes:
        path: the file.
        facts: what stands in its head.
        rows: its lines.
    """

    path: Path
    facts: Mapping[str, str]
    rows: Sequence[RehearsalRow]

    @property
    def devices(self) -> str:
        """On how many GPUs it ran, as its options say."""
        return ", ".join(f"{key} {self.facts[key]}" for key in _DEVICES)


@dataclass
class ScalingRow:
    """A stage on a number of GPUs; None where it is not known.

    Attributes:
        stage: name of the stage, or of a part of a video.
        gpus: how many shared it.
        status: see StageResult.
        unit: see RehearsalRow.
        seconds: of a unit on one GPU; of a step, or a part of a video, on all of them.
        rate: units a second on all of them, where each makes its own.
        planned_gib, measured_gib: most memory on one GPU.
        efficiency: see `scaling_rows`.
        parts: what the seconds were spent on, as shares.
        beyond: by how much each part takes longer than on one GPU, as a share of that one's seconds; less than 0
            where it takes less.
    """

    stage: str
    gpus: int
    status: str
    unit: str
    seconds: float | None
    rate: float | None
    planned_gib: float | None
    measured_gib: float | None
    efficiency: float | None
    parts: dict[str, float] | None
    beyond: dict[str, float] | None = None


def read_rehearsal(path: Path) -> DoneRehearsal:
    """A rehearsal's table.

    Args:
        path: the rehearsal's folder, or its rehearsal.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is none, or one of an earlier version, which does not say what it ran on.
    """
    file = path / f"{TABLE}.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"rehearsals: no such file: {file}; expected a folder of luve rehearse")
    try:
        content = read_json(file)
    except ValueError as error:
        raise ValueError(f"rehearsals: {error}; expected a folder of luve rehearse") from None
    facts = {key: value for key, value in content.items() if isinstance(value, str)}
    try:
        rows = [RehearsalRow(**row) for row in content["rows"]]
    except (LookupError, TypeError):
        rows = []
    for row in rows:
        _check_row(file, row)
    for key in _DEVICES:
        if key in content and not re.fullmatch(_NUMBER, facts.get(key, "")):
            raise ValueError(f"rehearsals: {file}: {key} is {content[key]!r}; expected a number above 0 as a text")
    missing = [key for key in (*_SAME, *_NAMED, "python", *_DEVICES) if not facts.get(key)]
    if not rows or missing:
        why = f"; it does not say {', '.join(missing)}" if rows else ""
        raise ValueError(f"rehearsals: {file} is no table of this version of luve rehearse{why}")
    return DoneRehearsal(file, facts, rows)


def _check_row(file: Path, row: RehearsalRow) -> None:
    """Refuse a line of the table that was edited by hand into what no rehearsal writes."""
    parts = row.parts if isinstance(row.parts, dict) else {"parts": row.parts}
    numbers = {name: getattr(row, name) for name in ("measured_seconds", "rate", "planned_gib", "measured_gib")}
    checks: dict[str, tuple[Mapping[str, Any], Callable[[Any], bool]]] = {
        "a text": ({name: getattr(row, name) for name in ("stage", "status", "unit")}, lambda x: isinstance(x, str)),
        "a whole number above 0 or null": (
            {"processes": row.processes},
            lambda x: x is None or (type(x) is int and 0 < x <= _MOST),
        ),
        "a number of at least 0 or null": (
            numbers,
            lambda x: x is None or (type(x) in (int, float) and 0 <= x <= _MOST),
        ),
        "a number or null": (parts, lambda x: x is None or (type(x) in (int, float) and abs(x) <= _MOST)),
    }
    for expected, (values, fits) in checks.items():
        for name, value in values.items():
            if not fits(value):
                raise ValueError(f"rehearsals: {file}: {name} of {row.stage} is {value!r}; expected {expected}")


def check_alike(rehearsals: Sequence[DoneRehearsal]) -> list[str]:
    """Refuse rehearsals whose seconds cannot be compared; returns what else differs, in words.

    Raises:
        ValueError: other GPUs, packages, backbones, sizes or attention, or twice the same number of devices.
    """
    first, *others = rehearsals
    for other in others:
        for key, verb in _SAME.items():
            if other.facts[key] != first.facts[key]:
                raise ValueError(
                    f"rehearsals: {first.path} {verb} {first.facts[key]}, {other.path} {verb} {other.facts[key]}: "
                    "expected the same, or the efficiency says nothing"
                )
    seen: dict[str, DoneRehearsal] = {}
    for one in rehearsals:
        if (twin := seen.setdefault(one.devices, one)) is not one:
            raise ValueError(f"rehearsals: {twin.path} and {one.path} both have {one.devices}")
    notes = []
    for key, what in _NAMED.items():
        if len({one.facts[key] for one in rehearsals}) > 1:
            each = (f"{one.facts[key]} with {one.devices}" for one in rehearsals)
            notes.append(f"not all have the same {what}: {'; '.join(each)}")
    return notes


def scaling_rows(rehearsals: Sequence[DoneRehearsal]) -> list[ScalingRow]:
    """Every stage that GPUs share, on each number of them.

    The efficiency of N GPUs is the share of N times one GPU's pace that they reach. Of a training that is one GPU's
    seconds of a step by theirs, as the batch of each stays; of clips their number a second and GPU; of a video that
    they share one GPU's seconds by N times theirs.

    Raises:
        ValueError: no stage ran on several.
    """
    ordered = sorted(rehearsals, key=lambda one: tuple(int(one.facts[key]) for key in _DEVICES))
    found: dict[str, dict[int, RehearsalRow]] = {}
    for row in (row for one in ordered for row in one.rows if row.processes):
        assert row.processes is not None
        found.setdefault(row.stage, {}).setdefault(row.processes, row)  # several may have made the video on one GPU
    rows = []
    for several in found.values():
        one = several.get(1)
        if max(several) > 1:
            rows += [_row(row, gpus, one) for gpus, row in sorted(several.items())]
    if not rows:
        raise ValueError("rehearsals: none of them has a stage on several GPUs; expected one with --devices 2 or more")
    return rows


def _row(row: RehearsalRow, gpus: int, base: RehearsalRow | None) -> ScalingRow:
    efficiency = beyond = None
    if base is not None and base.measured_seconds and row.measured_seconds:
        longer = row.measured_seconds / base.measured_seconds
        efficiency = 1 / longer / (gpus if ":" in row.stage else 1)
        if row is not base and row.parts and base.parts:
            beyond = {name: share * longer - base.parts.get(name, 0.0) for name, share in row.parts.items()}
    return ScalingRow(
        row.stage,
        gpus,
        row.status,
        row.unit,
        row.measured_seconds,
        row.rate if row.unit == "clip" else None,
        row.planned_gib,
        row.measured_gib,
        efficiency,
        row.parts,
        beyond,
    )


def _cells(row: ScalingRow) -> dict[str, str]:
    missed = row.planned_gib and row.measured_gib and abs(row.planned_gib / row.measured_gib - 1) > GIB_WITHIN
    return {
        "stage": row.stage,
        "GPUs": str(row.gpus),
        "": {"done": ""}.get(row.status, row.status),
        "s": number_text(row.seconds) and f"{number_text(row.seconds)} a {'video' if ':' in row.stage else row.unit}",
        "clips a second": number_text(row.rate),
        "GiB a GPU, planned / took": both_text(row.planned_gib, row.measured_gib, 1) + ", missed" * bool(missed),
        "efficiency": "" if row.efficiency is None else f"{row.efficiency:.0%}",
        "where the time goes": spent(row.parts),
        "longer than on one GPU": spent(row.beyond),
    }


def scaling_lines(rows: Sequence[ScalingRow], notes: Sequence[str]) -> list[str | RichTable]:
    """The table for a terminal, and what stands below it."""
    cells = [_cells(row) for row in rows]
    shown = [column for column in cells[0] if any(row[column] for row in cells)]
    return [table_rich(shown, [{column: row[column] for column in shown} for row in cells]), *notes]


def write_scaling(folder: Path, rows: Sequence[ScalingRow], notes: Sequence[str], facts: Mapping[str, str]) -> None:
    """Write `scaling.json` and `scaling.md`."""
    content = {**facts, "notes": list(notes), "rows": [asdict(row) for row in rows]}
    write_text(folder / f"{SCALING}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    cells = [_cells(row) for row in rows]
    lines = [f"# {facts['title']}", "", *(f"- {key}: {value}" for key, value in facts.items() if key != "title"), ""]
    lines += [table_markdown(list(cells[0]), cells)]
    write_text(folder / f"{SCALING}.md", "\n".join([*lines, *(f"- {note}" for note in notes), ""]))
