"""`luve generate`: prompts to videos by the cascade."""

from __future__ import annotations

import json
import os
import shlex
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from luve_lightning.cascade.lora_files import LoraFile, read_lora
from luve_lightning.cascade.lora_names import LoraSummary, describe_lora
from luve_lightning.cascade.options import CascadeOptions, recipe_settings
from luve_lightning.cascade.pipeline import LuVePipeline
from luve_lightning.cascade.pipeline_files import find_models, model_files, model_identity
from luve_lightning.cascade.speed import SpeedOptions, cache_of, check_spread, compiler_being_loaded
from luve_lightning.cli import Verb
from luve_lightning.cli.compose import words_of
from luve_lightning.cli.indexed_clips import print_summary
from luve_lightning.cli.keys import Keys
from luve_lightning.data.hashes import FileHashes
from luve_lightning.data.prompts import given_negative_prompt, given_prompts
from luve_lightning.data.video_files import MAX_FPS, VideoInProgress
from luve_lightning.evaluation.sample_sources import about_run, write_generated
from luve_lightning.machine import check_video, check_workers
from luve_lightning.models.attention import Attention, named_attention
from luve_lightning.models.backbones import CutText, CutTextWarning, load_backbone
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
    "own_noise",  # the job has the seed that follows
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
    own_noise: bool = False,
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
        own_noise: Noise of its own for each of these videos, by the seed and the video's name; its JSON file has the
            seed that gives it. Otherwise they all begin with the same noise.
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
    started, console = time.perf_counter(), Console(emoji=False)
    replacing = named_attention(attention)
    negative_prompt = given_negative_prompt(negative_prompt, negative_prompt_file)
    processes = Processes.from_environment(os.environ, context_parallel)
    target = processes.device(device)
    _check(output, fps, encoder_threads, options, speed)
    lines = given_prompts(prompt, prompts, limit)
    jobs = make_jobs(lines, options, load_backbone(backbone).size_rules(), negative_prompt, seed, own_noise)
    for job in jobs:
        check_video(job.num_frames, job.height, job.width)
    needs_vluer = options.cascade and options.method.model == "vluer"
    sources = find_models(backbone, vluer, needs_vluer, refiner, experts, lora, transformer)
    if context_parallel > 1:
        check_spread(sources, context_parallel)
    if (options.shift, options.sampler) != (None, CascadeOptions.sampler):
        load_backbone(backbone).schedule().sampled_by(options.sampler, options.shift)  # refused before weights
    compiler_being_loaded(speed)
    models = _Models(sources, _adapter(lora, lora_scale), lora_scale, FileHashes(output))

    def load() -> _Loaded:
        processes.begin(target)
        asked = time.perf_counter()
        found = load_pipeline(
            sources, experts is None, dtype, speed, context_parallel, target, models.adapter, replacing
        )
        return _Loaded(*found, time.perf_counter() - asked)

    loaded = None
    if not any((output / f"{job.name}.json").exists() for job in jobs):  # else all may be there, and nothing is loaded
        loaded = models.while_hashed(load)
    stages = KEPT_STAGES if keep_stages and options.cascade else ()
    recipe = recipe_settings(
        options, dtype, cache_of(speed), models.identities(), fps, lossless, replacing, speed.decode_half,
        encoder_threads,
    )  # fmt: skip
    folder = VideoFolder(output, recipe, overwrite, stages, contact_sheet)
    missing = [job for job in jobs if not folder.is_done(job)]
    if not missing:
        _tell(console, output, JobTotals(0, len(jobs)), started)
        return
    loaded = loaded or load()
    quiet = Console(emoji=False, quiet=processes.rank > 0)
    cuts = {job.name: cuts_of(loaded.pipeline, job, options.length) for job in missing}
    if told := cut_lines({job.name: line.where for job, line in zip(jobs, lines, strict=True)}, cuts):
        say(quiet, told)
    own = _own_facts(given, jobs, cuts, about_run(target, processes.count, speed) | loaded.facts(quiet))
    shelf = latents or (output / "latents" if keep_stages else None)
    with Steps(quiet) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", CutTextWarning)  # told already
        watcher = _Watcher(bar)
        run = CascadeRun(
            loaded.pipeline, options, recipe, None if shelf is None else StageLatents(shelf), watcher,
            processes.shared, unfinished=StageLatents(output / ".claims"),
        )  # fmt: skip
        show = bool(stages) or (contact_sheet and options.cascade)
        making = _Making(console, processes, folder, run, watcher, jobs, show, (fps, lossless, encoder_threads), own)
        if (totals := making.all()) is not None:
            _tell(console, output, totals, started)
    processes.end()


def _check(output: Path, fps: float, encoder_threads: int, options: CascadeOptions, speed: SpeedOptions) -> None:
    """Refuse what is wrong whatever the prompts and the models are."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: expected a folder, {output} is a file")
    if not 0 < fps <= MAX_FPS:
        raise ValueError(f"fps: expected a number in (0, {MAX_FPS}], got {fps}")
    check_workers("encoder_threads", encoder_threads, least=1)
    if speed.cache is not None:
        options.check_cache()


def _adapter(lora: Path | None, scale: float | None) -> LoraFile | None:
    """The LoRA at the scale that was given; refused before anything is written."""
    adapter = None if lora is None else replace(read_lora(lora), given_scale=scale)
    if scale is not None:
        told = describe_lora(adapter).refused if adapter else "lora_scale: is for a LoRA, and there is none (--lora)"
        if told:
            raise ValueError(told)
    return adapter


@dataclass(frozen=True)
class _Models:
    """The models' files, which are hashed from now on."""

    sources: dict[str, str | Path]
    adapter: LoraFile | None
    lora_scale: float | None
    hashes: FileHashes

    def __post_init__(self) -> None:
        self.hashes.begin([file for source in self.sources.values() for file in model_files(source)])

    def identities(self) -> dict[str, str]:
        """What a recipe says of each model."""
        models = {name: model_identity(source, self.hashes) for name, source in self.sources.items()}
        if self.adapter is not None and self.adapter.configuration is not None:
            models["lora"] += " at its configuration's scale"  # videos made when that was not read differ
        if self.lora_scale is not None:
            models["lora"] += f" at scale {self.lora_scale:g}"
        return models

    def while_hashed(self, load: Callable[[], _Loaded]) -> _Loaded:
        """The loaded models; what is wrong with their files is told first."""
        try:
            return load()
        except Exception:
            self.identities()
            raise


class _Loaded(NamedTuple):
    """A pipeline, what its LoRA does, and how many seconds it took to load."""

    pipeline: LuVePipeline
    acting: LoraSummary | None
    seconds: float

    def facts(self, console: Console) -> dict[str, Any]:
        """What every video's record says of the models; the attention and the LoRA are also told."""
        in_force = attentions_of(self.pipeline)
        say(console, f"attention: {', '.join(f'{kind} in the {name}' for name, kind in in_force.items())}")
        facts: dict[str, Any] = {"loading_seconds": round(self.seconds, 3)}  # once for all videos
        facts["attention"] = {name: kind.record() for name, kind in in_force.items()}
        if self.acting is not None:
            facts["lora"] = self.acting.record()
            say(console, str(self.acting))
        return facts


def _own_facts(
    given: Mapping[str, Any], jobs: list[VideoJob], cuts: Mapping[str, Mapping[str, CutText]], facts: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """What each video's record says beside its recipe, by name."""
    own = {job.name: {"command": command_of(given, job), **facts} for job in jobs}
    for name, cut in cuts.items():
        if cut:
            own[name]["cut"] = {which: text.rest for which, text in cut.items()}
    return own


@dataclass(frozen=True)
class _Making:
    """Makes the videos of this process and writes them; `writing` is fps, lossless and the encoder's threads."""

    console: Console
    processes: Processes
    folder: VideoFolder
    run: CascadeRun
    watcher: _Watcher
    jobs: list[VideoJob]
    show: bool
    writing: tuple[float, bool, int]
    facts: Mapping[str, dict[str, Any]]

    def all(self) -> JobTotals | None:
        """How many were made; None where another process counts."""
        if self.processes.together and self.processes.rank > 0:
            self.processes.follow(lambda number: self.make(self.jobs[number]))
            return None
        totals = run_jobs(self.jobs, self.folder, self.make)
        self.processes.shared(None)
        return totals

    def make(self, job: VideoJob) -> None:
        """Make one, with all processes that make it together; the first of them writes it."""
        began, number = time.perf_counter(), self.jobs.index(job)
        self.watcher.name = f"{number + 1} of {len(self.jobs)}"
        if self.processes.rank == 0:
            self.processes.shared(number)
        if self.processes.together and self.processes.rank > 0:
            self.run.make(job, self.show)
            return
        fps, lossless, threads = self.writing
        with VideoInProgress(self.folder.video(job), fps, lossless, threads) as begun:
            made = self.run.make(job, self.show, begun.arrived)
            written = time.perf_counter()
            write_generated(self.folder, job, made, fps, lossless, self.facts[job.name], threads, begun)
        self.run.forget(job)
        told = ", ".join(f"{r.stage} {_seconds(r.seconds)}" for r in made.reports)
        told += f", written {_seconds(time.perf_counter() - written)}"
        say(self.console, f"{self.folder.video(job)}  {time.perf_counter() - began:.0f} s ({told})")


class _Watcher:
    """Tells the bar which video's stage is running."""

    def __init__(self, bar: Steps) -> None:
        self.bar, self.name = bar, ""

    def begin(self, what: str, total: int) -> None:
        self.bar.begin(f"video {self.name}, {what}", max(1, total))

    def advance(self) -> None:
        self.bar.advance()


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
    if isinstance(kind := own.get("attention"), Attention):
        settings = {name: value for name, value in kind.record().items() if name != "name"}
        path = f"{type(kind).__module__}.{type(kind).__qualname__}"
        own["attention"] = json.dumps({"class_path": path, "init_args": settings})
    prompt = f"--prompt={own.pop('prompt')}"  # with `=`, a value that begins with `--` is a value
    return shlex.join(["luve", "generate", prompt, *words_of(own, Keys("generate"))])
