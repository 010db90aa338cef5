"""The denoising loop that every stage of the cascade shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from luve_lightning.cascade.expert_choice import SpectrumChooser, switch_expert
from luve_lightning.cascade.options import Guidance
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.noise_bands import sigma_of_timestep
from luve_lightning.models.backbones import Denoiser, Schedule, denoiser_of

BeforeStep = Callable[[Tensor, int, float], Tensor]
"""Latents, the step's place in the whole schedule and its sigma to the latents that the step starts from."""
Prediction = Callable[[Callable[[Tensor], Tensor], Tensor, float], Tensor]
"""A step's velocity from the guided model, a function of latents of any size, from the latents and their sigma."""
Tensors = dict[str, Tensor]
"""What a step may look at and replace: "latents", "prompt_embeds" and "negative_prompt_embeds"."""


class DenoisingStep(NamedTuple):
    """A completed denoising step.

    Attributes:
        step: its place in the whole schedule, skipped steps included.
        timestep: the scheduler's own.
        sigma: the scheduler's own.
        expert: the active expert, or None.
        guided: whether guidance applied.
    """

    step: int
    timestep: float
    sigma: float
    expert: str | None
    guided: bool


OnStep = Callable[[DenoisingStep, Tensors], Tensors | None]
"""Called after a step; a tensor that it returns replaces its argument."""


@torch.no_grad()
def denoise(
    transformer: Any,
    scheduler: Any,
    latents: Tensor,
    timesteps: Tensor,
    embeds: Tensor,
    negative_embeds: Tensor | None,
    guidance: Guidance,
    *,
    begin_index: int = 0,
    choose_expert: Callable[[float], str | None] | None = None,
    on_step: OnStep | None = None,
    before_step: BeforeStep | None = None,
    predict: Prediction | None = None,
    interrupted: Callable[[], bool] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    timestep_dtype: torch.dtype | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """Denoise latents from one place in the schedule to its end.

    The arithmetic, and with it every bit of the result, is that of diffusers' own pipelines; with `begin_index` 0
    and no experts the two are equal.

    Args:
        transformer: a backbone's transformer, which predicts velocities. Its experts are switched here, and
            disabled at the end.
        scheduler: after `set_timesteps`, which also clears its memory of an earlier run.
        latents: noised to the first step's sigma, float32, B x C x t x h x w.
        timesteps: timesteps to run: the scheduler's own, from `begin_index` on.
        embeds: embeddings of the prompts, B x length x dim.
        negative_embeds: embeddings that guidance leads away from, same shape; None only where no step is guided.
        guidance: see Guidance.
        begin_index: place of the first step in the schedule.
        choose_expert: the active expert at a timestep, or None. Called with the scheduler's own number, which no
            16-bit cast has rounded into another band. A SpectrumChooser sees each prediction, too.
        on_step: see OnStep.
        before_step: replaces the latents that a step starts from. A scheduler that looks back on earlier steps would
            not see it.
        predict: what a step's velocity is, where it is not the model's for the whole latents.
        interrupted: called before each step; true ends the run.
        attention_kwargs: for the transformer; `{"scale": 0.5}` scales LoRAs.
        timestep_dtype: the schedule's, see Schedule.
        condition: latents that the transformer takes beside its own, see `Denoiser.velocity`; the same in every step.

    Returns:
        float32, B x C x t x h x w.

    Raises:
        ValueError: when steps are guided without negative embeddings.
    """
    numbers, sigmas = timesteps.tolist(), scheduler.sigmas.tolist()
    if negative_embeds is None and any(map(guidance.at, sigmas[begin_index : begin_index + len(numbers)])):
        raise ValueError("guidance needs the embeddings of a negative prompt")
    scheduler.set_begin_index(begin_index)
    denoiser = denoiser_of(transformer)
    watching = choose_expert if isinstance(choose_expert, SpectrumChooser) else None
    if watching is not None:
        watching.begin()
    with _experts(transformer) as switch_to:
        for i, t in enumerate(timesteps):
            if interrupted is not None and interrupted():
                break
            sigma = sigmas[begin_index + i]
            expert = None if choose_expert is None else choose_expert(numbers[i])
            switch_to(expert)
            guided = guidance if guidance.at(sigma) else None
            place = {"step_index": i, "sigma": sigma, "num_inference_steps": len(numbers)}
            # Of the timestep, as for an expert's band: a sampler's timestep may be rounded.
            level = sigma_of_timestep(float(numbers[i]), scheduler.config.num_train_timesteps)
            told = t if timestep_dtype is None else t.to(timestep_dtype).float()
            velocity = partial(
                _velocity, denoiser, t=told, level=level, embeds=embeds, negative_embeds=negative_embeds,
                guidance=guided, place=place, attention_kwargs=attention_kwargs, condition=condition,
            )  # fmt: skip
            if before_step is not None:
                latents = before_step(latents, begin_index + i, sigma)
            v = velocity(latents) if predict is None else predict(velocity, latents, sigma)
            if watching is not None:
                watching.see(sigma, latents.float() - sigma * v.float())
            latents = scheduler.step(v, t, latents, return_dict=False)[0]
            if on_step is not None:
                step = DenoisingStep(begin_index + i, numbers[i], sigma, expert, guided is not None)
                latents, embeds, negative_embeds = _replaced(on_step, step, latents, embeds, negative_embeds)
    return latents


@contextmanager
def _experts(transformer: Any) -> Iterator[Callable[[str | None], None]]:
    """A function that switches to an expert unless it is in force; none is before and after."""
    in_force: str | None = None

    def switch_to(expert: str | None) -> None:
        nonlocal in_force
        if expert != in_force:
            in_force = expert
            switch_expert(transformer, expert)

    switch_expert(transformer, None)
    try:
        yield switch_to
    finally:
        switch_expert(transformer, None)


def _replaced(
    on_step: OnStep, step: DenoisingStep, latents: Tensor, embeds: Tensor, negative_embeds: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Latents and embeddings after a step, of which `on_step` may replace some."""
    tensors: Tensors = {"latents": latents, "prompt_embeds": embeds}
    if negative_embeds is not None:
        tensors["negative_prompt_embeds"] = negative_embeds
    tensors |= on_step(step, tensors) or {}
    return tensors["latents"], tensors["prompt_embeds"], tensors.get("negative_prompt_embeds")


def from_noise(
    transformer: Any,
    schedule: Schedule,
    size: Size3d,
    embeds: Tensor,
    negative_embeds: Tensor | None,
    guidance: Guidance,
    steps: int,
    generator: torch.Generator,
    **options: Any,
) -> Tensor:
    """Latents generated by `denoise` from pure noise, float32, B x C x t x h x w.

    `size` is latent frames, height and width, `generator` that of the noise, and `options` are further ones of
    `denoise`.
    """
    schedule.scheduler.set_timesteps(steps, device=embeds.device)
    shape = (len(embeds), denoiser_of(transformer).channels, *size)
    noise = randn_tensor(shape, generator=generator, device=embeds.device, dtype=torch.float32)
    timesteps = schedule.scheduler.timesteps
    options = {"timestep_dtype": schedule.timestep_dtype} | options
    return denoise(transformer, schedule.scheduler, noise, timesteps, embeds, negative_embeds, guidance, **options)


def _velocity(
    denoiser: Denoiser,
    latents: Tensor,
    t: Tensor,
    level: float,
    embeds: Tensor,
    negative_embeds: Tensor | None,
    guidance: Guidance | None,
    place: dict[str, Any],
    attention_kwargs: dict[str, Any] | None,
    condition: Tensor | None = None,
) -> Tensor:
    """The predicted velocity at one step of noise level `level`; `guidance` is None where it is not guided."""
    dtype = denoiser.dtype
    model_input = latents.to(dtype)

    def predict(name: str, x: Tensor, text: Tensor) -> Tensor:
        with denoiser.module.cache_context(name, **place):
            # Where the model has no values, on the meta device, the timestep is elsewhere.
            times = t.expand(len(x)).to(x.device)
            options: dict[str, Any] = {"sigmas": (level,) * len(x), "attention_kwargs": attention_kwargs}
            if condition is not None:
                options["condition"] = condition.to(dtype).repeat(len(x) // len(condition), 1, 1, 1, 1)
            return denoiser.velocity(x, times, text.to(dtype), **options)

    if guidance is None:
        return predict("cond", model_input, embeds)
    assert negative_embeds is not None
    if guidance.batched:
        both = predict("both", torch.cat([model_input] * 2), torch.cat([embeds, negative_embeds]))
        cond, uncond = both.chunk(2)
    else:
        cond = predict("cond", model_input, embeds)
        uncond = predict("uncond", model_input, negative_embeds)
    return uncond + guidance.scale * (cond - uncond)
