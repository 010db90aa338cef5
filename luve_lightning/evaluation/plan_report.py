"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luve_lightning.evaluation.gpu_speed import GpuSpeed
from luve_lightning.evaluation.stage_plan import StagePlan, VideoPlan

_GIB = 2**30
_TERMS = 3


def plan_dict(video: VideoPlan, stages: Sequence[StagePlan], speed: GpuSpeed | None) -> dict[str, Any]:
    """Everything, in plain types."""
    seconds = None if speed is None else sum(stage.seconds or 0.0 for stage in stages)
    return {
        "frames_height_width": list(video.size),
        "motion_frames_height_width": None if video.motion is None else list(video.motion),
        "steps": video.steps,
        "skip_steps": video.skip_steps,
        "peak": max(stage.peak for stage in stages),
        "flops": sum(stage.flops for stage in stages),
        "seconds": seconds,
        "gpu": None if speed is None else speed.name,
        "stages": [stage.as_dict() for stage in stages],
    }


def plan_text(stages: Sequence[StagePlan], speed: GpuSpeed | None) -> str:
    """A table of the stages, then what their memory is, and what it comes to."""
    head = ["stage", "latents", "tokens", "steps", "forwards", "TFLOP each", "TFLOP", "peak GiB", "estimated"]
    rows = [head if speed else head[:-1]]
    for stage in stages:
        row = [
            stage.stage,
            "" if stage.latents is None else "x".join(map(str, stage.latents)),
            "" if stage.tokens is None else f"{stage.tokens:,}",
            str(stage.steps or ""),
            str(stage.forwards),
            _three(stage.flops_per_forward / 1e12),
            _three(stage.flops / 1e12),
            f"{stage.peak / _GIB:.2f}",
        ]
        rows.append(row if speed is None else [*row, duration(stage.seconds or 0.0)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(n) if i < 2 else cell.rjust(n)
            for i, (cell, n) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines += ["", "memory, GiB: weights + activations + workspace (the largest activations)"]
    lines += [f"  {stage.stage.ljust(widths[0])}  {_memory(stage)}" for stage in stages]
    lines += ["", *_conclusion(stages, speed)]
    return "\n".join(line.rstrip() for line in lines)


def duration(seconds: float) -> str:
    """A time in words as short as a table takes."""
    if seconds < 100:
        return f"{_three(seconds)} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _memory(stage: StagePlan) -> str:
    parts = " + ".join(f"{n / _GIB:.2f}" for n in (stage.weights, stage.activations, stage.workspace))
    largest = [f"{_short(name)} {size / _GIB:.2f}" for name, size in list(stage.terms.items())[:_TERMS]]
    experts = ", ".join(f"{count} steps {name}" for name, count in stage.experts.items() if name != "none")
    return f"{parts} ({', '.join(largest)})" + (f"; experts: {experts}" if experts else "")


def _short(term: str) -> str:
    """The last parts of a module's path."""
    return ".".join(term.split(".")[-3:])


def _conclusion(stages: Sequence[StagePlan], speed: GpuSpeed | None) -> list[str]:
    highest = max(stages, key=lambda stage: stage.peak)
    peak = highest.peak / _GIB
    lines = [
        f"peak {peak:.2f} GiB in {highest.stage}, {_three(sum(s.flops for s in stages) / 1e12)} TFLOP in all"
    ]
    if speed is None:
        return [*lines, "no time estimate: give --gpu h200, or your GPU's speed with --gpu_tflops"]
    total = sum(stage.seconds or 0.0 for stage in stages)
    fits = "fits" if peak < speed.memory_gib else "does not fit"
    lines.append(
        f"estimated time {duration(total)} on one {speed.name}, without loading; {fits} its {speed.memory_gib:g} GiB"
    )
    return lines


def _three(number: float) -> str:
    """Three significant digits, without an exponent."""
    if number == 0:
        return "0"
    if number >= 1000:
        return f"{number:,.0f}"
    if number < 1e-4:
        return "< 0.0001"
    return f"{number:.3g}"
