"""`luve rehearse`, `luve scaling`: the whole recipe with a few clips and steps, beside its plan and on more GPUs."""

from __future__ import annotations

import importlib.util
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from rich.console import Console

from luve_lightning.ablations.rehearsal import EXPERIMENTS, MINI, RANDOM, Rehearsal, RehearsalSize
from luve_lightning.ablations.rehearsal_run import RehearsalRun, only_rehearsal
from luve_lightning.ablations.rehearsal_scaling import (
    SCALING,
    check_alike,
    read_rehearsal,
    scaling_lines,
    scaling_rows,
    write_scaling,
)
from luve_lightning.ablations.rehearsal_stage import OVERRIDES, RehearsalStage, StageResult, StageRun, laid_over
from luve_lightning.ablations.rehearsal_table import TABLE, rehearsal_rows, terminal_lines, write_table
from luve_lightning.cli import Verb
from luve_lightning.cli.compose import compose
from luve_lightning.cli.errors import did_you_mean
from luve_lightning.cli.run_verb import refusal
from luve_lightning.files import check_writable
from luve_lightning.machine import PACKAGE_ROOT, cores, visible_gpus
from luve_lightning.revision import revision_in_words
from luve_lightning.terminal import amount, say

VERBS = {
    "rehearse": Verb(
        "Measurement", "run the whole recipe with a few clips and steps, beside its plan", slow=False, goes_on=True
    ),
    "scaling": Verb(
        "Measurement", "set rehearsals on 1, 2, 4, 8 GPUs side by side", positional="rehearsals...", slow=False
    ),
}

_PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft", "triton", "numpy", "av", "luve-lightning")
_LOG_WIDTH = 200


def rehearse(
    backbone: str = "mini",
    size: RehearsalSize | None = None,
    attention: Literal["dense", "windows"] = "dense",
    data: Path | None = None,
    devices: int = 1,
    steps: int = 4,
    video_steps: int | None = None,
    clips: int | None = None,
    stages: str | list[str] | None = None,
    again: bool = False,
    stop: bool = True,
    validate: bool = True,
    profile: bool | None = None,
    video_devices: int = 1,
    limit: float = 1200.0,
    gpu: str | None = None,
    output: Path | None = None,
    changes: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Runs every stage of the recipe with a few clips and steps, and sets what each takes beside its plan.

    From clips to a generated video: precompute, embed, score, both phases of the VLUer, adaptation, LFE, HFE, generate,
    upsample, evaluate, report, each by its own configuration in a process of its own. Each is stopped once by SIGTERM,
    as SLURM does, and resumed, and must reach the same step. What fails is reported with the end of its log, and stops
    only what needs it; the exit code is 1 then. The table is written after each stage: rehearsal.md and .json in the
    output, beside each stage's log in stages/. The same command later goes on: what is done stays.

    Args:
        backbone: mini; wan2.1-1.3b, random weights of that size; a folder, or a hub id.
        size: Of the videos, which chooses the configurations: mini, 2k or 4k. Default mini with the mini backbone, else
            2k.
        attention: Dense, or in windows; the mini world's is dense.
        data: Folder of clips, or an index; default a few painted ones.
        devices: GPUs of trainings and precompute, or processes on a CPU.
        steps: Steps of each training; the VLUer's, which are short, take more.
        video_steps: Denoising steps of the video; default as configured.
        clips: Number of clips of the whole recipe, which GPU-hours and terabytes are for. Default 20,000, the paper's;
            the mini world's 248.
        stages: Run only these, separated by commas, and what is missing of what they need.
        again: Run them even if they are done.
        stop: Stop each stage once.
        validate: Let each training validate on one batch at its end.
        profile: Let each training take two more steps, which tell where a step's time goes: waiting for data,
            computing, communicating, waiting for other GPUs, updating. Default with several devices.
        video_devices: GPUs that share the video by context parallelism, started by torchrun; the video is not stopped
            then.
        limit: Seconds for one stage.
        gpu: The GPU's speed for the plans, a file of luve bench --subject speed, or h200. Default it is measured first;
            without a GPU, nothing is planned.
        output: Folder for everything; with random weights of Wan2.1-1.3B's size some 60 GB. Default
            runs/rehearsal/<backbone>-<size>-<attention>-<devices>.
        changes: More values of a stage's configuration, by its name: --changes.lfe '{data: {init_args: {num_workers:
            0}}}'.
    """
    names = visible_gpus()
    size = size or ("mini" if backbone == "mini" else "2k")
    counts = {
        "devices": (devices, 1),
        "video_devices": (video_devices, 1),
        "steps": (steps, 2),
        "video_steps": (video_steps, 1),
        "clips": (clips, 1),
    }
    _check_counts(counts, limit, names)
    _check_sources(backbone, size, attention, data, gpu)
    _check_heads(backbone, video_devices)
    kind = f"{Path(backbone).name}-{size}-{attention}-{devices}"
    root = output or Path("runs/rehearsal") / kind
    _check_output(root, TABLE)
    scorer = PACKAGE_ROOT / ".venv-hpsv3/bin/luve"
    recipe = Rehearsal(
        root, compose, backbone, size, attention == "windows", data, devices, bool(names), steps, video_steps, clips,
        validate, scorer if scorer.is_file() else None, importlib.util.find_spec("wandb") is not None,
        bool(names) and gpu is None, devices > 1 if profile is None else profile, video_devices,
    )  # fmt: skip
    found, console = recipe.stages(), Console(emoji=False)
    chosen = _chosen(stages, [stage.name for stage in found], changes or {})
    _check_changes(found, recipe.given(), changes or {})
    used = names[: max(devices, video_devices)]
    facts = {
        **rehearsal_facts(f"Rehearsal: {backbone}, {size}, {attention}", used, devices),
        "of": f"{Path(backbone).name}, {size}, {attention}",
        "devices": str(devices),
        "video_devices": str(video_devices),
        "clips": _clips(recipe, changes or {}),
    }

    def updated(results: Mapping[str, StageResult]) -> None:
        write_table(root, rehearsal_rows(found, results, root), results, facts)

    def tell(text: str) -> None:
        say(console, f"[{datetime.now():%H:%M:%S}] {text}")

    run = RehearsalRun(found, recipe.given(), root, changes or {}, stop, limit, gpu, updated, tell)
    with only_rehearsal(root):
        try:
            run.run(chosen, again)
        finally:
            wide = console if console.is_terminal else Console(emoji=False, width=_LOG_WIDTH)
            for line in terminal_lines(rehearsal_rows(found, run.results, root), run.results, facts):
                wide.print(line, soft_wrap=isinstance(line, str), highlight=False, markup=False)
            say(console, f"{root / TABLE}.md and .json; logs in {root / 'stages'}")
    if any(result.status != "done" for name, result in run.results.items() if name in run.wanted(chosen)):
        raise SystemExit(1)


def scaling(rehearsals: list[Path], output: Path = Path("runs/rehearsal/scaling")) -> None:
    """Sets rehearsals on one GPU and on more side by side: seconds, memory, efficiency, and where the time goes.

    The efficiency of N GPUs is the share of N times one GPU's pace that they reach: one GPU's seconds of a step by
    theirs, where each has a batch of its own; for clips, their number a second and GPU by one GPU's; for a video that
    they share, one GPU's seconds by N times theirs. All must be of one backbone, size and attention, and on one kind of
    GPU with the same packages; other clips and another revision are named.

    Args:
        rehearsals: Folders of luve rehearse, or their rehearsal.json.
        output: Folder for scaling.md and scaling.json.
    """
    found = [read_rehearsal(path) for path in rehearsals]
    notes = check_alike(found)
    rows = scaling_rows(found)
    title = f"Scaling: {found[0].facts['of']}"
    facts = {"title": title, **{key: found[0].facts[key] for key in ("gpu", "versions", "python", "clips", "revision")}}
    facts["command"] = shlex.join(["luve", *sys.argv[1:]])
    _check_output(output, SCALING)
    write_scaling(output, rows, notes, facts)
    console = Console(emoji=False)
    wide = console if console.is_terminal else Console(emoji=False, width=_LOG_WIDTH)
    for line in scaling_lines(rows, notes):
        wide.print(line, soft_wrap=isinstance(line, str), highlight=False, markup=False)
    say(console, f"{output / SCALING}.md and .json")


def _clips(recipe: Rehearsal, changes: Mapping[str, Mapping[str, Any]]) -> str:
    """What the rehearsed clips are."""
    if recipe.data is not None:
        return str(recipe.data)
    [painted] = [stage.values for stage in recipe.stages() if stage.name == "material"]
    made = {**painted, **changes.get("material", {})}
    return f"{made['clips']} painted ones, {made['frames']} frames of {made['size'][0]}x{made['size'][1]}"


def _check_counts(counts: Mapping[str, tuple[int | None, int]], limit: float, gpus: Sequence[str]) -> None:
    """Refuse a number below the least one that stands beside it, and more devices than are here."""
    for key, (count, least) in counts.items():
        if count is not None and count < least:
            raise ValueError(f"{key}: expected at least {least}, got {count}")
    if not limit > 0:
        raise ValueError(f"limit: expected seconds above 0, got {limit:g}")
    for key in ("devices", "video_devices"):
        devices = counts[key][0] or 1
        if gpus and devices > len(gpus):
            here = f"{'is' if len(gpus) == 1 else 'are'} {amount(len(gpus), 'GPU')}"
            raise ValueError(f"{key}: here {here}, got {devices}")
    if not gpus and counts["video_devices"][0] != 1:
        raise ValueError("video_devices: one video is spread over GPUs, and there is none here")
    if not gpus and (counts["devices"][0] or 1) > (most := max(2, cores())):
        raise ValueError(f"devices: without a GPU each is a process, here at most {most}; got {counts['devices'][0]}")


def _check_output(folder: Path, table: str) -> None:
    """Refuse a folder in which the table cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {folder} is a file; expected a folder")
    check_writable(folder / f"{table}.json")


def _check_sources(backbone: str, size: str, attention: str, data: Path | None, gpu: str | None) -> None:
    """Refuse what would show only inside a stage: configurations and files that are not there."""
    if size == "mini" and attention == "windows":
        raise ValueError("attention: the mini world has no configurations with windows; expected dense, or --size 2k")
    if data is not None and not data.exists():
        raise FileNotFoundError(f"data: no such file or folder: {data}")
    if backbone not in ("mini", RANDOM):
        from luve_lightning.model_folders import is_local

        if is_local(backbone) and not (Path(backbone) / "model_index.json").is_file():
            raise FileNotFoundError(
                f"backbone {backbone}: no model_index.json in it; expected a diffusers pipeline folder"
            )
    if gpu is not None:
        from luve_lightning.analysis.cost import named_speed

        named_speed(gpu)
    if not EXPERIMENTS.is_dir():
        raise FileNotFoundError(f"the recipe's configurations are not here: expected {EXPERIMENTS}/ in {Path.cwd()}")


def _check_heads(backbone: str, video_devices: int) -> None:
    """Refuse a number of GPUs that cannot share a video."""
    if video_devices == 1:
        return
    from luve_lightning.analysis.model_parts import wan_1_3b
    from luve_lightning.cascade.speed import check_heads
    from luve_lightning.models.backbones import load_backbone

    if backbone == RANDOM:
        heads = int(wan_1_3b().transformer["num_attention_heads"])
    else:
        heads = load_backbone(MINI if backbone == "mini" else backbone).heads()
    check_heads("video_devices", video_devices, heads)


def _chosen(stages: str | list[str] | None, known: list[str], changes: Mapping[str, object]) -> list[str]:
    """Names of stages, as given or all."""
    words = stages.strip("[] ").split(",") if isinstance(stages, str) else stages
    names = known if words is None else [word.strip() for word in words if word.strip()]
    if not names:
        raise ValueError(f"stages: expected one or more of {', '.join(known)}")
    for key, some in (("stages", names), ("changes", list(changes))):
        for name in some:
            if name not in known:
                raise ValueError(f"{key}: no stage {name!r}{did_you_mean(name, known)}")
    return [name for name in known if name in names]


def _check_changes(
    stages: Sequence[RehearsalStage], given: Mapping[str, str], changes: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse changes that a stage's command would refuse, before any is run."""
    there = dict(given)
    for stage in stages:
        there |= stage.gives
    for stage in stages:
        own = changes.get(stage.name)
        if own is None:
            continue
        if not stage.verb:  # makes clips; its values are all that it takes
            for key in own:
                if key not in stage.values:
                    raise ValueError(f"changes.{stage.name}: no key {key!r}{did_you_mean(key, stage.values)}")
            _check_made(stage.name, {**stage.values, **own})
            continue
        with TemporaryDirectory() as folder:
            run = StageRun(stage, Path(folder), laid_over(stage.tree(there), own), stop=False, limit=1.0, program=())
            run.write_overrides()
            if reason := refusal(run.words()):
                reason = reason.replace(f"{run.folder / OVERRIDES}: ", "")
                raise ValueError(f"changes.{stage.name}: {reason}")


def _check_made(stage: str, values: Mapping[str, Any]) -> None:
    from luve_lightning.analysis.random_models import check_material

    try:
        check_material(**{key: value for key, value in values.items() if key != "folder"})
    except ValueError as error:
        raise ValueError(f"changes.{stage}: {error}") from None


def rehearsal_facts(title: str, gpus: Sequence[str], devices: int) -> dict[str, str]:
    """What a table of measurements was made on."""
    versions = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    packages = [f"{name} {versions[name]}" for name in _PACKAGES if name in versions]
    here = f"{platform.machine()} CPU, {amount(cores(), 'core')}, {amount(devices, 'process', 'processes')}"
    device = f"{len(gpus)} x {gpus[0]}" if gpus else here
    return {
        "title": title,
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "device": device,
        "gpu": " and ".join(dict.fromkeys(gpus)) if gpus else f"{platform.machine()} CPU, {amount(cores(), 'core')}",
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": ", ".join(packages),
        "revision": revision_in_words(),
        "command": shlex.join(["luve", *sys.argv[1:]]),
    }
