"""Schedules: DiffSynth-Studio's Euler steps to the bit, and a shift that is followed or refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from luve_lightning.cascade import Guidance
from luve_lightning.cascade.denoise import denoise, from_noise
from luve_lightning.functional.noise_bands import shift_sigma
from luve_lightning.models.backbones import Schedule
from luve_lightning.models.backbones.base import EulerSchedule, FlowMatchLinearEuler
from tests.helpers.tiny_luve import noise
from tests.helpers.tiny_wan import flow_scheduler, tiny_transformer

SHAPE = (2, 4, 2, 4, 6)
EMBEDS, NEGATIVE = noise(2, 3, 8, seed=1), noise(2, 3, 8, seed=2)


def euler(shift: float = 5.0) -> Schedule:
    """Beside UniPC, as it is chosen for Wan."""
    return Schedule(flow_scheduler(3.0)).sampled_by("euler", shift)


def diffsynth(steps: int, shift: float) -> Tensor:
    """The sigmas of DiffSynth-Studio's FlowMatchScheduler(sigma_min=0, extra_one_step=True)."""
    sigmas = torch.linspace(1.0, 0.0, steps + 1)[:-1]
    return shift * sigmas / (1 + (shift - 1) * sigmas)


@given(steps=st.integers(1, 1000), shift=st.floats(0.5, 20))
def test_the_levels_are_diffsynths_to_the_bit(steps: int, shift: float) -> None:
    scheduler = euler(shift).scheduler
    scheduler.set_timesteps(steps)
    want = diffsynth(steps, shift)
    assert torch.equal(scheduler.sigmas, torch.cat([want, torch.zeros(1)]))
    assert torch.equal(scheduler.timesteps, want * 1000)
    exact = [shift_sigma(1 - i / steps, shift) for i in range(steps)]
    torch.testing.assert_close(want, torch.tensor(exact), atol=2e-6, rtol=2e-6)
    assert euler(shift).steps(steps) == list(zip((want * 1000).tolist(), want.tolist(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("begin", [0, 3])
def test_a_run_is_diffsynths_plain_loop_to_the_bit(dtype: torch.dtype, begin: int) -> None:
    """Its timesteps are in bfloat16, also for a float32 transformer; latents are in float32 here."""
    net, schedule, steps, shift, scale = tiny_transformer().to(dtype), euler(), 10, 5.0, 3.0

    def run(timestep_dtype: torch.dtype | None) -> Tensor:
        schedule.scheduler.set_timesteps(steps)
        return denoise(
            net, schedule.scheduler, noise(*SHAPE), schedule.scheduler.timesteps[begin:], EMBEDS, NEGATIVE,
            Guidance(scale), begin_index=begin, timestep_dtype=timestep_dtype,
        )  # fmt: skip

    got = run(schedule.timestep_dtype)
    sigmas, latents = diffsynth(steps, shift), noise(*SHAPE)
    with torch.no_grad():
        for i in range(begin, steps):
            timestep = (1000 * sigmas[i]).to(torch.bfloat16).float().expand(2)
            v, other = (
                net(latents.to(dtype), timestep, text.to(dtype), return_dict=False)[0] for text in (EMBEDS, NEGATIVE)
            )
            following = sigmas[i + 1] if i + 1 < steps else 0
            latents = latents + (other + scale * (v - other)).float() * (following - sigmas[i])
    assert got.dtype == torch.float32
    assert torch.equal(got, latents)
    assert not torch.equal(got, run(None)), "rounded timesteps make no difference"


def test_a_run_from_noise_takes_the_schedules_rounding() -> None:
    net, schedule, seen = tiny_transformer(), euler(), []
    net.register_forward_pre_hook(lambda _, __, given: seen.append(given["timestep"][0].item()), with_kwargs=True)
    from_noise(net, schedule, (1, 4, 4), EMBEDS, None, Guidance(1.0), 7, torch.Generator().manual_seed(0))
    rounded = (1000 * diffsynth(7, 5.0)).bfloat16()
    assert seen == rounded.tolist()
    assert seen != schedule.scheduler.timesteps.tolist()


def test_experts_are_chosen_before_the_timestep_is_rounded() -> None:
    """876.2 is 876 in bfloat16 and 874.6 too: the published bands meet at 875."""
    told: list[float] = []
    net, schedule = tiny_transformer(), euler()
    schedule.scheduler.set_timesteps(50)

    def choose(timestep: float) -> None:
        told.append(timestep)

    denoise(
        net, schedule.scheduler, noise(*SHAPE), schedule.scheduler.timesteps, EMBEDS, None, Guidance(1.0),
        choose_expert=choose, timestep_dtype=schedule.timestep_dtype,
    )  # fmt: skip
    assert told == (1000 * diffsynth(50, 5.0)).tolist()
    # LuVe's 11 and 29 steps of 50 after 10 skipped ones.
    assert (sum(t >= 875 for t in told[10:]), sum(t < 875 for t in told[10:])) == (11, 29)


def test_the_backbones_own_sampler_is_untouched() -> None:
    own = Schedule(flow_scheduler(5.0))
    assert own.sampled_by("backbone") is own
    shifted = own.sampled_by("backbone", 3.0)
    assert type(shifted.scheduler) is UniPCMultistepScheduler
    assert shifted.steps(9) == Schedule(flow_scheduler(3.0)).steps(9)
    assert shifted.timestep_dtype is None
    taken = own.sampled_by("euler")
    assert isinstance(taken, EulerSchedule)
    assert (taken.shift, taken.train_timesteps, taken.remembered) == (5.0, 1000, 0)
    unipc = [sigma for _, sigma in own.steps(50)]
    apart = max(abs(a - b) for a, (_, b) in zip(unipc, taken.steps(50), strict=True))
    assert 0.004 < apart < 0.0043


class FlowMatchDeaf(FlowMatchEulerDiscreteScheduler):
    """Takes a shift and does not use it."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.sigmas = torch.linspace(1, 0, num_inference_steps + 1)
        self.timesteps = 1000 * self.sigmas[:-1]


class FlowMatchWithout(FlowMatchEulerDiscreteScheduler):
    """Has no shift."""

    def __init__(self) -> None:
        self.register_to_config(num_train_timesteps=1000)


UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
IGNORING = [
    (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "does not follow it with use_dynamic_shifting"),
    (FlowMatchLCMScheduler(use_dynamic_shifting=True), "does not follow it with use_dynamic_shifting"),
    (UniPCMultistepScheduler(**UNIPC, use_dynamic_shifting=True), "does not follow it with use_dynamic_shifting"),
    (UniPCMultistepScheduler(**UNIPC, use_karras_sigmas=True), "does not follow it with use_karras_sigmas"),
    (UniPCMultistepScheduler(**UNIPC, use_beta_sigmas=True), "does not follow it with use_beta_sigmas"),
    (FlowMatchDeaf(), "has the same noise levels at any"),
    (FlowMatchWithout(), "has neither flow_shift nor shift"),
]


@pytest.mark.parametrize(("scheduler", "why"), IGNORING)
def test_a_shift_that_would_be_ignored_is_refused(scheduler: Any, why: str) -> None:
    schedule = Schedule(scheduler)
    assert schedule.sampled_by("backbone") is schedule, "nothing is asked of it"
    message = f"shift: the backbone's scheduler, {type(scheduler).__name__}, {why}; expected one that follows it"
    for ask in (lambda: schedule.shifted(5.0), lambda: schedule.sampled_by("backbone", 5.0)):
        with pytest.raises(ValueError, match=message) as error:
            ask()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):  # the shift to step by is unknown
        schedule.sampled_by("euler")
    assert schedule.sampled_by("euler", 5.0).steps(4) == euler().steps(4)


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="sampler: expected one of backbone, euler, got 'heun'"):
        Schedule(flow_scheduler(5.0)).sampled_by("heun")  # type: ignore[arg-type]


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_shift_is_refused(shift: float) -> None:
    for sampler in ("backbone", "euler"):
        with pytest.raises(ValueError, match="shift: expected a number greater than 0, got"):
            Schedule(flow_scheduler(5.0)).sampled_by(sampler, shift)  # type: ignore[arg-type]


def test_other_flow_schedulers_follow_their_shift() -> None:
    for scheduler in (FlowMatchEulerDiscreteScheduler(), FlowMatchLCMScheduler(), FlowMatchLinearEuler()):
        assert Schedule(scheduler).shifted(4.0).shift == 4.0
