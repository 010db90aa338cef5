"""Latents of finished stages on disk."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luve_lightning.cascade.denoise import Guidance
from luve_lightning.cascade.generation_jobs import VideoJob
from luve_lightning.cascade.luve import LuVePipeline
from luve_lightning.cascade.luve_latents import UpsamplingName
from luve_lightning.cascade.luve_run import ExpertUse
from luve_lightning.data.safetensors_window import DIGEST, tensor_digest
from luve_lightning.data.store import ClaimedFiles
from luve_lightning.files import text_digest


class StageLatents:
    """Latents of finished stages, by what they depend on: a later run takes them instead of making them again.

    Args:
        root: the folder; made on the first write.
    """

    def __init__(self, root: Path) -> None:
        self._files = ClaimedFiles(root)
        self._files.clean()

    @staticmethod
    def digest(recipe: Mapping[str, Any]) -> str:
        """The name of a stage's latents: sha256 of all that they depend on."""
        return text_digest(json.dumps(recipe, sort_keys=True, ensure_ascii=False))

    def get(self, digest: str) -> dict[str, Tensor] | None:
        """The tensors stored under a digest, on the CPU, or None; damaged ones are removed with a word."""
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
        """Store tensors, all at once, unless they are there."""
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        self._files.write(digest, safetensors.torch.save(whole, {DIGEST: _digest(whole)}))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    named = "".join(f"{name} {tensor_digest(tensor)}\n" for name, tensor in sorted(tensors.items()))
    return text_digest(named)


@dataclass(frozen=True)
class CascadeSettings:
    """How every video of a run is made.

    Attributes:
        upsampling: "vluer", "latent" or "rgb".
        cascade: False makes the video in one stage at full size, by the refiner if there is one.
        steps: denoising steps of the whole schedule.
        skip_steps: of them that the refinement skips.
        guidance: of every stage.
        refine_guidance: of the refinement; None is `guidance`.
        shift: of the schedule; None is the backbone's.
        switch: sigma from which on the low-frequency expert takes over; None is where the experts' bands meet.
        length: tokens of a prompt; None is the tokenizer's.
        dtype: of the transformers and the text encoder.
        cache: of the step-to-step cache that is in force, what decides its results; None without one.
    """

    upsampling: UpsamplingName = "vluer"
    cascade: bool = True
    steps: int = 50
    skip_steps: int = 5
    guidance: Guidance = field(default_factory=Guidance)
    refine_guidance: Guidance | None = None
    shift: float | None = None
    switch: float | None = None
    length: int | None = None
    dtype: str = "float32"
    cache: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.skip_steps <= self.steps:
            raise ValueError(
                f"steps {self.steps} and skip_steps {self.skip_steps}: expected at least 1 step, and 0 to all skipped"
            )
        if self.length is not None and self.length < 1:
            raise ValueError(f"length: expected at least 1 token, got {self.length}")
        if self.switch is not None and not 0 < self.switch < 1:
            raise ValueError(f"switch: expected a sigma between 0 and 1, got {self.switch}")


def rounded(guidance: Guidance | None) -> dict[str, Any] | None:
    """A guidance by what it decides: batched or not, results differ by rounding only."""
    if guidance is None:
        return None
    return {key: value for key, value in asdict(guidance).items() if key != "batched"}


def described(settings: CascadeSettings) -> dict[str, Any]:
    """Settings as a recipe has them."""
    facts = asdict(settings)
    return facts | {
        "guidance": rounded(settings.guidance),
        "refine_guidance": rounded(settings.refine_guidance),
    }


_VERSION = 1  # of kept latents; raise it when the same options give others


class Watcher(Protocol):
    """Who is told how far a video is."""

    def begin(self, what: str, total: int) -> None:
        """A stage of so many steps begins."""

    def advance(self) -> None:
        """One step of it is done."""


@dataclass
class StageReport:
    """What became of one stage.

    Attributes:
        stage: "motion", "upsampled", "refined", "direct" or "decoded".
        height: pixels.
        width: pixels.
        latents: shape of its latents, C x t x h x w.
        seconds: what it took; None where kept latents were taken.
    """

    stage: str
    height: int
    width: int
    latents: list[int]
    seconds: float | None


@dataclass
class MadeVideo:
    """A video and how it came about.

    Attributes:
        frames: uint8, T x H x W x 3.
        stages: frames of the stages before the last by name, if they were asked for.
        reports: every stage in order.
        steps: every denoising step in order, with the expert in force.
    """

    frames: np.ndarray
    stages: dict[str, np.ndarray]
    reports: list[StageReport]
    steps: list[ExpertUse]


class CascadeRun:
    """Makes videos with one pipeline.

    A video is the one that calling the pipeline with a CPU generator of the job's seed gives.

    Args:
        pipeline: loaded and on its device.
        settings: see there.
        models: identities of the models, by the names of their options; kept latents depend on them.
        kept: where the latents of finished stages are stored and looked up; None keeps none.
        watcher: told of every stage and step.
        agree: from what this process would do to what all do, for processes that make one video together.
    """

    def __init__(
        self,
        pipeline: LuVePipeline,
        settings: CascadeSettings,
        models: Mapping[str, Any],
        kept: StageLatents | None,
        watcher: Watcher,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self.pipeline, self.settings, self.models = pipeline, settings, dict(models)
        self.kept, self.watcher, self.agree = kept, watcher, agree

    def make(self, job: VideoJob, show_stages: bool = False) -> MadeVideo:
        """Make one video.

        Args:
            job: what to make.
            show_stages: decode the stages before the last, too.

        Raises:
            ValueError: when a stage gives values that are not numbers.
        """
        made = _Making(self, job)
        stages = made.cascade() if self.settings.cascade else made.direct()
        *earlier, last = stages
        shown = {name: made.decode(stages[name]) for name in earlier} if show_stages else {}
        return MadeVideo(made.decode(stages[last], report=True), shown, made.reports, made.steps)


class _Making:
    """One video in the making."""

    def __init__(self, run: CascadeRun, job: VideoJob) -> None:
        self.run, self.job, self.pipeline, self.settings = run, job, run.pipeline, run.settings
        self.generator = torch.Generator("cpu").manual_seed(job.seed)
        self.reports: list[StageReport] = []
        self.steps: list[ExpertUse] = []

    def cascade(self) -> dict[str, Tensor]:
        """The latents of the three stages."""
        job, settings = self.job, self.settings
        motion_recipe = self._motion_recipe()
        motion = self._stage(
            "motion",
            settings.steps,
            lambda: self.pipeline.generate_motion(
                job.prompt,
                height=job.motion_height,
                width=job.motion_width,
                num_frames=job.num_frames,
                **self._options(settings.guidance),
            ),
            motion_recipe,
        )
        size = (job.height, job.width)
        upsampled = self._stage(
            "upsampled",
            0,
            lambda: self.pipeline.upsample(motion, size, job.num_frames, settings.upsampling),
            {
                "motion": motion_recipe,
                "size": size,
                "method": settings.upsampling,
                "vluer": self.run.models.get("vluer"),
            },
        )
        refined = self._stage(
            "refined",
            settings.steps - settings.skip_steps,
            lambda: self.pipeline.refine(
                upsampled,
                job.prompt,
                skip_steps=settings.skip_steps,
                switch=settings.switch,
                **self._options(settings.refine_guidance or settings.guidance),
            ),
        )
        return {"motion": motion, "upsampled": upsampled, "refined": refined}

    def direct(self) -> dict[str, Tensor]:
        """The latents of direct generation at full size."""
        job, settings = self.job, self.settings
        latents = self._stage(
            "direct",
            settings.steps,
            lambda: self.pipeline.generate_direct(
                job.prompt,
                height=job.height,
                width=job.width,
                num_frames=job.num_frames,
                with_refiner=True,
                switch=settings.switch,
                **self._options(settings.guidance),
            ),
        )
        return {"direct": latents}

    def decode(self, latents: Tensor, report: bool = False) -> np.ndarray:
        """uint8 frames T x H x W x 3."""
        self.run.watcher.begin("decoding", 0)
        started = time.perf_counter()
        video = self.pipeline.decode(latents, "np")[0]
        # Frame by frame: a 4K video of 49 frames takes 5 GB as floating point, and each operation another 5.
        frames = np.stack([(frame * 255).round().astype(np.uint8) for frame in video])
        if report:
            self._report("decoded", latents, time.perf_counter() - started)
        return frames

    def _stage(
        self, name: str, steps: int, make: Callable[[], Tensor], recipe: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Latents of a stage, kept ones if there are any; with a recipe they are kept."""
        kept = self.run.kept if recipe is not None else None
        digest = "" if kept is None else StageLatents.digest({"stage": name, **(recipe or {})})
        found = None if kept is None else kept.get(digest)
        if kept is not None and self.run.agree(found is not None):
            found = found or kept.get(digest)
            assert found is not None, "processes that make one video together must see one folder"
            # The noise that the stages after it draw goes on where this stage left off.
            self.generator.set_state(found["generator"])
            self._report(name, found["latents"], None)
            return found["latents"].to(self.pipeline._execution_device)
        self.run.watcher.begin(name, steps)
        started = time.perf_counter()
        latents = make()
        if not latents.isfinite().all():  # waits for the device, too
            raise ValueError(
                f"{self.job.name}: stage {name} gave values that are not numbers; try --dtype float32"
            )
        self._report(name, latents, time.perf_counter() - started)
        if kept is not None:
            kept.put(digest, {"latents": latents, "generator": self.generator.get_state()})
        return latents

    def _options(self, guidance: Guidance) -> dict[str, Any]:
        return {
            "negative_prompt": self.job.negative_prompt,
            "num_inference_steps": self.settings.steps,
            "guidance": guidance,
            "generator": self.generator,
            "max_sequence_length": self.settings.length,
            "callback_on_step_end": self._stepped,
            "record": self.steps,
        }

    def _stepped(
        self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        del pipeline, step, timestep
        self.run.watcher.advance()
        return tensors

    def _motion_recipe(self) -> dict[str, Any]:
        job, settings = self.job, self.settings
        return {
            "version": _VERSION,
            "prompt": job.prompt,
            "negative_prompt": job.negative_prompt,
            "seed": job.seed,
            "size": (job.num_frames, job.motion_height, job.motion_width),
            "steps": settings.steps,
            "guidance": rounded(settings.guidance),
            "shift": settings.shift,
            "length": settings.length,
            "dtype": settings.dtype,
            "cache": settings.cache,
            "backbone": self.run.models["backbone"],
            "lora": self.run.models.get("lora"),
        }

    def _report(self, name: str, latents: Tensor, seconds: float | None) -> None:
        shape = list(latents.shape[1:])
        motion = name == "motion"
        height, width = (
            (self.job.motion_height, self.job.motion_width) if motion else (self.job.height, self.job.width)
        )
        self.reports.append(
            StageReport(name, height, width, shape, None if seconds is None else round(seconds, 3))
        )
