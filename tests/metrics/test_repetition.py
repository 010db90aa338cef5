"""Repetition of made pictures: tiles repeat; photographs, blurred ones, textures and flat ones do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luve_lightning.metrics import Repetition
from tests.helpers.scenes import enlarged, noisy, photograph, resized

PHOTOGRAPHS = ("astronaut", "cat", "rocket")


def tiled(name: str, times: int) -> Tensor:
    return photograph(name, 192 // times).repeat(1, times, times, 1)


def flat(level: int = 99) -> Tensor:
    return torch.full((1, 192, 192, 3), level, dtype=torch.uint8)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_tiled_picture_repeats_and_a_photograph_does_not(name: str) -> None:
    metric = Repetition()
    picture = photograph(name)
    assert metric.score(picture) < 0.2
    assert metric.score(enlarged(resized(picture, 24), 192)) < 0.25  # blurred
    for times in (2, 3, 4):
        assert metric.score(tiled(name, times)) > 0.85


def test_an_object_that_multiplies() -> None:
    picture = photograph("cat").clone()
    metric = Repetition()
    scores = [metric.score(picture)]
    thing = picture[:, 64:128, 64:128].clone()
    for top, left in ((8, 8), (120, 110), (4, 120)):
        picture[:, top : top + 64, left : left + 64] = thing
        scores.append(metric.score(picture))
    assert scores == sorted(scores)
    assert scores[1] > 2 * scores[0]
    assert scores[-1] > 4 * scores[0]


def test_symmetric_things_repeat_too() -> None:
    y, x = torch.meshgrid(torch.arange(192.0), torch.arange(192.0), indexing="ij")
    discs = 200 * (((y % 64) - 32) ** 2 + ((x % 64) - 32) ** 2 < 20**2)
    assert Repetition().score(discs[None, ..., None].expand(-1, -1, -1, 3).to(torch.uint8)) > 0.95
    one = 200 * ((y - 96) ** 2 + (x - 96) ** 2 < 60**2)
    assert Repetition().score(one[None, ..., None].expand(-1, -1, -1, 3).to(torch.uint8)) < 0.05


def test_smooth_flat_and_even_content_is_none() -> None:
    metric = Repetition()
    assert metric.score(flat()) == 0
    ramp = torch.linspace(20, 230, 192).round()[:, None, None].expand(1, 192, 192, 3).to(torch.uint8)
    assert metric.score(ramp) < 0.01
    assert metric.score(noisy(flat(), 30)) < 0.05
    assert metric.score(photograph("gravel")) < 0.1
    edge = torch.zeros_like(flat())
    edge[:, 90:] = 200  # like itself all along
    assert metric.score(edge) < 0.02


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(PHOTOGRAPHS), st.sampled_from([0.6, 0.8]), st.booleans(), st.integers(1, 3))
def test_contrast_mirroring_and_length_change_little(name: str, gain: float, mirror: bool, frames: int) -> None:
    metric = Repetition()
    for picture in (photograph(name), tiled(name, 3)):
        changed = (picture * gain).round().to(torch.uint8)
        changed = changed.flip(1) if mirror else changed
        assert metric.score(changed.expand(frames, -1, -1, -1)) == pytest.approx(metric.score(picture), abs=0.06)


def test_the_frames_size_matters_little() -> None:
    """Also where patches are looked through in parts, as at 4K."""
    metric = Repetition()
    for picture in (photograph("astronaut", 400), tiled("astronaut", 2)):
        assert metric.score(resized(picture, 288)) == pytest.approx(metric.score(picture), abs=0.06)
    wide = torch.cat([tiled("astronaut", 2)] * 2, 2)
    assert metric.score(wide) > 0.85


def test_queries_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = photograph("cat")
    whole = Repetition().score(picture)
    monkeypatch.setattr("luve_lightning.metrics.repetition._VALUES_AT_ONCE", 7000)
    assert Repetition().score(picture) == pytest.approx(whole, rel=1e-5)


def test_bad_options_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"^frames: expected at least 1, got 0$"):
        Repetition(frames=0)
    with pytest.raises(ValueError, match=r"^side: expected at least 96 pixels, three patches, got 64$"):
        Repetition(side=64)
