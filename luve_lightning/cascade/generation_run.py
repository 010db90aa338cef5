"""The models of `luve generate`, and the videos made with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from luve_lightning.cascade.generation_jobs import StageLatents, VideoJob
from luve_lightning.cascade.lora_files import LoraFile
from luve_lightning.cascade.lora_names import LoraSummary
from luve_lightning.cascade.options import CascadeOptions
from luve_lightning.cascade.pipeline import LuVePipeline
from luve_lightning.cascade.run import ExpertUse, LuVePipelineOutput, Stage
from luve_lightning.cascade.speed import SpeedOptions, enable_context_parallel
from luve_lightning.cascade.stages import decode_bytes, kernels_being_built
from luve_lightning.models.attention import Attention
from luve_lightning.models.backbones import CutText, denoiser_of
from luve_lightning.terminal import amount

_VERSION = 1  # version of stored latents; raise it when the same options give others

# What a video's last latents do not depend on, among what its files do.
_AFTER_THE_LATENTS = frozenset({"fps", "lossless", "encoder_threads", "decode_half"})


class Watcher(Protocol):
    """Receives the progress of a video."""

    def begin(self, what: str, total: int) -> None:
        """A stage of this many steps begins."""

    def advance(self) -> None:
        """One step of it is done."""


@dataclass
class StageReport:
    """The outcome of one stage.

    Attributes:
        stage: "motion", "upsampled", "refined", "direct" or "decoded".
        height: pixels.
        width: pixels.
        latents: shape of its latents, C x t x h x w.
        seconds: duration; None where stored latents were used.
        peak_gib: most memory that PyTorch held on the GPU meanwhile, weights included; None without one, and where
            stored latents were used.
    """

    stage: str
    height: int
    width: int
    latents: list[int]
    seconds: float | None
    peak_gib: float | None


@dataclass
class MadeVideo:
    """A video and how it was made.

    Attributes:
        frames: uint8, T x H x W x 3.
        stages: frames of the earlier stages by name, if requested.
        reports: every stage in order.
        steps: every denoising step in order, with its expert.
        seconds: what was done beside the reported stages: "embedding" of the prompts, "storing" and reading latents,
            "showing" earlier stages, and "making", the whole.
    """

    frames: np.ndarray
    stages: dict[str, np.ndarray]
    reports: list[StageReport]
    steps: list[ExpertUse]
    seconds: dict[str, float] = field(default_factory=dict)


class CascadeRun:
    """Makes videos with one pipeline.

    Each video equals a call of the pipeline with a CPU generator of the job's seed.

    Args:
        pipeline: loaded and on its device.
        options: options of every video.
        identity: what else the first stage depends on, for the names of stored latents: "dtype", "cache",
            "models", the models' identities by option name, and "attention", the record of one that replaces the
            saved one.
        kept: where latents of finished stages are stored and looked up; None stores none.
        watcher: receives every stage and step.
        agree: turns what this process would do into what all do, for processes that make one video together.
        unfinished: where the last stage's latents are until `forget`, so that a video whose decoding or writing fails
            goes on from there; None stores none.
    """

    def __init__(
        self,
        pipeline: LuVePipeline,
        options: CascadeOptions,
        identity: Mapping[str, Any],
        kept: StageLatents | None,
        watcher: Watcher,
        agree: Callable[[bool], bool] = bool,
        unfinished: StageLatents | None = None,
    ) -> None:
        self.pipeline, self.options, self.identity = pipeline, options, identity
        self.kept, self.watcher, self.agree, self.unfinished = kept, watcher, agree, unfinished

    def make(
        self, job: VideoJob, show_stages: bool = False, arrived: Callable[[np.ndarray, int], None] | None = None
    ) -> MadeVideo:
        """Make one video.

        Args:
            job: video to make.
            show_stages: decode the earlier stages, too; after the last, which may be written meanwhile.
            arrived: see `decode_bytes`.

        Raises:
            ValueError: when a stage gives values that are not finite, and when decoding takes too much memory.
        """
        making = _Making(self, job)
        last = making.last
        if not show_stages and (latents := making.stored(last)) is not None:
            frames = making.decode(latents, arrived, report=True)
            return MadeVideo(frames, {}, making.reports, [], making.seconds())
        building = kernels_being_built(self.pipeline)
        output = self.pipeline(
            job.prompt,
            making.options,
            negative_prompt=job.negative_prompt,
            with_refiner=True,
            generator=making.generator,
            output_type="latent",
            keep_stages=True,
            callback_on_stage_start=making.start,
            callback_on_stage_end=making.end,
            callback_on_step_end=making.step,
        )
        if building is not None:
            building.join()
        assert isinstance(output, LuVePipelineOutput)
        assert output.stages is not None
        assert output.experts_used is not None
        earlier = [name for name in output.stages if name != last]
        frames = making.decode(output.stages[last], arrived, report=True)
        shown = {name: making.decode(output.stages[name]) for name in earlier} if show_stages else {}
        return MadeVideo(frames, shown, making.reports, output.experts_used, making.seconds())

    def forget(self, job: VideoJob) -> None:
        """Remove the last stage's latents of a video that is written."""
        if self.unfinished is not None:
            making = _Making(self, job)
            self.unfinished.remove(last_latents_name(making.last, job, making.options, self.identity))


class _Making:
    """One video in progress."""

    def __init__(self, run: CascadeRun, job: VideoJob) -> None:
        self.run, self.job = run, job
        self.options = replace(
            run.options,
            height=job.height,
            width=job.width,
            num_frames=job.num_frames,
            motion_height=job.motion_height,
            motion_width=job.motion_width,
        )
        self.generator = torch.Generator("cpu").manual_seed(job.seed)
        self.device: torch.device = run.pipeline._execution_device
        self.last: Stage = "refined" if self.options.cascade else "direct"
        self.reports: list[StageReport] = []
        self._started: float | None = None
        self._began, self._embedding = time.perf_counter(), 0.0
        self._storing = self._showing = 0.0
        self._embedded = False

    def start(self, stage: Stage, steps: int) -> Tensor | None:
        """Stored latents of a stage, if there are any."""
        if not self._embedded:
            self._embedded, self._embedding = True, self._now() - self._began - self._storing
        if (found := self.stored(stage)) is not None:
            return found
        self.run.watcher.begin(stage, steps)
        self._started = self._start()
        return None

    def stored(self, stage: Stage) -> Tensor | None:
        """Stored latents of a stage, if there are any; the noise of later stages continues where it left off."""
        shelf, digest = self._shelf(stage)
        self._started = None
        if shelf is None or digest is None:
            return None
        asked = time.perf_counter()
        found = shelf.get(digest)
        if not self.run.agree(found is not None):
            return None
        found = found or shelf.get(digest)
        assert found is not None, "processes that make one video together must see one folder"
        self.generator.set_state(found["generator"])
        self._report(stage, found["latents"], None)
        self._storing += time.perf_counter() - asked
        return found["latents"]

    def end(self, stage: Stage, latents: Tensor) -> None:
        """Store the latents of a stage that was run."""
        if self._started is None:
            return
        if not latents.isfinite().all():  # waits for the device, too
            raise ValueError(f"{self.job.name}: stage {stage} gave values that are not numbers; try --dtype float32")
        done = time.perf_counter()
        self._report(stage, latents, done - self._started)
        shelf, digest = self._shelf(stage)
        if shelf is not None and digest is not None:
            tensors = {"latents": latents, "generator": self.generator.get_state()}
            shelf.put(digest, tensors, asdict(self.reports[-1]))
        self._storing += time.perf_counter() - done

    def step(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Report a denoising step."""
        del pipeline, step, timestep
        self.run.watcher.advance()
        return tensors

    def decode(
        self, latents: Tensor, arrived: Callable[[np.ndarray, int], None] | None = None, report: bool = False
    ) -> np.ndarray:
        """uint8 frames T x H x W x 3.

        Raises:
            ValueError: when it takes more memory than the GPU has.
        """
        self.run.watcher.begin("decoding", 0)
        started = self._start()
        try:
            frames: np.ndarray = decode_bytes(self.run.pipeline, latents, arrived)[0]
        except torch.OutOfMemoryError as error:
            kept = "" if self.run.unfinished is None else "; its latents are stored, and decoding begins there"
            raise ValueError(
                f"{self.job.name}: decoding takes more memory than is free on the GPU: --speed.decode_tile '[64, 64]' "
                f"or --speed.offload true takes less{kept}"
            ) from error
        seconds = time.perf_counter() - started
        if report:
            self._report("decoded", latents, seconds)
        else:
            self._showing += seconds
        return frames

    def seconds(self) -> dict[str, float]:
        """See MadeVideo."""
        found = {"embedding": self._embedding, "storing": self._storing, "showing": self._showing}
        return {**found, "making": time.perf_counter() - self._began}

    def _shelf(self, stage: Stage) -> tuple[StageLatents | None, str | None]:
        """Where a stage's latents are stored, and their name there; a part is None where they are not."""
        if stage == self.last:
            return self.run.unfinished, last_latents_name(stage, self.job, self.options, self.run.identity)
        return self.run.kept, latents_name(stage, self.job, self.options, self.run.identity)

    def _start(self) -> float:
        """The time now, from which a stage's seconds and its peak memory count."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self._now()

    def _now(self) -> float:
        """The time, when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _report(self, stage: str, latents: Tensor, seconds: float | None) -> None:
        _, height, width = self.options.motion if stage == "motion" else self.options.size
        taken = peak = None
        if seconds is not None:
            taken = round(seconds, 3)
            if self.device.type == "cuda":
                peak = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3)
        self.reports.append(StageReport(stage, height, width, list(latents.shape[1:]), taken, peak))


def latents_name(stage: Stage, job: VideoJob, options: CascadeOptions, identity: Mapping[str, Any]) -> str | None:
    """The name of a stage's stored latents; None for stages that are not stored."""
    models = identity["models"]
    recipe: dict[str, Any] = {
        "version": _VERSION,
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "seed": job.seed,
        "size": (job.num_frames, job.motion_height, job.motion_width),
        "steps": options.steps,
        "guidance": options.guidance.recipe(),
        "shift": options.shift,
        "length": options.length,
        "dtype": identity["dtype"],
        "cache": identity["cache"],
        "backbone": models["backbone"],
        "lora": models.get("lora"),
        **options.own_sampler,
    }
    if "transformer" in models:
        recipe["transformer"] = models["transformer"]
    if "attention" in identity and "refiner" not in models:  # it may act in the first stage, too
        recipe["attention"] = identity["attention"]
    if stage == "upsampled":
        size, method = (job.height, job.width), options.upsampling
        recipe = {"motion": recipe, "size": size, "method": method, "vluer": models.get("vluer")}
    elif stage != "motion":
        return None
    return StageLatents.digest({"stage": stage, **recipe})


def last_latents_name(stage: Stage, job: VideoJob, options: CascadeOptions, identity: Mapping[str, Any]) -> str:
    """The name of the latents that are decoded, by all that a video depends on but how they are decoded and written."""
    own = {key: value for key, value in asdict(job).items() if key != "name"}
    rest = {key: value for key, value in identity.items() if key not in _AFTER_THE_LATENTS}
    return StageLatents.digest({"stage": stage, "version": _VERSION, **own, **options.recipe(), **rest})


def load_pipeline(
    sources: dict[str, str | Path],
    own_experts: bool,
    dtype: str,
    speed: SpeedOptions,
    context_parallel: int,
    device: torch.device,
    lora: LoraFile | None = None,
    attention: Attention | None = None,
) -> tuple[LuVePipeline, LoraSummary | None]:
    """The pipeline on its device with its options applied, and what part of the LoRA acts.

    Args:
        sources: from `find_models`.
        own_experts: use the experts of a saved LuVePipeline.
        dtype: dtype of the transformers and the text encoder.
        speed: options of speed and memory.
        context_parallel: number of processes that share a video.
        device: device of the pipeline, unless parts of it are offloaded.
        lora: as `read_lora` read it.
        attention: see `LuVePipeline.from_pretrained`.
    """
    experts = {name.removeprefix("experts."): path for name, path in sources.items() if name.startswith("experts.")}
    pipeline: LuVePipeline = LuVePipeline.from_pretrained(
        sources["backbone"],
        vluer=sources.get("vluer"),
        experts=None if own_experts else experts,
        refiner=sources.get("refiner"),
        transformer=sources.get("transformer"),
        torch_dtype=getattr(torch, dtype),
        attention=attention,
    )
    summary = None if lora is None else pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    if not speed.offload:
        pipeline.to(device)
    if context_parallel > 1:
        enable_context_parallel(pipeline, context_parallel)
    pipeline.apply(speed)
    return pipeline, summary


def attentions_of(pipeline: LuVePipeline) -> dict[str, Attention]:
    """The self-attention in force in each transformer, by its name in the pipeline."""
    parts = {"transformer": pipeline.transformer, "refiner": pipeline.refiner}
    return {name: denoiser_of(part).attention_in_force for name, part in parts.items() if part is not None}


def cuts_of(pipeline: LuVePipeline, job: VideoJob, length: int | None) -> dict[str, CutText]:
    """What the text encoder does not see of a job's texts, by "prompt" and "negative_prompt"."""
    conditioner = pipeline.text(length)
    texts = {"prompt": job.prompt, "negative_prompt": job.negative_prompt or ""}
    found = {name: conditioner.cut(text) for name, text in texts.items()}
    return {name: cut for name, cut in found.items() if cut is not None}


def cut_lines(places: Mapping[str, str], cuts: Mapping[str, Mapping[str, CutText]]) -> str:
    """Lines that say which texts are cut and what they lose; empty when none is.

    Both arguments are by the video's name: where its prompt stands, empty for the option, and its `cuts_of`.
    """
    told = [f"  {places[name] or '--prompt'}: {what}: {cut}" for name, own in cuts.items() for what, cut in own.items()]
    if not told:
        return ""
    head = f"longer than the text encoder reads: {amount(len(told), 'text')}"
    return "\n".join([head, *told[:3], *([f"  ... and {len(told) - 3} more"] if len(told) > 3 else [])])
