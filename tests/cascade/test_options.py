"""The options of a cascade: what they refuse, the sizes that follow from them, and the names of what was stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.cascade import CascadeOptions, Guidance
from luve_lightning.cascade.generation_jobs import VideoJob
from luve_lightning.cascade.generation_run import last_latents_name, latents_name
from luve_lightning.models.backbones import SizeRules

RULES = SizeRules(16, 4)


def test_both_ends_of_the_interval_belong_to_it_in_float32() -> None:
    sigma = float(np.float32(0.3))  # 0.300000012
    assert Guidance(2.0, 0.3, 0.3).at(sigma)
    assert not Guidance(2.0, 0.0, 0.2999).at(sigma)
    assert not Guidance(2.0, 0.3001, 1.0).at(sigma)
    assert not Guidance(1.0).at(0.5)


@given(scale=st.floats(1, 20), low=st.floats(0, 1), high=st.floats(0, 1), sigma=st.floats(0, 1, width=32))
def test_a_guidance_is_valid_or_refused(scale: float, low: float, high: float, sigma: float) -> None:
    if low > high:
        with pytest.raises(ValueError, match="expected 0 <= low <= high <= 1"):
            Guidance(scale, low, high)
        return
    guided = Guidance(scale, low, high).at(sigma)
    if scale == 1 or sigma > high + 1e-6 or sigma < low - 1e-6:
        assert not guided
    elif low <= sigma <= high:
        assert guided


@pytest.mark.parametrize("changes", [{"scale": 0.5}, {"scale": float("inf")}, {"low": -0.1}, {"high": 1.1}])
def test_an_impossible_guidance_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="guidance "):
        Guidance(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps 0 and skip_steps 5: expected at least 1 step"),
        ({"skip_steps": 51}, "steps 50 and skip_steps 51: expected .* 0 to all skipped"),
        ({"skip_steps": -1}, "skip_steps -1"),
        ({"scale": 0.0}, "scale: expected a number > 0, got 0.0"),
        ({"length": 0}, "length: expected at least 1 token, got 0"),
        ({"switch": 1.0}, "switch: expected a sigma between 0 and 1, got 1.0"),
        ({"shift": -1.0}, "shift: expected a number greater than 0, got -1.0"),
        ({"sampler": "heun"}, "sampler: expected one of backbone, euler, got 'heun'"),
        ({"upsampling": "lanczos"}, "upsampling: expected one of .*nearest, .* got 'lanczos'"),
    ],
)
def test_impossible_options_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        CascadeOptions(192, 192, **changes)
    assert "\n" not in str(error.value)


def test_without_a_cascade_nothing_is_skipped() -> None:
    assert CascadeOptions(192, 192, cascade=False, steps=3).resolved(RULES).motion == (49, 192, 192)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(1, 8))
def test_sizes_that_follow_are_possible_and_final(rows: int, columns: int, scale: float) -> None:
    options = CascadeOptions(16 * rows, 16 * columns, scale=scale).resolved(RULES)
    assert options.size == (49, 16 * rows, 16 * columns)
    RULES.check(49, height=options.motion[1], width=options.motion[2])
    assert abs(options.motion[1] - 16 * rows / scale) <= 8 or options.motion[1] == 16
    assert options.resolved(RULES) == options


def test_names_and_recipes_are_those_of_runs_stored_before() -> None:
    """Computed by the code before options were one object: such latents and videos must be found, not made again."""
    guidance = Guidance(4.0, 0.1, 0.9, batched=True)
    options = CascadeOptions(
        192, 256, 17, 96, 128, upsampling="latent", steps=20, skip_steps=4, guidance=guidance,
        refine_guidance=Guidance(3.0), shift=3.0, switch=0.8, length=16,
    )  # fmt: skip
    job = VideoJob("name", "a red boat", "blur", 7, 192, 256, 96, 128, 17)
    identity = {
        "dtype": "float32",
        "cache": {"name": "first_block", "cache_threshold": 0.05},
        "models": {"backbone": "sha256:1", "vluer": "sha256:2", "lora": "sha256:3"},
    }
    motion = latents_name("motion", job, options, identity)
    assert motion == "e826555828ee72b57656f4221c0e5201e68c4f519f0a1f211223acdec0e7ef15"
    upsampled = latents_name("upsampled", job, options, identity)
    assert upsampled == "04433f8a5fdb23ba3e8043937c07296b28ff3874a75d096a5c9df3cac54a1dab"
    assert latents_name("refined", job, options, identity) is None
    last = last_latents_name("refined", job, options, identity)
    assert last == last_latents_name("refined", job, options, {**identity, "fps": 8, "decode_half": True})
    sampled = replace(options, sampler="euler")
    assert sampled.recipe() == options.recipe() | {"sampler": "euler"}
    assert len({motion, latents_name("motion", job, sampled, identity)}) == 2
    assert len({upsampled, latents_name("upsampled", job, sampled, identity)}) == 2
    others = [
        last_latents_name("refined", job, sampled, identity),
        last_latents_name("refined", job, replace(options, skip_steps=5), identity),
        last_latents_name("refined", replace(job, seed=8), options, identity),
        last_latents_name("refined", job, options, {**identity, "dtype": "bfloat16"}),
    ]
    assert len({last, *others}) == 5
    assert options.recipe() == {
        "upsampling": "latent",
        "cascade": True,
        "steps": 20,
        "skip_steps": 4,
        "guidance": {"scale": 4.0, "low": 0.1, "high": 0.9},
        "refine_guidance": {"scale": 3.0, "low": 0.0, "high": 1.0},
        "shift": 3.0,
        "switch": 0.8,
        "length": 16,
    }
