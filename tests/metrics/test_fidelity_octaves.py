"""Detail of one octave against the original's: decades, by construction."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luve_lightning.metrics import OctaveDetail
from tests.helpers.scenes import enlarged, noisy, photograph, resized


def grey(side: int = 64, frames: int = 6) -> Tensor:
    return torch.full((frames, side, side, 3), 128, dtype=torch.uint8)


def test_ten_times_the_power_is_one_decade_in_every_octave() -> None:
    strong, weak = noisy(grey(), 30), noisy(grey(), 30 / 10**0.5)
    for octave in (1, 2, 3):
        metric = OctaveDetail(octave)
        assert metric.name == f"detail_octave_{octave}"
        assert metric.score(strong, weak) == pytest.approx(1, abs=0.03)
        assert metric.score(weak, strong) == -metric.score(strong, weak)
        assert metric.score(strong, strong) == 0


def test_a_grating_is_in_its_own_octave() -> None:
    x = torch.arange(64)
    stripes = [(40 * torch.cos(2 * math.pi * cycles / 64 * x))[:, None] for cycles in (24, 12, 6)]
    plain = noisy(grey(), 10)
    for octave, pattern in enumerate(stripes, 1):
        video = (plain + pattern).round().clamp(0, 255).to(torch.uint8)
        excess = [OctaveDetail(other).score(video, plain) for other in (1, 2, 3)]
        assert max(excess) == excess[octave - 1] > 0.5
        assert sum(abs(value) < 0.05 for value in excess) == 2


def test_enlarging_lacks_the_octave_that_was_lost() -> None:
    true = photograph("astronaut")
    missing = [OctaveDetail(octave).score(enlarged(resized(true, 96), 192), true) for octave in (1, 2, 3)]
    assert missing[0] < -0.5
    assert missing[0] < missing[1] < missing[2] < 0.01
    sharp = noisy(true, 20)
    assert OctaveDetail(1).score(sharp, true) > OctaveDetail(2).score(sharp, true) > 0


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(8, 40), st.integers(8, 40), st.integers(1, 3))
def test_any_size_and_length(octave: int, height: int, width: int, frames: int) -> None:
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8, generator=generator)
    flat = torch.full_like(video, 7)
    metric = OctaveDetail(octave)
    once = metric.score(video, flat)
    assert 2 < once < 6
    again = video.expand(frames, -1, -1, -1)
    assert metric.score(again, flat.expand_as(again)) == pytest.approx(once, rel=1e-6)


def test_bad_input_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^octave: expected at least 1, the finest, got 0$"):
        OctaveDetail(0)
    small = torch.zeros(1, 6, 9, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^detail_octave_4: frames of 6x9 have no such octave, the last is 3$"):
        OctaveDetail(4).score(small, small)
    assert OctaveDetail(3).score(small, small) == 0
