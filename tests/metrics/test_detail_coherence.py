"""Coherence of detail: true detail moves with the scene, noise flickers, or sticks to the screen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.metrics import DetailCoherence
from tests.helpers.scenes import enlarged, noisy, panned, photograph, resized


@pytest.mark.parametrize("move", [(1.3, 0.6), (-4.5, 2.0), (3.0, 0.0)])
@pytest.mark.parametrize("name", ["astronaut", "gravel"])
def test_true_detail_noise_that_flickers_and_noise_that_sticks(name: str, move: tuple[float, float]) -> None:
    metric = DetailCoherence(pairs=3)
    true = panned(name, move, frames=4)
    blurred = enlarged(resized(true, 64), 128)
    moving, flickering, sticking = (
        metric.score(video) for video in (true, noisy(blurred, 8), noisy(blurred, 8, frozen=True))
    )
    assert moving > 0.8
    assert abs(flickering) < 0.15
    assert abs(sticking) < 0.35
    # Noise over true detail takes away its share.
    some, more = (metric.score(noisy(true, deviation)) for deviation in (8, 24))
    assert moving > some > more > flickering


def test_in_a_still_scene_only_flicker_is_incoherent() -> None:
    metric = DetailCoherence(pairs=2)
    still = photograph("astronaut", 96, frames=3)
    assert metric.score(still) == pytest.approx(1, abs=1e-3)
    assert metric.score(noisy(still, 12, frozen=True)) > 0.99
    assert metric.score(noisy(enlarged(resized(still, 48), 96), 12)) < 0.15


def test_the_detail_in_question_can_be_chosen() -> None:
    """The second octave of a video whose first is noise is still coherent."""
    video = noisy(panned("gravel", (1.5, 0.5), frames=3), 10)
    finest, more = (DetailCoherence(pairs=2, cutoff=cutoff).score(video) for cutoff in (0.5, 0.2))
    assert finest < more


def test_nothing_to_cohere_is_zero() -> None:
    assert DetailCoherence().score(torch.full((3, 40, 40, 3), 90, dtype=torch.uint8)) == pytest.approx(0, abs=1e-3)
    assert DetailCoherence().score(torch.full((2, 1, 1, 3), 90, dtype=torch.uint8)) == 0


@settings(max_examples=8, deadline=None)
@given(st.booleans(), st.booleans(), st.sampled_from([0.6, 0.9]))
def test_mirrored_turned_or_darker_is_the_same(mirror: bool, turn: bool, gain: float) -> None:
    video = panned("astronaut", (1.3, 0.6), frames=2, side=64)
    changed = (video * gain).round().to(torch.uint8)
    changed = changed.flip(2) if mirror else changed
    changed = changed.transpose(1, 2) if turn else changed
    assert DetailCoherence().score(changed) == pytest.approx(DetailCoherence().score(video), abs=0.03)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 4))
def test_any_size_and_length(height: int, width: int, frames: int) -> None:
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=generator)
    assert -1 <= DetailCoherence().score(video) <= 1


def test_bad_options_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"^pairs: expected at least 1, got 0$"):
        DetailCoherence(pairs=0)
    with pytest.raises(ValueError, match=r"^cutoff: expected a fraction between 0 and 1, got 1$"):
        DetailCoherence(cutoff=1)
