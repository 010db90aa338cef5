"""The table of a rehearsal: what each stage was planned to take and took, and what the whole recipe would take here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from luve_lightning.ablations.rehearsal_run import plan_of
from luve_lightning.ablations.rehearsal_stage import RehearsalStage, StageResult
from luve_lightning.evaluation.tables import table_markdown, table_rich
from luve_lightning.files import find_json, write_text

TABLE = "rehearsal"
SECONDS_WITHIN, GIB_WITHIN = 0.25, 0.15
"""Shares of what was measured by which a plan may miss it."""
_COMPARED_FROM = 1.0  # seconds of a video's part


@dataclass
class RehearsalRow:
    """A line of the table; None where nothing is known.

    Attributes:
        stage: name of the stage; "generate: refined" for a part of it.
        status: see StageResult.
        seconds: of the stage, all its processes together.
        unit: what the next figures count: a step, a clip, a caption; a part of a video as a whole.
        planned_first, measured_first: seconds that the first one takes beyond the others.
        planned_seconds, measured_seconds: of one unit, once it runs; of a video's part with its first one.
        planned_gib, measured_gib: most memory that PyTorch allocated on one GPU.
        missed: what the plan missed by more than it may, "seconds" and "GiB"; None where nothing can be compared.
        rate: units a second, of all its processes that make units of their own.
        processes: that shared the stage, or a part of a video, with a GPU each.
        parts: what the seconds were spent on, as shares; see StepParts, ClipTimes and UnitTimes.
        gpu_hours: of the whole recipe, from the measured seconds.
        terabytes: that the whole recipe leaves, from what was measured.
        resumed: where it was stopped and went on.
        note: what else there is to say.
    """

    stage: str
    status: str
    seconds: float | None = None
    unit: str = ""
    planned_first: float | None = None
    measured_first: float | None = None
    planned_seconds: float | None = None
    measured_seconds: float | None = None
    planned_gib: float | None = None
    measured_gib: float | None = None
    missed: list[str] | None = None
    rate: float | None = None
    processes: int | None = None
    parts: dict[str, float] | None = None
    gpu_hours: float | None = None
    terabytes: float | None = None
    resumed: str = ""
    note: str = ""


def rehearsal_rows(
    stages: Sequence[RehearsalStage], results: Mapping[str, StageResult], root: Path
) -> list[RehearsalRow]:
    """The lines of those stages that have a result."""
    rows: list[RehearsalRow] = []
    for stage in stages:
        if (result := results.get(stage.name)) is not None:
            plan = plan_of(root, stage.name)
            rows.append(_row(stage, result, plan))
            if stage.unit == "video":
                rows += _parts(stage, result, plan)
    for row in rows:
        row.missed = _missed(row)
    return rows


def _missed(row: RehearsalRow) -> list[str] | None:
    """What of a row the plan missed; not of seconds of a video's part that is over before kernels are loaded."""
    short = _is_part(row) and row.measured_seconds is not None and row.measured_seconds < _COMPARED_FROM
    pairs = {
        "seconds": (row.planned_seconds, row.measured_seconds, SECONDS_WITHIN),
        "GiB": (row.planned_gib, row.measured_gib, GIB_WITHIN),
    }
    found = {
        name: abs(planned - measured) > within * measured
        for name, (planned, measured, within) in pairs.items()
        if planned is not None and measured is not None and not (short and name == "seconds")
    }
    return [name for name, missed in found.items() if missed] if found else None


def _row(stage: RehearsalStage, result: StageResult, plan: Mapping[str, Any]) -> RehearsalRow:
    seconds = round(sum(result.seconds), 1) if result.seconds else None
    row = RehearsalRow(stage.name, result.status, seconds, note=result.note, resumed=_resumed(stage, result))
    records = [record for record in result.records if record]
    if not stage.unit:
        return row
    row.unit = stage.unit
    row.planned_first, row.planned_seconds = _number(plan, "first_use_seconds"), _number(plan, "seconds_per_unit")
    row.planned_gib = _number(plan, "peak_gib")
    later = [record for record in records if record.get("seconds_per_unit") is not None]
    if later:
        # A process that was stopped after two steps says less than the one that went on; its first is left out.
        weights = [max(1, record.get("done", 0) - 1) for record in later]
        row.measured_seconds = statistics.fmean((record["seconds_per_unit"] for record in later), weights)
        row.rate = later[-1].get("rate") or (1 / row.measured_seconds if row.measured_seconds else None)
        # The first process compiles; the resumed one finds what it compiled.
        if stage.verb in ("fit", "upsample") and (first := records[0].get("first_seconds")) is not None:
            row.measured_first = max(0.0, first - row.measured_seconds)
    each = [one for record in records for one in (record, *record.get("parts", {}).get("ranks", ()))]
    row.measured_gib = max((one["peak_gib"] for one in each if one.get("peak_gib") is not None), default=None)
    row.processes = next((record["processes"] for record in reversed(records) if record.get("processes")), None)
    row.parts = next((_shares(record["parts"]) for record in reversed(records) if record.get("parts")), None)
    if row.measured_seconds is not None and stage.units is not None:
        # Those that it was measured with: an earlier rehearsal in this folder may have had others.
        gpus = later[-1].get("processes", stage.gpus) if stage.verb == "fit" else stage.gpus
        row.gpu_hours = row.measured_seconds * stage.units * gpus / 3600
    last = records[-1] if records else {}
    if stage.verb == "fit" and result.status == "done":
        row.terabytes = None if result.bytes is None else result.bytes / 1e12
    elif stage.units is not None and last.get("bytes") and last.get("made") and last.get("units"):
        row.terabytes = last["bytes"] / last["made"] * last["total"] / last["units"] * stage.units / 1e12
    return row


def _shares(parts: Mapping[str, Any]) -> dict[str, float] | None:
    """Parts of seconds as shares."""
    whole = parts["seconds"]
    return {name: parts[name] / whole for name in parts if name not in ("seconds", "ranks")} if whole else None


def _resumed(stage: RehearsalStage, result: StageResult) -> str:
    if not result.stopped:
        return ""
    first, last = result.records[0], result.records[-1]
    if stage.verb == "fit" and first and last and len(result.records) > 1:
        return f"at step {last.get('began')} of {last.get('step')}"
    if "total" in last and len(result.records) > 1:
        return f"with {last['there']} of {last['total']}"
    return "yes" if result.status == "done" else "stopped"


def _parts(stage: RehearsalStage, result: StageResult, plan: Mapping[str, Any]) -> list[RehearsalRow]:
    """A video's own stages."""
    planned = {part.get("made_as"): part for part in plan.get("stages", ())}
    rows = []
    for part in video_parts(Path(stage.gives["videos"])) if result.status == "done" else ():
        name, ahead = part["stage"], planned.get(part["stage"], {})
        peak, seconds, first = ahead.get("peak"), _number(ahead, "seconds"), _number(ahead, "first_use_seconds")
        rows.append(
            RehearsalRow(
                f"{stage.name}: {name}",
                result.status,
                unit=name,
                planned_first=first,
                planned_seconds=None if seconds is None else seconds + (first or 0.0),
                measured_seconds=part.get("seconds"),
                planned_gib=peak / 2**30 if isinstance(peak, int | float) else None,
                measured_gib=part.get("peak_gib"),
                processes=stage.gpus,
            )
        )
    return rows


def video_parts(folder: Path) -> list[dict[str, Any]]:
    """What each stage of a folder's first video took; of a stage whose latents were reused, what it took then."""
    for path in sorted(folder.glob("*.json")):
        parts = find_json(path).get("stages", [])
        kept = {part["stage"]: part for part in _kept_reports(folder / "latents")}
        return [kept.get(part["stage"], part) if part.get("seconds") is None else part for part in parts]
    return []


def _kept_reports(folder: Path) -> Iterable[dict[str, Any]]:
    """What StageLatents keeps beside a stage's latents."""
    yield from (told for path in sorted(folder.glob("*/*.json")) if (told := find_json(path)))


def _is_part(row: RehearsalRow) -> bool:
    return ":" in row.stage


def _number(plan: Mapping[str, Any], key: str) -> float | None:
    value = plan.get(key)
    return float(value) if isinstance(value, int | float) else None


# Shown -------------------------------------------------------------------------------------------------------------


def _cells(row: RehearsalRow, hours: str) -> dict[str, str]:
    """A line as people read it; planned / measured where there are both."""
    unit = f" a {row.unit}" if row.unit and not _is_part(row) else ""
    each = both_text(row.planned_seconds, row.measured_seconds)
    return {
        "stage": row.stage,
        "": {"done": "ok"}.get(row.status, row.status),
        "seconds": number_text(row.seconds, 0),
        "planned / took, s": each and each + unit,
        "first one more, s": both_text(row.planned_first, row.measured_first, 0),
        "GiB": both_text(row.planned_gib, row.measured_gib, 1),
        "plan": "" if row.missed is None else f"misses {' and '.join(row.missed)}" if row.missed else "met",
        "a second": number_text(row.rate),
        "where the time goes": spent(row.parts),
        hours: number_text(row.gpu_hours, 1),
        "TB": number_text(row.terabytes),
        "resumed": row.resumed,
    }


def both_text(planned: float | None, measured: float | None, digits: int | None = None) -> str:
    """Planned / measured; empty where neither is known."""
    if planned is None and measured is None:
        return ""
    return f"{number_text(planned, digits) or '-'} / {number_text(measured, digits) or '-'}"


def number_text(value: float | None, digits: int | None = None) -> str:
    """A number with so many decimals, or three significant digits; empty where it is not known."""
    if value is None:
        return ""
    return f"{value:.3g}" if digits is None or 0 < abs(value) < 10**-digits else f"{value:,.{digits}f}"


def spent(parts: Mapping[str, float] | None) -> str:
    """What the time was spent on, the most first; what is within half a percent of 0 is left out."""
    found = sorted((parts or {}).items(), key=lambda one: -one[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in found if abs(share) > 0.005)


def failures(results: Mapping[str, StageResult]) -> list[str]:
    """What failed or could not be run, with the last lines of each log."""
    lines = []
    for result in results.values():
        if result.status == "done":
            continue
        how = "" if result.code is None else f", exit status {result.code}"
        lines.append(f"{result.name}: {result.status}{how}" + f"; {result.note}" * bool(result.note))
        lines += [f"    {line}" for line in result.lines]
    return lines


def notes(results: Mapping[str, StageResult]) -> list[str]:
    """What there is to say of stages that are done."""
    return [f"{one.name}: {one.note}" for one in results.values() if one.status == "done" and one.note]


def whole(rows: Sequence[RehearsalRow], hours: str) -> str:
    """What the stages of the table would take in the whole recipe, as far as they were measured."""
    spent = sum(row.gpu_hours for row in rows if row.gpu_hours is not None)
    terabytes = sum(row.terabytes for row in rows if row.terabytes is not None)
    without = [row.stage for row in rows if row.unit and row.gpu_hours is None and not _is_part(row)]
    missing = f"; without {', '.join(without)}" if without else ""
    return f"these stages of the whole recipe, at this pace: {spent:,.1f} {hours}, {terabytes:.3g} TB{missing}"


def _kept_to(rows: Sequence[RehearsalRow]) -> list[str]:
    """How many plans were met, and which were not; empty where nothing was planned."""
    compared = [row for row in rows if row.missed is not None]
    if not compared:
        return []
    bad = [f"{row.stage} ({' and '.join(row.missed)})" for row in compared if row.missed]
    within = f"within {SECONDS_WITHIN:.0%} of the measured seconds and {GIB_WITHIN:.0%} of the GiB"
    missing = f"; misses: {', '.join(bad)}" if bad else ""
    return [f"planned {within}: {len(compared) - len(bad)} of {len(compared)} rows{missing}"]


def terminal_lines(
    rows: Sequence[RehearsalRow], results: Mapping[str, StageResult], facts: Mapping[str, Any]
) -> list[str | RichTable]:
    """The table for a terminal, and what stands below it."""
    cells = [_cells(row, _hours(facts)) for row in rows]
    shown = [column for column in (cells[0] if cells else ()) if any(row[column] for row in cells)]
    table = table_rich(shown, [{column: row[column] for column in shown} for row in cells])
    return [table, whole(rows, _hours(facts)), *_kept_to(rows), *notes(results), *failures(results)]


def _hours(facts: Mapping[str, Any]) -> str:
    return "hours" if "CPU" in facts["device"] else "GPU-hours"


def markdown(rows: Sequence[RehearsalRow], results: Mapping[str, StageResult], facts: Mapping[str, Any]) -> str:
    """The whole table as a page."""
    cells = [_cells(row, _hours(facts)) for row in rows]
    lines = [f"# {facts['title']}", "", *(f"- {key}: {value}" for key, value in facts.items() if key != "title"), ""]
    lines += [table_markdown(list(cells[0]), cells)] if cells else []
    for sentence in (whole(rows, _hours(facts)), *_kept_to(rows)):
        lines += [f"{sentence}.", ""]
    lines += [f"- {note}" for note in notes(results)]
    if bad := failures(results):
        lines += ["", "## Failed", "", "```", *bad, "```"]
    lines += ["", "## Commands", "", "```", *(r.command for r in results.values() if r.command), "```", ""]
    return "\n".join(lines)


def write_table(
    root: Path, rows: Sequence[RehearsalRow], results: Mapping[str, StageResult], facts: Mapping[str, Any]
) -> None:
    """Write `rehearsal.json` and `rehearsal.md`."""
    content = {**facts, "rows": [asdict(row) for row in rows], "stages": [asdict(one) for one in results.values()]}
    write_text(root / f"{TABLE}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_text(root / f"{TABLE}.md", markdown(rows, results, facts))
