"""The base of the stages that denoise: prompts and options to a run, and latents through the schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from luve_lightning.cascade.denoise import DenoisingStep, Tensors, denoise
from luve_lightning.cascade.options import CascadeOptions, Guidance
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.noise_bands import noised
from luve_lightning.models.backbones import Sampler, Schedule

if TYPE_CHECKING:
    from luve_lightning.cascade.pipeline import LuVePipeline

Stage = Literal["motion", "upsampled", "refined", "direct"]
Generators = torch.Generator | list[torch.Generator] | None
Chooser = Callable[[float], str | None] | None
"""The expert in force at a timestep; see `expert_chooser`."""

TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


class ExpertUse(NamedTuple):
    """A denoising step and its active expert.

    Attributes:
        stage: "motion", "refined" or "direct".
        step: its place in the whole schedule, skipped steps included.
        timestep: the scheduler's own.
        sigma: the scheduler's own.
        expert: None where the transformer ran alone.
    """

    stage: str
    step: int
    timestep: float
    sigma: float
    expert: str | None


def handed_over(steps: Iterable[ExpertUse]) -> float | None:
    """The sigma of the first step with another expert than the first of its stage; None where there is none."""
    first: dict[str, str | None] = {}
    for step in steps:
        if step.expert != first.setdefault(step.stage, step.expert):
            return step.sigma
    return None


@dataclass
class LuVePipelineOutput(BaseOutput):
    """The result of `LuVePipeline`.

    Attributes:
        frames: see `decode`.
        stages: latents by stage, "motion", "upsampled" and "refined", or "direct"; None unless requested.
        experts_used: every denoising step in order.
    """

    frames: Tensor | np.ndarray | list[list[Any]]
    stages: dict[str, Tensor] | None = None
    experts_used: list[ExpertUse] | None = None


class RunOptions(TypedDict, total=False):
    """Options of every stage that denoises.

    Attributes:
        negative_prompt: one for all, or one for each prompt; default "".
        prompt_embeds: B x length x dim, instead of prompts.
        negative_prompt_embeds: likewise.
        steps: steps of the whole schedule, >= 1; default that of CascadeOptions, as for `guidance`.
        guidance: a Guidance, or its scale.
        shift: shift of the schedule; default the backbone's own.
        sampler: "backbone" or "euler", see CascadeOptions.
        generator: one, or one for each prompt. Drawn from once for the motion's noise and once for the
            refinement's, each of the size of its latents: calling the stages one by one with the same generator
            gives the result of a single call. Default PyTorch's own.
        attention_kwargs: passed to the transformer; `{"scale": 0.5}` scales LoRAs.
        callback_on_step_end: as in diffusers' pipelines: called with the pipeline, the step's number within the
            stage, its timestep and a dictionary of tensors; returns those that it replaces.
        callback_on_step_end_tensor_inputs: names of the tensors; default ["latents"].
        noise: initial noise of the first stage; drawn by default.
        length: tokens per prompt, padding included; default the backbone's own.
        record: list to which every step is appended.
    """

    negative_prompt: str | list[str] | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    steps: int
    guidance: Guidance | float
    shift: float | None
    sampler: Sampler
    generator: Generators
    attention_kwargs: dict[str, Any] | None
    callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    noise: Tensor | None
    length: int | None
    record: list[ExpertUse] | None


@dataclass
class Run:
    """The inputs of a run, from prompts and RunOptions.

    Attributes:
        embeds: embeddings of the prompts.
        negative_embeds: None without guidance.
        guidance: guidance in effect now.
        steps: steps of the whole schedule.
        schedule: before `set_timesteps`.
        callback_inputs: names of the callback's tensors.
        record: every step so far.
        options: the others.
    """

    embeds: Tensor
    negative_embeds: Tensor | None
    guidance: Guidance
    steps: int
    schedule: Schedule
    callback_inputs: list[str]
    record: list[ExpertUse]
    options: RunOptions


def begin(
    pipeline: LuVePipeline, prompt: str | list[str] | None, also_guided: bool = False, **options: Unpack[RunOptions]
) -> Run:
    """Check the options and encode the prompts.

    Args:
        pipeline: encodes.
        prompt: one, or one for each video.
        also_guided: whether a later stage needs the negative prompt even where this one is not guided.
        options: see RunOptions.

    Raises:
        TypeError: for an unknown option.
        ValueError: for incompatible options.
    """
    if unknown := options.keys() - RunOptions.__annotations__.keys():
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
    steps, generator = options.get("steps", CascadeOptions.steps), options.get("generator")
    check_steps(steps, 0)
    guidance = Guidance.of(options.get("guidance", Guidance()))
    if pipeline.context_parallel_degree > 1 and generator is None:
        raise ValueError(
            "context parallelism needs a generator of the same seed on every process: their noise would differ"
        )
    callback = options.get("callback_on_step_end")
    inputs = list(options.get("callback_on_step_end_tensor_inputs", ("latents",)))
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        inputs = list(callback.tensor_inputs)
    if not set(inputs) <= set(TENSORS):
        raise ValueError(f"callback_on_step_end_tensor_inputs: expected some of {', '.join(TENSORS)}, got {inputs}")
    pipeline.guidance_scale, pipeline.attention_kwargs = guidance.scale, options.get("attention_kwargs")
    pipeline._interrupt = False
    embeds, negative_embeds = _embeddings(pipeline, prompt, guidance.scale > 1 or also_guided, options)
    if isinstance(generator, list) and len(generator) != len(embeds):
        raise ValueError(f"{len(generator)} generators for {len(embeds)} prompts: expected one, or one for each")
    given = options.get("record")
    record: list[ExpertUse] = [] if given is None else given
    schedule = pipeline.schedule(options.get("shift"), options.get("sampler", CascadeOptions.sampler))
    return Run(embeds, negative_embeds, guidance, steps, schedule, inputs, record, options)


@dataclass(frozen=True)
class RefinementRun:
    """What a refinement starts from, and what it denoises with.

    Attributes:
        pipeline: its refiner denoises, or its only transformer.
        latents: the second stage's, normalised, B x C x t x h x w.
        motion: the first stage's, normalised, B x C x t x h' x w'; None where they are not known.
        skip: steps of the schedule that are skipped, 0 to `run.steps`.
        choose: the expert in force at a timestep, see `expert_chooser`.
        run: prompts, schedule and guidance; `run.record` receives every step.
    """

    pipeline: LuVePipeline
    latents: Tensor
    motion: Tensor | None
    skip: int
    choose: Chooser
    run: Run

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        device: torch.device = self.pipeline._execution_device
        return device

    @property
    def known_motion(self) -> Tensor:
        """The first stage's latents, for a method that needs them.

        Raises:
            ValueError: they are not known.
        """
        if self.motion is None:
            raise ValueError("refinement: this method needs the first stage's latents: give motion=")
        return self.motion

    def noise(self) -> Tensor:
        """Noise of the latents' shape from the run's generator, float32."""
        return randn_tensor(self.latents.shape, self.run.options.get("generator"), self.device, torch.float32)

    def renoised(self) -> tuple[Tensor, Tensor]:
        """The latents noised to the level after the skipped steps of the schedule, which is set here, and the noise."""
        scheduler = self.run.schedule.scheduler
        scheduler.set_timesteps(self.run.steps, device=self.device)
        noise = self.noise()
        if not self.skip:  # the first of UniPC's sigmas is 1 - 1e-6, of which the latents would be a millionth
            return noise, noise
        sigma = scheduler.sigmas[self.skip].to(self.device)
        return noised(self.latents.to(self.device, torch.float32), noise, sigma), noise

    def denoised(self, latents: Tensor, first: int = 0, **more: Any) -> Tensor:
        """Latents denoised by the refiner from the step `first` of the schedule on, see `denoised`."""
        model = self.pipeline.refinement_transformer
        return denoised(self.pipeline, "refined", model, latents, self.run, first, self.choose, **more)


def from_noise(
    pipeline: LuVePipeline, stage: Stage, model: Any, size: Size3d, run: Run, choose: Chooser = None
) -> Tensor:
    """Latents of a video, from pure noise; `size` is frames, height and width in pixels.

    Raises:
        ValueError: for given noise of another size.
    """
    device, codec, latents = pipeline._execution_device, pipeline.codec, run.options.get("noise")
    run.schedule.scheduler.set_timesteps(run.steps, device=device)
    shape = (len(run.embeds), codec.channels, *codec.latent_size(*size))
    if latents is None:
        latents = randn_tensor(shape, run.options.get("generator"), device, torch.float32)
    elif tuple(latents.shape) != shape:
        raise ValueError(f"latents to start from have shape {tuple(latents.shape)}, this video's are {shape}")
    return denoised(pipeline, stage, model, latents.to(device, torch.float32), run, choose=choose)


def check_steps(steps: int, skip: int) -> None:
    """Refuse a schedule without steps, and skipping more steps than it has."""
    if int(steps) != steps or steps < 1:
        raise ValueError(f"steps {steps}: expected an integer >= 1")
    if int(skip) != skip or not 0 <= skip <= steps:
        raise ValueError(f"skip_steps {skip}: expected 0 to {steps}, the number of steps")


def denoised(
    pipeline: LuVePipeline,
    stage: Stage,
    model: Any,
    latents: Tensor,
    run: Run,
    first: int = 0,
    choose: Chooser = None,
    **more: Any,
) -> Tensor:
    """Latents denoised from the step `first` of the run's schedule on; every step is reported.

    The schedule's steps are set, and `latents` noised to that step's level, float32. `more` are further options of
    `denoise`.
    """
    scheduler = run.schedule.scheduler
    timesteps = scheduler.timesteps[first:]
    pipeline.num_timesteps = len(timesteps)
    with pipeline.progress_bar(total=len(timesteps)) as bar:
        bar.set_description(stage)

        def on_step(step: DenoisingStep, tensors: Tensors) -> Tensors | None:
            run.record.append(ExpertUse(stage, step.step, step.timestep, step.sigma, step.expert))
            bar.update()
            callback = run.options.get("callback_on_step_end")
            if callback is None:
                return None
            given: dict[str, Any] = {name: tensors.get(name) for name in run.callback_inputs}
            return callback(pipeline, step.step - first, timesteps[step.step - first], given)

        latents = denoise(
            model,
            scheduler,
            latents,
            timesteps,
            run.embeds,
            run.negative_embeds,
            run.guidance,
            begin_index=first,
            choose_expert=choose,
            on_step=on_step,
            interrupted=lambda: bool(pipeline.interrupt),
            attention_kwargs=run.options.get("attention_kwargs"),
            timestep_dtype=run.schedule.timestep_dtype,
            **more,
        )
    pipeline.maybe_free_model_hooks()
    return latents


def _embeddings(
    pipeline: LuVePipeline, prompt: str | list[str] | None, guided: bool, options: RunOptions
) -> tuple[Tensor, Tensor | None]:
    """Embeddings of prompts and, where something is guided, of negative prompts; given ones are kept."""
    embeds, negative_embeds = options.get("prompt_embeds"), options.get("negative_prompt_embeds")
    negatives = options.get("negative_prompt")
    for name, text, given in (("prompt", prompt, embeds), ("negative_prompt", negatives, negative_embeds)):
        if text is not None and given is not None:
            raise ValueError(f"expected either {name} or {name}_embeds, got both")
        if not isinstance(text, str | list | None):
            raise ValueError(f"{name}: expected a text or a list of texts, got {type(text).__name__}")
    if embeds is None and prompt is None:
        raise ValueError("expected prompt or prompt_embeds, got neither")
    prompts = [prompt] if isinstance(prompt, str) else prompt or []
    count = len(prompts if embeds is None else embeds)
    negatives = negatives or ""
    against = [negatives] * count if isinstance(negatives, str) else negatives
    guided = guided and negative_embeds is None
    if guided and len(against) != count:
        raise ValueError(f"{len(against)} negative prompts for {count} prompts: expected one, or one for each")
    length = options.get("length")
    if embeds is None:
        embeds = pipeline.encode_prompt(prompts, length)
    return embeds, pipeline.encode_prompt(against, length) if guided else negative_embeds
