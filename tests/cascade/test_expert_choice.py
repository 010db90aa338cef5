"""Which expert is in force at which step, LuVe's published schedule above all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.cascade import ExpertUse, LuVePipeline
from luve_lightning.cascade.expert_choice import expert_chooser, moved_band, selected_experts
from luve_lightning.cascade.stages import refine
from luve_lightning.functional.noise_bands import SigmaBand
from tests.helpers.tiny_luve import EXPERTS, PROMPT, add_experts, noise, seeded, tiny_luve
from tests.helpers.tiny_wan import HFE, LFE, tiny_transformer


@pytest.fixture(scope="module")
def transformer() -> Any:
    net = tiny_transformer()
    add_experts(net, EXPERTS)
    return net


@pytest.fixture(scope="module")
def pipeline(tiny_backbone: Path) -> LuVePipeline:
    return tiny_luve(tiny_backbone, EXPERTS)


def used(pipeline: LuVePipeline, **options: Any) -> list[ExpertUse]:
    record: list[ExpertUse] = []
    latents = noise(1, 16, 1, 2, 2)
    refine(pipeline, latents, PROMPT, guidance=1.0, generator=seeded(), record=record, **options)
    return record


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_published_schedule(tiny_backbone: Path, dtype: torch.dtype) -> None:
    """50 steps, shift 5, 10 skipped: 11 steps of the LFE and 29 of the HFE, in bfloat16 as well."""
    pipeline = tiny_luve(tiny_backbone, EXPERTS)
    pipeline.transformer.to(dtype)
    record = used(pipeline, skip_steps=10)
    assert [use.expert for use in record] == ["lfe"] * 11 + ["hfe"] * 29
    assert [use.step for use in record] == list(range(10, 50))
    assert {use.stage for use in record} == {"refined"}
    pipeline.scheduler.set_timesteps(50)
    assert [use.timestep for use in record] == pipeline.scheduler.timesteps[10:].tolist()
    assert [use.sigma for use in record] == pipeline.scheduler.sigmas[10:-1].tolist()
    assert all((use.expert == "lfe") == (use.timestep >= 875) for use in record)


def test_no_cast_moves_a_timestep_to_the_other_expert(tiny_backbone: Path) -> None:
    """833 is 832 in bfloat16, below a switch at 0.833."""
    assert float(torch.tensor(833).bfloat16()) == 832
    pipeline = tiny_luve(tiny_backbone, EXPERTS)
    pipeline.transformer.to(torch.bfloat16)
    record = used(pipeline, skip_steps=0, steps=4, switch=0.833)
    assert [(use.timestep, use.expert) for use in record] == [(999, "lfe"), (937, "lfe"), (833, "lfe"), (625, "hfe")]


@given(timestep=st.integers(0, 1000))
def test_bands_share_their_bound(transformer: Any, timestep: int) -> None:
    choose = expert_chooser(transformer)
    assert choose is not None
    assert choose(timestep) == ("lfe" if timestep >= 875 else "hfe")


@given(switch=st.floats(0.01, 0.99), timestep=st.floats(0, 1000))
def test_a_switch_moves_it(transformer: Any, switch: float, timestep: float) -> None:
    choose = expert_chooser(transformer, switch=switch)
    assert choose is not None
    assert choose(timestep) == ("lfe" if np.float32(timestep / 1000) >= np.float32(switch) else "hfe")


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        ("all", ["lfe", "lfe", "hfe", "hfe"]),
        ("none", [None] * 4),
        ("lfe", ["lfe", "lfe", None, None]),
        ("hfe", [None, None, "hfe", "hfe"]),
        (["hfe", "lfe"], ["lfe", "lfe", "hfe", "hfe"]),
        ([], [None] * 4),
    ],
)
def test_experts_can_be_left_out(pipeline: LuVePipeline, experts: str | list[str], expected: list[str | None]) -> None:
    record = used(pipeline, skip_steps=0, steps=4, experts=experts)  # 999, 937, 833, 625
    assert [use.expert for use in record] == expected
    with_switch = used(pipeline, skip_steps=2, steps=4, experts=experts, switch=0.7)
    assert [use.expert for use in with_switch] == [expected[0], expected[3]]  # sigma 0.833, 0.625


def test_a_band_may_leave_steps_without_expert() -> None:
    net = tiny_transformer()
    add_experts(net, {"narrow": replace(LFE, band=SigmaBand(0.4, 0.6))})
    choose = expert_chooser(net)
    assert choose is not None
    assert [choose(t) for t in (600, 599, 400, 399)] == [None, "narrow", "narrow", None]
    with pytest.raises(ValueError, match=r"expert narrow has the band 0.4 to 0.6, where it has no place"):
        expert_chooser(net, switch=0.5)


def test_what_is_impossible_is_refused(transformer: Any) -> None:
    with pytest.raises(ValueError, match="no expert 'x': expected all, none or some of lfe, hfe"):
        expert_chooser(transformer, ["lfe", "x"])
    with pytest.raises(ValueError, match=r"some of \(there are none\)"):
        selected_experts(tiny_transformer(), "lfe")
    assert expert_chooser(tiny_transformer()) is None
    for switch in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="expected a sigma between 0 and 1"):
            expert_chooser(transformer, switch=switch)
    with pytest.raises(ValueError, match="expert a has the band 0 to 1"):
        moved_band("a", SigmaBand(), 0.5)
    both = tiny_transformer()
    add_experts(both, {"a": LFE, "b": replace(HFE, band=SigmaBand(0, 0.9))})
    with pytest.raises(ValueError, match=r"experts a and b: their bands of sigma, 0.875 to 1 and 0 to 0.9, overlap"):
        expert_chooser(both)
    assert expert_chooser(both, "b") is not None
