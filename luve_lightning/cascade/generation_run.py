"""The models of `luve generate`, the videos made with them, and latents of finished stages on disk."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luve_lightning.cascade.generation_jobs import VideoJob
from luve_lightning.cascade.lora_files import LoraFile
from luve_lightning.cascade.lora_layers import LoraSummary
from luve_lightning.cascade.options import CascadeOptions
from luve_lightning.cascade.pipeline import LuVePipeline
from luve_lightning.cascade.pipeline_files import expert_folders
from luve_lightning.cascade.run import ExpertUse, LuVePipelineOutput, Stage
from luve_lightning.cascade.speed import SpeedOptions, enable_context_parallel
from luve_lightning.cascade.stages import decode
from luve_lightning.data.safetensors_window import DIGEST, tensor_digest
from luve_lightning.data.store import ClaimedFiles
from luve_lightning.files import text_digest
from luve_lightning.models.attention import Attention
from luve_lightning.models.backbones import CutText, denoiser_of


class StageLatents:
    """Latents of finished stages, stored by what they depend on: a later run reuses them.

    The first write creates the folder `root`.
    """

    def __init__(self, root: Path) -> None:
        self._files = ClaimedFiles(root)
        self._files.clean()

    @staticmethod
    def digest(recipe: Mapping[str, Any]) -> str:
        """The name of a stage's latents: sha256 of everything they depend on."""
        return text_digest(json.dumps(recipe, sort_keys=True, ensure_ascii=False))

    def get(self, digest: str) -> dict[str, Tensor] | None:
        """The tensors stored under a digest, on the CPU, or None; damaged ones are removed with a message."""
        path = self._files.path(digest)
        try:
            with safe_open(path, framework="pt") as file:
                known = (file.metadata() or {}).get(DIGEST)
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            damage = str(error)
        else:
            if known is None or known == _digest(tensors):
                return tensors
            damage = "its values are not what was stored (sha256 differs)"
        warnings.warn(f"damaged latents of a stage are made again: {path}: {damage}", stacklevel=2)
        path.unlink(missing_ok=True)
        return None

    def put(self, digest: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors atomically, unless they exist."""
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        self._files.write(digest, safetensors.torch.save(whole, {DIGEST: _digest(whole)}))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    named = "".join(f"{name} {tensor_digest(tensor)}\n" for name, tensor in sorted(tensors.items()))
    return text_digest(named)


_VERSION = 1  # version of stored latents; raise it when the same options give others


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
    """

    frames: np.ndarray
    stages: dict[str, np.ndarray]
    reports: list[StageReport]
    steps: list[ExpertUse]


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
    """

    def __init__(
        self,
        pipeline: LuVePipeline,
        options: CascadeOptions,
        identity: Mapping[str, Any],
        kept: StageLatents | None,
        watcher: Watcher,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self.pipeline, self.options, self.identity = pipeline, options, identity
        self.kept, self.watcher, self.agree = kept, watcher, agree

    def make(self, job: VideoJob, show_stages: bool = False) -> MadeVideo:
        """Make one video.

        Args:
            job: video to make.
            show_stages: decode the earlier stages, too.

        Raises:
            ValueError: when a stage gives values that are not finite.
        """
        making = _Making(self, job)
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
        assert isinstance(output, LuVePipelineOutput)
        assert output.stages is not None
        assert output.experts_used is not None
        *earlier, last = output.stages
        shown = {name: making.decode(output.stages[name]) for name in earlier} if show_stages else {}
        frames = making.decode(output.stages[last], report=True)
        return MadeVideo(frames, shown, making.reports, output.experts_used)


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
        self.reports: list[StageReport] = []
        self._started: float | None = None

    def start(self, stage: Stage, steps: int) -> Tensor | None:
        """Stored latents of a stage, if there are any."""
        kept, digest = self.run.kept, latents_name(stage, self.job, self.options, self.run.identity)
        if kept is not None and digest is not None:
            found = kept.get(digest)
            if self.run.agree(found is not None):
                found = found or kept.get(digest)
                assert found is not None, "processes that make one video together must see one folder"
                # The noise of later stages continues where this stage left off.
                self.generator.set_state(found["generator"])
                self._report(stage, found["latents"], None)
                self._started = None
                return found["latents"]
        self.run.watcher.begin(stage, steps)
        self._started = self._start()
        return None

    def end(self, stage: Stage, latents: Tensor) -> None:
        """Store the latents of a stage that was run."""
        if self._started is None:
            return
        if not latents.isfinite().all():  # waits for the device, too
            raise ValueError(f"{self.job.name}: stage {stage} gave values that are not numbers; try --dtype float32")
        self._report(stage, latents, time.perf_counter() - self._started)
        kept, digest = self.run.kept, latents_name(stage, self.job, self.options, self.run.identity)
        if kept is not None and digest is not None:
            kept.put(digest, {"latents": latents, "generator": self.generator.get_state()})

    def step(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Report a denoising step."""
        del pipeline, step, timestep
        self.run.watcher.advance()
        return tensors

    def decode(self, latents: Tensor, report: bool = False) -> np.ndarray:
        """uint8 frames T x H x W x 3."""
        self.run.watcher.begin("decoding", 0)
        started = self._start()
        video = decode(self.run.pipeline, latents, "np")[0]
        # Frame by frame: a 4K video of 49 frames takes 5 GB in floating point, and each operation another 5.
        frames = np.stack([(frame * 255).round().astype(np.uint8) for frame in video])
        if report:
            self._report("decoded", latents, time.perf_counter() - started)
        return frames

    def _start(self) -> float:
        """The time now, from which a stage's seconds and its peak memory count."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
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
    }
    if "attention" in identity and "refiner" not in models:  # it may act in the first stage, too
        recipe["attention"] = identity["attention"]
    if stage == "upsampled":
        size, method = (job.height, job.width), options.upsampling
        recipe = {"motion": recipe, "size": size, "method": method, "vluer": models.get("vluer")}
    elif stage != "motion":
        return None
    return StageLatents.digest({"stage": stage, **recipe})


def find_models(
    backbone: str,
    vluer: Path | None,
    needs_vluer: bool,
    refiner: Path | None,
    experts: dict[str, Path | None] | Path | None,
    lora: Path | None,
) -> dict[str, str | Path]:
    """Where each model comes from, by the name of its option; unused models are left out.

    Raises:
        FileNotFoundError: for a missing folder.
        ValueError: when a VLUer is needed and there is none.
    """
    if not needs_vluer:
        vluer = None
    elif vluer is None and not (Path(backbone) / "vluer").is_dir():  # a saved LuVePipeline has one
        raise ValueError("vluer: required, but not given; --upsampling latent or rgb needs none")
    found: dict[str, str | Path | None] = {"vluer": vluer, "refiner": refiner, "lora": lora}
    if isinstance(experts, Path):
        experts = {name or "expert": folder for name, folder in expert_folders(experts).items()}
    found |= {f"experts.{name}": folder for name, folder in (experts or {}).items()}
    given = {name: path for name, path in found.items() if path is not None}
    for name, path in given.items():
        if not Path(path).exists():
            raise FileNotFoundError(f"{name}: {path}: no such file or folder")
    return {"backbone": backbone, **given}


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
    head = f"longer than the text encoder reads: {len(told)} texts"
    return "\n".join([head, *told[:3], *([f"  ... and {len(told) - 3} more"] if len(told) > 3 else [])])
