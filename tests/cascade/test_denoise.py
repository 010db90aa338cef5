"""The denoising loop: guidance, where it begins, and what a step may change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from luve_lightning.cascade import Guidance
from luve_lightning.cascade.denoise import DenoisingStep, denoise
from luve_lightning.functional.noise_bands import noised
from luve_lightning.models.attention import Attention
from luve_lightning.models.attention.dense import Dense
from luve_lightning.models.attention.windows import Windows
from luve_lightning.models.backbones import denoiser_of
from tests.helpers.sampling_sigmas import sampling_sigmas
from tests.helpers.tiny_luve import noise
from tests.helpers.tiny_wan import flow_scheduler, tiny_transformer

SHAPE = (2, 4, 2, 4, 6)
EMBEDS, NEGATIVE = noise(2, 3, 8, seed=1), noise(2, 3, 8, seed=2)


class Counted:
    """A transformer that counts the samples of each forward pass."""

    def __init__(self, **changes: Any) -> None:
        self.net = tiny_transformer(**changes)
        self.batches: list[int] = []
        self.net.register_forward_pre_hook(
            lambda _, __, kwargs: self.batches.append(len(kwargs["hidden_states"])), with_kwargs=True
        )


def run(net: Any, guidance: Guidance, steps: int = 4, scheduler: Any = None, **changes: Any) -> Tensor:
    scheduler = scheduler or flow_scheduler(5.0)
    scheduler.set_timesteps(steps)
    begin = changes.get("begin_index", 0)
    options = {"embeds": EMBEDS, "negative_embeds": NEGATIVE, "guidance": guidance} | changes
    latents = options.pop("latents", noise(*SHAPE))
    return denoise(net, scheduler, latents, scheduler.timesteps[begin:], **options)


def by_hand(net: Any, guided: list[bool], scale: float, begin: int = 0) -> Tensor:
    """Euler steps written out: x += (next sigma - sigma) * v."""
    sigmas = sampling_sigmas(len(guided) + begin, 5.0, scheduler="euler")[begin:]
    x = noise(*SHAPE)
    with torch.no_grad():
        for sigma, following, with_guidance in zip(sigmas[:-1], sigmas[1:], guided, strict=True):
            t = (1000 * sigma).expand(len(x))
            v = net(x, t, EMBEDS, return_dict=False)[0]
            if with_guidance:
                other = net(x, t, NEGATIVE, return_dict=False)[0]
                v = other + scale * (v - other)
            x = x + (following - sigma) * v
    return x


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("low", "high", "guided"),
    [
        (0.0, 1.0, [True] * 4),
        (0.0, 0.5, [False, False, False, True]),
        (0.9, 1.0, [True, True, False, False]),
        (0.6, 0.97, [False, True, True, False]),
        (0.97, 0.98, [False] * 4),
    ],
)
def test_guides_in_an_interval_of_sigma(low: float, high: float, guided: list[bool], batched: bool) -> None:
    counted, steps = Counted(), []
    # Euler's sigmas at 4 steps are 1, 0.91, 0.72 and 0.02 (the last before 0).
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    sigmas = sampling_sigmas(4, 5.0, scheduler="euler")[:-1]
    assert [low <= sigma <= high for sigma in sigmas] == guided
    got = run(counted.net, Guidance(3.0, low, high, batched), scheduler=scheduler, on_step=lambda s, _: steps.append(s))
    torch.testing.assert_close(got, by_hand(tiny_transformer(), guided, 3.0), atol=1e-5, rtol=1e-4)
    assert [step.guided for step in steps] == guided
    one_step = {False: [2], True: [4] if batched else [2, 2]}
    assert counted.batches == [n for g in guided for n in one_step[g]]


@pytest.mark.parametrize("batched", [False, True])
def test_steps_of_high_noise_attend_densely(batched: bool) -> None:
    """Euler's sigmas at 4 steps are 1, 0.91, 0.72 and 0.02: the first two are above 0.8."""

    def latents(attention: Attention) -> list[Tensor]:
        net, found = tiny_transformer(), []
        denoiser_of(net).use_attention(attention)
        run(
            net, Guidance(3.0, batched=batched), scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            on_step=lambda _, tensors: found.append(tensors["latents"]),
        )  # fmt: skip
        return found

    cuts = ((2, 1, 1),)
    dense, sparse, both = (latents(a) for a in (Dense(), Windows(cuts), Windows(cuts, dense_above=0.8)))
    assert torch.equal(both[1], dense[1])
    assert not torch.allclose(both[2], dense[2], atol=1e-4)
    assert not torch.allclose(sparse[0], dense[0], atol=1e-4)


def test_without_guidance_no_negative_prompt_is_needed() -> None:
    net = tiny_transformer()
    want = run(net, Guidance(1.0))
    assert torch.equal(run(net, Guidance(1.0), negative_embeds=None), want)
    assert torch.equal(run(net, Guidance(5.0, 0.0, 0.001), negative_embeds=None), want)
    with pytest.raises(ValueError, match="guidance needs the embeddings of a negative prompt"):
        run(net, Guidance(1.1), negative_embeds=None)


@pytest.mark.parametrize("begin", [1, 3])
def test_begins_in_the_middle_as_a_schedule_of_its_own_would(begin: int) -> None:
    """UniPC's first step there is its first step anywhere: first order, without a corrector."""
    net, scheduler = tiny_transformer(), flow_scheduler(5.0)
    run(net, Guidance(2.0), 4, scheduler)  # what it remembers of this must not matter
    got = run(net, Guidance(2.0), 4, scheduler, begin_index=begin)
    fresh = flow_scheduler(5.0)
    fresh.set_timesteps(4)
    x, sigmas = noise(*SHAPE), sampling_sigmas(4, 5.0)[begin:]
    fresh.sigmas, fresh.timesteps, fresh.num_inference_steps = sigmas, fresh.timesteps[begin:], 4 - begin
    with torch.no_grad():
        for t in fresh.timesteps:
            v, other = (net(x, t.expand(2), e, return_dict=False)[0] for e in (EMBEDS, NEGATIVE))
            x = fresh.step(other + 2.0 * (v - other), t, x, return_dict=False)[0]
    torch.testing.assert_close(got, x, atol=1e-6, rtol=1e-5)


def test_each_step_is_told() -> None:
    seen: list[DenoisingStep] = []
    run(tiny_transformer(), Guidance(2.0), begin_index=1, on_step=lambda step, _: seen.append(step))
    assert [step.step for step in seen] == [1, 2, 3]
    assert [step.timestep for step in seen] == [937, 833, 625]
    assert [step.sigma for step in seen] == sampling_sigmas(4, 5.0)[1:-1].tolist()
    assert {(step.expert, step.guided) for step in seen} == {(None, True)}


def test_a_step_may_replace_tensors() -> None:
    """After the first of two Euler steps: zeros instead of its latents, the negative prompt instead of the prompt."""
    net, scheduler = tiny_transformer(), FlowMatchEulerDiscreteScheduler(shift=5.0)

    def on_step(step: DenoisingStep, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        assert set(tensors) == {"latents", "prompt_embeds", "negative_prompt_embeds"}
        if step.step:
            return None
        zeros = torch.zeros_like(tensors["latents"])
        return {"latents": zeros, "prompt_embeds": tensors["negative_prompt_embeds"]}

    got = run(net, Guidance(2.0), 2, scheduler, on_step=on_step)
    sigma = sampling_sigmas(2, 5.0, scheduler="euler")[1]
    with torch.no_grad():
        v = net(torch.zeros(SHAPE), (1000 * sigma).expand(2), NEGATIVE, return_dict=False)[0]
    torch.testing.assert_close(got, -sigma * v, atol=1e-6, rtol=1e-5)


def test_can_be_interrupted() -> None:
    net, seen = tiny_transformer(), []
    got = run(
        net,
        Guidance(1.0),
        on_step=lambda _, tensors: seen.append(tensors["latents"]),
        interrupted=lambda: len(seen) == 2,
    )
    assert len(seen) == 2
    assert torch.equal(got, seen[1])


def test_the_same_noise_level_as_noised() -> None:
    """The scheduler's sigmas are those of flow matching: noise is removed where it was added."""
    x0 = noise(1, 4, 1, 4, 4)
    scheduler = flow_scheduler(5.0)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    want = scheduler.add_noise(x0, noise(*x0.shape, seed=3), scheduler.timesteps[4:5])
    got = noised(x0, noise(*x0.shape, seed=3), scheduler.sigmas[4])
    torch.testing.assert_close(got, want)
