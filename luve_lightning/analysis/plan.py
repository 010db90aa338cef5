"""A plan as a table for people and as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from luve_lightning.analysis.cost import GpuSpeed, total
from luve_lightning.analysis.planner import Planner, StagePlan
from luve_lightning.analysis.recipe_plan import RecipePlan
from luve_lightning.cascade.options import CascadeOptions
from luve_lightning.models.backbones import denoiser_of

_GIB = 2**30
_TERMS = 3


def shared_stages(planner: Planner, gpus: int) -> list[StagePlan]:
    """Every stage as each GPU runs it of several that share a video; see `enable_context_parallel`.

    What the transformers' blocks compute and hold is divided, but the first block's input and the rotary factors, of
    which each takes a part, are whole; so are the other stages. The time in which GPUs exchange tokens and heads is
    left out.

    Raises:
        ValueError: for a number that does not divide a transformer's heads, or a stage's tokens.
    """
    if gpus < 1:
        raise ValueError(f"context_parallel: expected at least 1, got {gpus}")
    stages = planner.stages()
    if gpus == 1:
        return stages
    for stage in (one for one in stages if one.stage in _DENOISES):
        denoiser = denoiser_of(getattr(planner.parts, _DENOISES[stage.stage]))
        for what, count in (("attention heads", denoiser.heads), ("tokens", stage.tokens or 0)):
            if count % gpus:
                raise ValueError(f"context_parallel: {gpus} GPUs cannot share the {count:,} {what} of {stage.stage}")
    return [_shared(stage, gpus) if stage.stage in _DENOISES else stage for stage in stages]


def _shared(stage: StagePlan, gpus: int) -> StagePlan:
    inside = sum(size for path, size in stage.terms.items() if ".blocks." in path)
    less = inside - inside // gpus
    terms = {path: size // gpus if ".blocks." in path else size for path, size in stage.terms.items()}
    return replace(
        stage,
        terms=dict(sorted(terms.items(), key=lambda term: -term[1])),
        activations=stage.activations - less,
        peak=stage.peak - less,
        flops=stage.flops // gpus,
        flops_per_forward=stage.flops_per_forward // gpus,
        seconds=None if stage.seconds is None else stage.seconds / gpus,
    )


def plan_dict(
    options: CascadeOptions,
    stages: Sequence[StagePlan],
    speed: GpuSpeed | None,
    passes: Sequence[StagePlan] = (),
    gpus: int = 1,
) -> dict[str, Any]:
    """The whole plan in plain types; `passes` are single forward passes, and `gpus` share the video.

    `seconds` is that of a process's first video where what its first uses take is known, else of a later one.
    """
    seconds = None if speed is None else total(_with_first_use(stage) for stage in stages)
    return {
        "frames_height_width": list(options.size),
        "motion_frames_height_width": list(options.motion) if options.cascade else None,
        "steps": options.steps,
        "skip_steps": options.skip_steps,
        "sampler": options.sampler,
        "refinement": options.refinement if options.cascade else None,
        "peak": max(stage.peak for stage in stages),
        "flops": sum(stage.flops for stage in stages),
        "seconds": seconds,
        "first_use_seconds": total(stage.first_use_seconds for stage in stages),
        "gpu": None if speed is None else speed.name,
        "context_parallel": gpus,
        "stages": [asdict(stage) | {"made_as": _MADE.get(stage.stage, stage.stage)} for stage in stages],
        "forward_passes": [asdict(one) for one in passes],
    }


def plan_text(
    stages: Sequence[StagePlan], speed: GpuSpeed | None, passes: Sequence[StagePlan] = (), gpus: int = 1
) -> str:
    """A table of the stages of one GPU, then what makes up their memory, single forward passes, and the totals."""
    head = ["stage", "latents", "tokens", "steps", "forwards", "TFLOP each", "TFLOP", "peak GiB", "estimated"]
    rows = [head if speed else head[:-1]]
    first_uses = speed is not None and any(stage.first_use_seconds != 0 for stage in stages)
    if first_uses:
        rows[0].append("first use s")
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
        row += [] if speed is None else [_seconds(stage)]
        rows.append([*row, _first_use(stage)] if first_uses else row)
    lines = [_aligned(rows, 2), "", "memory, GiB: weights + activations + workspace (the largest activations)"]
    width = max(len(stage.stage) for stage in stages)
    lines += [f"  {stage.stage.ljust(width)}  {_memory(stage)}" for stage in stages]
    if passes:
        lines += ["", "one forward pass of the transformer at full size, as in training, without its gradients' memory"]
        lines += [f"  {_pass(one, speed)}" for one in passes]
    lines += ["", *_conclusion(stages, speed, gpus)]
    return "\n".join(line.rstrip() for line in lines)


# The transformers of stages that GPUs may share.
_DENOISES = {"motion": "transformer", "direct": "transformer", "refine": "refiner"}
# A stage's name in the record of a video that `luve generate` made, where the plan's is another.
_MADE = {"upsample": "upsampled", "refine": "refined", "decode": "decoded"}


def beside_made(stages: Sequence[StagePlan], made: Mapping[str, Any]) -> str:
    """A table of the plan, first uses included where they are known, beside what a video took, stage by stage.

    Args:
        stages: the plan.
        made: the video's record, the JSON file that lies beside it.

    Raises:
        ValueError: when it is no record, or that of another video: its stages or their latents are not the planned
            ones.
    """
    try:
        found = {stage["stage"]: stage for stage in made.get("stages", ())}
        steps = Counter(step["stage"] for step in made.get("steps", ()))
        whole = all(
            isinstance(stage["latents"], list)
            and isinstance(stage["seconds"], int | float | None)
            and isinstance(stage.get("peak_gib"), int | float | None)
            for stage in found.values()
        )
    except (TypeError, LookupError):
        whole = False
    if not whole:
        raise ValueError("made: expected the record that luve generate writes beside a video, VIDEO.json")
    rows = [["stage", "planned s", "took s", "error", "planned GiB", "peak GiB", "error"]]
    both: list[tuple[float, float]] = []
    for stage in stages:
        if stage.stage == "text":  # the record has no such stage
            continue
        name = _MADE.get(stage.stage, stage.stage)
        took = found.get(name)
        ran = took is not None and took["seconds"] is not None  # or its latents were kept, and it has no steps
        if took is None or tuple(took["latents"][1:]) != stage.latents or (ran and steps[name] != stage.steps):
            has = [f"{n} {s['latents'][1:]} in {steps[n]} steps" for n, s in found.items()]
            wanted = f"{name} {list(stage.latents or ())} in {stage.steps} steps"
            raise ValueError(f"made: the plan has {wanted}, the video's record {', '.join(has) or 'no stages'}")
        peak = _compared(stage.peak / _GIB, took.get("peak_gib"))
        seconds = _with_first_use(stage)
        rows.append([stage.stage, *_compared(seconds, took["seconds"]), *peak])
        if seconds is not None and took["seconds"] is not None:
            both.append((seconds, took["seconds"]))
    if both:
        estimates, taken = zip(*both, strict=True)
        rows.append(["together", *_compared(sum(estimates), sum(taken)), "", "", ""])
    return _aligned(rows, 1)


def _compared(planned: float | None, measured: float | None) -> list[str]:
    """A planned value, the measured one, and by how much the plan is off; "-" for what is not known."""
    error = f"{planned / measured - 1:+.1%}" if planned is not None and measured else "-"
    return [*("-" if value is None else f"{value:.2f}" for value in (planned, measured)), error]


def _aligned(rows: list[list[str]], left: int) -> str:
    """Rows as lines of columns, of which the first `left` are flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(n) if i < left else cell.rjust(n) for i, (cell, n) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def recipe_dict(plan: RecipePlan, speed: GpuSpeed | None) -> dict[str, Any]:
    """A stage of the recipe in plain types."""
    return {
        "kind": plan.kind,
        "unit": plan.unit,
        "seconds_per_unit": plan.seconds,
        "first_use_seconds": plan.first_use,
        "peak_gib": None if plan.peak is None else plan.peak / _GIB,
        "units": plan.units,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "terabytes": plan.terabytes,
        "bytes_per_unit": plan.stored,
        "strategy": plan.strategy,
        "processes": plan.processes,
        "gpu": None if speed is None else speed.name,
        "buckets": [dict(row) for row in plan.rows],
        "notes": list(plan.notes),
    }


def recipe_text(plan: RecipePlan, speed: GpuSpeed | None) -> str:
    """A table of what takes part in a stage of the recipe, then what a unit and all of them take."""
    rows = _training_rows(plan.rows) if plan.kind == "training" else _size_rows(plan.rows)
    lines = [_aligned(rows, 2), ""] if len(rows) > 1 else []
    if plan.peak is not None:
        lines.append(_held(plan, speed))
    if plan.seconds is not None:
        lines.append(f"{_an(plan.unit)} takes {duration(plan.seconds)}{_first(plan)}")
    elif plan.peak is not None:  # the scorer's note says it otherwise
        why = "give --gpu h200, or your GPU's speed with --gpu FILE" if speed is None else "a rate was not measured"
        lines.append(f"no time estimate: {why}")
    lines += [_whole(plan), *plan.notes]
    return "\n".join(lines)


def _an(unit: str) -> str:
    return f"a {unit}"


def _first(plan: RecipePlan) -> str:
    if plan.first_use is None:
        return "; what a first use takes is unknown: luve bench --subject speed --output FILE measures it"
    return f", and once {duration(plan.first_use)} for first uses (compiling, kernels)" if plan.first_use else ""


def _held(plan: RecipePlan, speed: GpuSpeed | None) -> str:
    assert plan.peak is not None
    where = f"by {plan.strategy} over {plan.processes} GPUs, each" if plan.processes > 1 else "on one GPU"
    text = f"peak {plan.peak / _GIB:.2f} GiB {where}"
    most = max(plan.rows, key=lambda row: row["peak"], default={"peak": 0})
    if plan.kind == "training" and most["peak"] == plan.peak:  # else a note says what takes more
        shared = f", {most['shared'] / _GIB:.2f} shared between GPUs" if most["shared"] else ""
        text += (
            f", in {most['name']}: {most['weights'] / _GIB:.2f} weights, {most['optimizer'] / _GIB:.2f} AdamW's state"
            f"{shared}, {most['passes'] / _GIB:.2f} forward and backward pass with gradients"
        )
    if speed is not None and speed.memory_gib:
        fits = "fits" if plan.peak < speed.memory_gib * _GIB else "does not fit"
        text += f"; {fits} {speed.name}'s {speed.memory_gib:g} GiB; the CUDA context, half a GiB, comes on top"
    return text


def _whole(plan: RecipePlan) -> str:
    """What all units take; of a thousand where their number is not known."""
    count = plan.units or 1000
    found = replace(plan, units=count)
    parts = [] if found.hours is None else [duration(found.hours * 3600), f"{_three(found.gpu_hours or 0)} GPU-hours"]
    parts += [] if found.terabytes is None else [f"{_three(found.terabytes)} TB"]
    each = f"{count:,} {plan.unit}{'' if count == 1 else 's'}"
    unknown = "" if plan.units is not None else "how many there are is unknown; "
    return f"{unknown}{each}: {', '.join(parts) or 'unknown'}"


def _training_rows(steps: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [["bucket", "latents", "tokens", "batch", "TFLOP", "passes GiB", "peak GiB", "step"]]
    for step in steps:
        row = [step["name"], "x".join(map(str, step["latents"])), f"{step['tokens']:,}" if step["tokens"] else ""]
        row += [str(step["batch"]), _three(step["flops"] / 1e12)]
        row += [f"{step['passes'] / _GIB:.2f}", f"{step['peak'] / _GIB:.2f}", _seconds_of(step)]
        rows.append(row)
    return rows


def _size_rows(buckets: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [["bucket", "pixels", "latents", "TFLOP", "MiB stored", "encoding"]]
    for bucket in buckets:
        for size in bucket["sizes"]:
            row = [bucket["bucket"], "x".join(map(str, size["pixels"])), "x".join(map(str, size["latents"]))]
            row += [_three(size["flops"] / 1e12), f"{size['stored'] / 2**20:.1f}", _seconds_of(size)]
            rows.append(row)
    return rows


def _seconds_of(row: Mapping[str, Any]) -> str:
    return "unknown" if row["seconds"] is None else duration(row["seconds"])


def duration(seconds: float) -> str:
    """A duration, short enough for a table."""
    if seconds < 100:
        return f"{_three(seconds)} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _memory(stage: StagePlan) -> str:
    parts = " + ".join(f"{n / _GIB:.2f}" for n in (stage.weights, stage.activations, stage.workspace))
    largest = [
        f"{'.'.join(path.split('.')[-3:])} {size / _GIB:.2f}" for path, size in list(stage.terms.items())[:_TERMS]
    ]
    experts = ", ".join(f"{count} steps {name}" for name, count in stage.experts.items() if name != "none")
    attention = ", ".join(f"{count} steps {name}" for name, count in stage.attention.items())
    sparse = "" if stage.pairs in (None, 1.0) else f"; attention: {attention}, {100 * stage.pairs:.3g} % of the pairs"
    return f"{parts} ({', '.join(largest)})" + (f"; experts: {experts}" if experts else "") + sparse


def _pass(one: StagePlan, speed: GpuSpeed | None) -> str:
    [name] = one.attention
    share = "" if one.pairs in (None, 1.0) else f", {100 * one.pairs:.3g} % of the pairs"
    return f"{name}{share}: {_three(one.flops / 1e12)} TFLOP" + ("" if speed is None else f", {_seconds(one)}")


def _first_use(stage: StagePlan) -> str:
    if stage.first_use_seconds is None:
        return "unknown"
    return f"{stage.first_use_seconds:.1f}" if stage.first_use_seconds else ""


def _with_first_use(stage: StagePlan) -> float | None:
    return None if stage.seconds is None else stage.seconds + (stage.first_use_seconds or 0.0)


def _seconds(stage: StagePlan) -> str:
    return "unknown" if stage.seconds is None else duration(stage.seconds)


def _conclusion(stages: Sequence[StagePlan], speed: GpuSpeed | None, gpus: int) -> list[str]:
    highest = max(stages, key=lambda stage: stage.peak)
    peak = highest.peak / _GIB
    lines = [f"peak {peak:.2f} GiB in {highest.stage}, {_three(sum(s.flops for s in stages) / 1e12)} TFLOP in all"]
    if speed is None:
        return [*lines, "no time estimate: give --gpu h200, or your GPU's speed with --gpu FILE or --gpu_tflops"]
    seconds, first = total(map(_with_first_use, stages)), total(stage.first_use_seconds for stage in stages)
    time, without = "no time estimate", "loading"
    if seconds is not None:
        time = f"estimated time {duration(seconds)}"
        time += f", {duration(first)} of it for first uses (compiling, kernels)," if first else ""
        without += " and first uses (compiling, kernels)" if first is None else ""
    where = f"one {speed.name}" if gpus == 1 else f"{gpus} {speed.name}, without what they tell each other"
    held = ""
    if speed.memory_gib:  # a processor's speed says nothing of the machine's memory
        held = f"; {'fits' if peak < speed.memory_gib else 'does not fit'} its {speed.memory_gib:g} GiB"
    lines.append(f"{time} on {where}, without {without}{held}")
    if first is None:
        lines.append("what a first use takes is unknown: luve bench --subject speed --output FILE measures it")
    if seconds is None:
        lines.append(
            f"{speed.name}: the rate of an attention that skips pairs was not measured: on the GPU, luve bench "
            "--subject speed --output FILE measures it; then give --gpu FILE"
        )
    return lines


def _three(number: float) -> str:
    """A number with three significant digits, without an exponent."""
    if number == 0:
        return "0"
    if number >= 1000:
        return f"{number:,.0f}"
    if number < 1e-4:
        return "< 0.0001"
    return f"{number:.3g}"
