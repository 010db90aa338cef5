"""What the stages of one run of LuVePipeline share, and what a run returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from luve_lightning.cascade.options import Guidance

Stage = Literal["motion", "upsampled", "refined", "direct"]
VideoType = Literal["latent", "np", "pt", "pil"]
Generators = torch.Generator | list[torch.Generator] | None


class ExpertUse(NamedTuple):
    """A denoising step and the expert that was in force.

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


class RunOptions(TypedDict, total=False):
    """Options of every stage that denoises.

    Attributes:
        negative_prompt: one for all, or one for each prompt; "" by default.
        prompt_embeds: B x length x dim, instead of prompts.
        negative_prompt_embeds: likewise.
        steps: of the whole schedule, >= 1; by default those of CascadeOptions, as `guidance`.
        guidance: a Guidance, or its scale.
        shift: of the schedule; the backbone's own by default.
        generator: one, or one for each prompt. It is drawn from once for the motion's noise and then once for the
            refinement's, each of the size of its latents: who calls the stages one by one with the same generator
            gets what a single call gives. By default PyTorch's own.
        attention_kwargs: of the transformer; `{"scale": 0.5}` scales LoRAs.
        callback_on_step_end: as diffusers' pipelines have it: called with the pipeline, the step's number within the
            stage, its timestep and a dictionary of tensors, of which it returns those that it replaces.
        callback_on_step_end_tensor_inputs: which tensors; ["latents"] by default.
        length: tokens of a prompt, padding included; by default the tokenizer's own, at most 512.
        record: a list to which every step is appended.
    """

    negative_prompt: str | list[str] | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    steps: int
    guidance: Guidance | float
    shift: float | None
    generator: Generators
    attention_kwargs: dict[str, Any] | None
    callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    length: int | None
    record: list[ExpertUse] | None


@dataclass
class Run:
    """What `LuVePipeline` made of prompts and RunOptions.

    Attributes:
        embeds: of the prompts.
        negative_embeds: None without guidance.
        guidance: see RunOptions, as the following ones.
        steps: of the whole schedule.
        scheduler: before `set_timesteps`.
        generator: see RunOptions.
        attention_kwargs: see RunOptions.
        callback: see RunOptions.
        callback_inputs: see RunOptions.
        record: every step so far.
    """

    embeds: Tensor
    negative_embeds: Tensor | None
    guidance: Guidance
    steps: int
    scheduler: Any
    generator: Generators
    attention_kwargs: dict[str, Any] | None
    callback: Callable[..., dict[str, Tensor] | None] | None
    callback_inputs: Sequence[str]
    record: list[ExpertUse]


@dataclass
class LuVePipelineOutput(BaseOutput):
    """What `LuVePipeline` returns.

    Attributes:
        frames: see `LuVePipeline.decode`.
        stages: latents by stage, "motion", "upsampled" and "refined", or "direct"; None unless they were asked for.
        experts_used: every denoising step in order.
    """

    frames: Tensor | np.ndarray | list[list[Any]]
    stages: dict[str, Tensor] | None = None
    experts_used: list[ExpertUse] | None = None
