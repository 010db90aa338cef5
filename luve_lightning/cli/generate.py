"""`luve generate`: prompts to videos by the cascade."""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from luve_lightning.cascade.generation_jobs import (
    KEPT_STAGES,
    JobTotals,
    Processes,
    StageLatents,
    VideoFolder,
    VideoJob,
    make_jobs,
    run_jobs,
)
from luve_lightning.cascade.generation_run import CascadeRun, attentions_of, cut_lines, cuts_of, load_pipeline
from luve_lightning.cascade.lora_files import read_lora
from luve_lightning.cascade.lora_names import LoraSummary, describe_lora
from luve_lightning.cascade.options import CascadeOptions, recipe_settings
from luve_lightning.cascade.pipeline import LuVePipeline
from luve_lightning.cascade.pipeline_files import find_models, model_files, model_identity
from luve_lightning.cascade.speed import SpeedOptions, cache_of, compiler_being_loaded
from luve_lightning.cli import Verb
from luve_lightning.cli.compose import escaped
from luve_lightning.cli.index import print_summary
from luve_lightning.cli.keys import Keys
from luve_lightning.data.hashes import FileHashes
from luve_lightning.data.prompts import PromptLine, check_text, check_visible, read_negative_prompt, read_prompt_file
from luve_lightning.data.video_files import MAX_FPS, VideoInProgress
from luve_lightning.evaluation.sample_sources import write_generated
from luve_lightning.machine import PACKAGE_ROOT, check_video, check_workers, git_state
from luve_lightning.models.attention import Attention, named_attention
from luve_lightning.models.backbones import CutTextWarning, load_backbone
from luve_lightning.terminal import Steps, amount, say

VERBS = {
    "generate": Verb(
        "Generation",
        "make videos of prompts by the cascade of three stages",
        positional="prompt",
        examples=("experiments/generate/mini.yaml",),
        goes_on=True,
    )
}

_SPEED = SpeedOptions()
# Options that a repetition leaves out: it makes one video, in a folder of its own, with one process.
_NOT_REPEATED = (
    "prompts",
    "limit",
    "negative_prompt_file",
    "overwrite",
    "keep_stages",
    "latents",
    "contact_sheet",
    "context_parallel",
    "scale",
)
_JOB = ("prompt", "negative_prompt", "seed", "height", "width", "motion_height", "motion_width", "num_frames")


def generate(
    backbone: str,
    output: Path,
    options: CascadeOptions,
    prompt: str | None = None,
    prompts: Path | None = None,
    limit: int | None = None,
    negative_prompt: str | None = None,
    negative_prompt_file: Path | None = None,
    seed: int = 0,
    vluer: Path | None = None,
    refiner: Path | None = None,
    transformer: Path | None = None,
    experts: dict[str, Path | None] | Path | None = None,
    lora: Path | None = None,
    lora_scale: float | None = None,
    attention: Attention | str | None = None,
    fps: float = 16.0,
    lossless: bool = False,
    encoder_threads: int = 1,
    keep_stages: bool = False,
    latents: Path | None = None,
    contact_sheet: bool = False,
    overwrite: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    speed: SpeedOptions = _SPEED,
    context_parallel: int = 1,
    device: str = "auto",
) -> None:
    """Makes a video of each prompt: motion at a low resolution, upsampled latents, refinement at full size.

    The prompt may be given without an option: luve generate --config FILE "a red boat". Beside each <name>.mp4, or
    <name>.png where there is one frame, lies <name>.json with everything needed to repeat it; the same seed gives the
    same video. Existing videos made with the same options are skipped, so an interrupted run continues. Under
    torchrun the processes share the prompts. A video whose decoding or writing fails goes on there: its latents wait
    in .claims/.

    Args:
        backbone: Folder or hub id of a diffusers pipeline.
        output: Folder of the videos.
        options: How every video is made.
        prompt: What to show.
        prompts: File of prompts instead: .txt, one per line; .jsonl, objects with prompt and any of seed, height,
            width, num_frames, negative_prompt and name; .csv with these columns or UltraVideo's.
        limit: Use only the file's first prompts, this many.
        negative_prompt: What not to show, unless a line in the file of prompts says.
        negative_prompt_file: Text file that holds it instead, such as Wan's published one.
        seed: Seed of every video whose line in the file has none.
        vluer: Folder of the VLUer.
        refiner: Transformer of the third stage, or of the only one; default the backbone's. A folder, or a
            .safetensors file with diffusers' or Wan's own names.
        transformer: Transformer of the first stage instead of the backbone's, likewise.
        experts: Folder of each expert of the third stage by name; null disables one. Or one folder that holds them all,
            as lfe/ and hfe/.
        lora: File or folder of a LoRA for the backbone, loaded into both transformers at the scale its makers
            meant.
        lora_scale: That scale, where its files say none and its makers do elsewhere: 0.25 for UltraWan-1K.
        attention: Replaces the self-attention of the third stage's transformer, whatever it and its experts were
            trained with; default the one saved with it. A name, such as dense, or a class and its settings.
        fps: Frames per second of the files.
        lossless: Keep every bit of the frames; many players cannot show such files.
        encoder_threads: Threads that write a video file. Several are faster; lossy frames of another number differ
            slightly.
        keep_stages: Keep the earlier stages: videos under motion/ and upsampled/, and latents under latents/,
            which a later run reuses.
        latents: Folder for the latents of earlier stages, whatever keep_stages says: runs that differ in a later
            stage share it. Default latents/ under the output, with keep_stages.
        contact_sheet: Draw <name>.jpg, a row of frames per stage.
        overwrite: Replace videos of the same names made with other options, instead of refusing.
        dtype: Dtype of the transformers and the text encoder; bfloat16 is slow on a CPU.
        speed: Options of speed and memory.
        context_parallel: Number of processes that share each video; start as many with torchrun.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
    """
    given = dict(locals())
    replacing = named_attention(attention)
    started, console = time.perf_counter(), Console(emoji=False)
    negative_prompt = _negative_prompt(negative_prompt, negative_prompt_file)
    processes = Processes.from_environment(os.environ, context_parallel)
    target = processes.device(device)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: expected a folder, {output} is a file")
    if not 0 < fps <= MAX_FPS:
        raise ValueError(f"fps: expected a number in (0, {MAX_FPS}], got {fps}")
    check_workers("encoder_threads", encoder_threads, least=1)
    cache = cache_of(speed)
    lines = _lines(prompt, prompts, limit)
    jobs = make_jobs(lines, options, load_backbone(backbone).size_rules(), negative_prompt, seed)
    for job in jobs:
        check_video(job.num_frames, job.height, job.width)
    needs_vluer = options.cascade and options.method.model == "vluer"
    sources = find_models(backbone, vluer, needs_vluer, refiner, experts, lora, transformer)
    if (options.shift, options.sampler) != (None, CascadeOptions.sampler):
        load_backbone(backbone).schedule().sampled_by(
            options.sampler, options.shift
        )  # refused before weights are loaded
    compiler_being_loaded(speed)
    adapter = None if lora is None else replace(read_lora(lora), given_scale=lora_scale)
    if lora_scale is not None:  # refused before anything is written
        told = describe_lora(adapter).refused if adapter else "lora_scale: is for a LoRA, and there is none (--lora)"
        if told:
            raise ValueError(told)
    hashes = FileHashes(output)
    hashes.begin([file for source in sources.values() for file in model_files(source)])

    def identities() -> dict[str, str]:
        models = {name: model_identity(source, hashes) for name, source in sources.items()}
        if adapter is not None and adapter.configuration is not None:
            models["lora"] += " at its configuration's scale"  # videos made when that was not read differ
        if lora_scale is not None:
            models["lora"] += f" at scale {lora_scale:g}"
        return models

    def load() -> tuple[LuVePipeline, LoraSummary | None, float]:
        processes.begin(target)
        asked = time.perf_counter()
        pipeline, summary = load_pipeline(
            sources, experts is None, dtype, speed, context_parallel, target, adapter, replacing
        )
        return pipeline, summary, time.perf_counter() - asked

    loaded = None
    if not any((output / f"{job.name}.json").exists() for job in jobs):  # else all may be there, and nothing is loaded
        try:
            loaded = load()  # while the files are hashed
        except Exception:
            identities()  # what is wrong with the files is told first
            raise
    stages = KEPT_STAGES if keep_stages and options.cascade else ()
    recipe = recipe_settings(
        options, dtype, cache, identities(), fps, lossless, replacing, speed.decode_half, encoder_threads
    )
    folder = VideoFolder(output, recipe, overwrite, stages, contact_sheet)
    missing = [job for job in jobs if not folder.is_done(job)]
    if not missing:
        _tell(console, output, JobTotals(0, len(jobs)), started)
        return
    pipeline, acting, loading = loaded or load()
    cuts = {job.name: cuts_of(pipeline, job, options.length) for job in missing}
    if told := cut_lines({job.name: line.where for job, line in zip(jobs, lines, strict=True)}, cuts):
        say(Console(emoji=False, quiet=processes.rank > 0), told)
    command = {job.name: command_of(given, job) for job in jobs}
    facts = about_run(target, processes.count, speed)
    facts["loading_seconds"] = round(loading, 3)  # once for all videos
    in_force = attentions_of(pipeline)
    facts["attention"] = {name: kind.record() for name, kind in in_force.items()}
    if processes.rank == 0:
        say(console, f"attention: {', '.join(f'{kind} in the {name}' for name, kind in in_force.items())}")
    if acting is not None:
        facts["lora"] = acting.record()
        if processes.rank == 0:
            say(console, str(acting))
    with Steps(Console(emoji=False, quiet=processes.rank > 0)) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", CutTextWarning)  # told already
        watcher = _Watcher(bar)
        shelf = latents or (output / "latents" if keep_stages else None)
        kept = None if shelf is None else StageLatents(shelf)
        run = CascadeRun(
            pipeline, options, recipe, kept, watcher, processes.shared, unfinished=StageLatents(output / ".claims")
        )
        show = bool(stages) or (contact_sheet and options.cascade)

        def make(job: VideoJob) -> None:
            began = time.perf_counter()
            watcher.name = f"{jobs.index(job) + 1} of {len(jobs)}"
            if processes.rank == 0:
                processes.shared(jobs.index(job))
            if processes.together and processes.rank > 0:
                run.make(job, show)
                return
            own = {"command": command[job.name], **facts}
            if cuts.get(job.name):
                own["cut"] = {name: cut.rest for name, cut in cuts[job.name].items()}
            with VideoInProgress(folder.video(job), fps, lossless, encoder_threads) as begun:
                made = run.make(job, show, begun.arrived)
                written = time.perf_counter()
                write_generated(folder, job, made, fps, lossless, own, encoder_threads, begun)
            run.forget(job)
            told = ", ".join(f"{r.stage} {_seconds(r.seconds)}" for r in made.reports)
            told += f", written {_seconds(time.perf_counter() - written)}"
            took = f"{time.perf_counter() - began:.0f} s"
            say(console, f"{folder.video(job)}  {took} ({told})")

        if processes.together and processes.rank > 0:
            processes.follow(lambda number: make(jobs[number]))
        else:
            totals = run_jobs(jobs, folder, make)
            processes.shared(None)
            _tell(console, output, totals, started)
    processes.end()


class _Watcher:
    """Tells the bar which video's stage is running."""

    def __init__(self, bar: Steps) -> None:
        self.bar, self.name = bar, ""

    def begin(self, what: str, total: int) -> None:
        self.bar.begin(f"video {self.name}, {what}", max(1, total))

    def advance(self) -> None:
        self.bar.advance()


def _lines(prompt: str | None, prompts: Path | None, limit: int | None) -> list[PromptLine]:
    if (prompt is None) == (prompts is None):
        raise ValueError("expected a prompt, or --prompts FILE, and not both")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 prompt, got {limit}")
    if prompts is not None:
        return read_prompt_file(prompts)[:limit]
    assert prompt is not None
    if not prompt.strip():
        raise ValueError("prompt: expected some words, got none")
    check_text(prompt, "prompt")
    check_visible(prompt, "prompt")
    return [PromptLine(prompt.strip())]


def _negative_prompt(text: str | None, file: Path | None) -> str | None:
    if text is not None and file is not None:
        raise ValueError(
            f"negative_prompt: given as a text and by the file {file}; expected one of them: "
            "--negative_prompt_file null drops the file"
        )
    if file is not None:
        return read_negative_prompt(file)
    check_text(text or "", "negative_prompt")
    return text


def _seconds(seconds: float | None) -> str:
    return "kept" if seconds is None else f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"


def _tell(console: Console, output: Path, totals: JobTotals, started: float) -> None:
    lines = [f"  written        {amount(totals.made, 'video')}", f"  already there  {totals.there}"]
    print_summary(console, output, lines, started)


def command_of(options: Mapping[str, Any], job: VideoJob) -> str:
    """The command that makes one video again, in place; another `--output` after it makes it elsewhere."""
    own = {**options, **vars(options["options"])} if "options" in options else dict(options)
    own = {key: value for key, value in own.items() if key not in (*_NOT_REPEATED, "options")}
    own |= {key: getattr(job, key) for key in _JOB}
    words = [f"--prompt={own.pop('prompt')}"]  # with `=`, a value that begins with `--` is a value
    keys = Keys("generate")
    for key, value in _leaves(own):
        parameter = keys.root.get(key)
        literal = parameter is not None and parameter.is_text
        words.append(f"--{key}={value if literal else _as_word(value)}")
    return shlex.join(["luve", "generate", *words])


def _as_word(value: object) -> str:
    """A value as the command line reads it back: a path may look like YAML, or like an interpolation."""
    word = str(value)
    if isinstance(value, Path) and (word in ("null", "???") or word[0] in "{~#&!"):
        word = f"./{word}"
    return str(escaped(word))


def _leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, Attention):
            settings = value.record()
            settings.pop("name")
            chosen = {"class_path": f"{type(value).__module__}.{type(value).__qualname__}", "init_args": settings}
            yield f"{prefix}{key}", json.dumps(chosen)
            continue
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            yield f"{prefix}{key}", str(value).lower()
        elif isinstance(value, tuple):
            yield f"{prefix}{key}", list(value)
        elif value is not None:
            yield f"{prefix}{key}", value


def about_run(device: torch.device, processes: int, speed: SpeedOptions) -> dict[str, Any]:
    """When, where and with what a run's videos were made; not compared when a run resumes."""
    return {
        "speed": asdict(speed),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "folder": str(Path.cwd()),
        "git": git_state(PACKAGE_ROOT),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        # On a CPU another number of threads rounds differently.
        "threads": torch.get_num_threads(),
        "processes": processes,
        "packages": dict(
            sorted((one["Name"], one["Version"]) for one in (d.metadata for d in metadata.distributions()))
        ),
    }
