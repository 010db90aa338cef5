"""Training crops: windows of the same picture at both resolutions, at the size asked for, with their own pixels."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.datamodules import LatentPairsDataModule
from luve_lightning.datamodules.latent_crops import CropRule, aligned_windows
from luve_lightning.datamodules.latent_pairs import WholeLatentPairs
from luve_lightning.datamodules.sampling import SampleKey

SCALES = [1.5, 2.0, 3.0]
At = Literal["high", "low"]
Frames = Literal["random", "first"]


@given(
    scale=st.sampled_from([1.5, 2.0, 3.0, 1.25, 4.0]),
    units=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    crop=st.tuples(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8)),
    at=st.sampled_from(["high", "low"]),
    start=st.sampled_from(["random", "first"]),
    frames=st.integers(1, 7),
    seed=st.integers(0, 2**31),
)
def test_windows_cover_the_same_picture(
    scale: float, units: tuple[int, int], crop: tuple[int, int, int], at: At, start: Frames, frames: int, seed: int
) -> None:
    ratio = Fraction(scale).limit_denominator(100)
    p, q = ratio.numerator, ratio.denominator
    shape = (frames, units[0] * p, units[1] * p)
    unit = p if at == "high" else q
    rule = CropRule((crop[0], crop[1] * unit, crop[2] * unit), at, start)
    rule.check(scale)
    high, low = aligned_windows(shape, rule, scale, np.random.default_rng(seed))
    assert high[0] == low[0]
    assert start == "random" or high[0][0] == 0
    assert high[0][1] - high[0][0] == min(crop[0], frames)
    for axis in (1, 2):
        assert 0 <= high[axis][0] < high[axis][1] <= shape[axis]
        # As large as was asked for, or as the clip is: p high latents for q low ones.
        assert high[axis][1] - high[axis][0] == min(crop[axis], units[axis - 1]) * p
        assert low[axis][1] - low[axis][0] == min(crop[axis], units[axis - 1]) * q
        for a, b in zip(high[axis], low[axis], strict=True):
            assert Fraction(a) == ratio * b


@given(scale=st.sampled_from(SCALES), seed=st.integers(0, 2**31))
def test_the_recipes_crops_are_64_low_resolution_latents_at_each_scale(scale: float, seed: int) -> None:
    """In the clips of experiments/vluer/wan2.1.yaml: 49 x 1536 x 2688 pixels."""
    high, low = aligned_windows((13, 192, 336), CropRule((11, 64, 64), "low"), scale, np.random.default_rng(seed))
    assert [stop - start for start, stop in low] == [11, 64, 64]
    assert [stop - start for start, stop in high] == [11, 64 * scale, 64 * scale]


@pytest.mark.parametrize(("at", "side"), [("high", 6), ("low", 4)])
def test_every_position_is_drawn(at: At, side: int) -> None:
    rule = CropRule((1, side, side), at)
    starts = {aligned_windows((2, 12, 12), rule, 1.5, np.random.default_rng(i))[0] for i in range(300)}
    assert {window[1][0] for window in starts} == {0, 3, 6}
    assert {window[0][0] for window in starts} == {0, 1}


def test_a_crop_that_does_not_align_is_refused() -> None:
    with pytest.raises(ValueError, match="height: a crop of 8 in 24 latents is not a multiple of 3"):
        aligned_windows((3, 24, 24), CropRule((3, 8, 8)), 1.5, np.random.default_rng(0))
    with pytest.raises(ValueError, match="multiples of 2 for scale 1"):
        CropRule((3, 5, 4), "low").check(1.5)


@pytest.fixture
def opened(tiny_clips: Path, tiny_latents: Path, tiny_backbone: Path) -> Any:
    def make(**options: Any) -> LatentPairsDataModule:
        index = tiny_clips / "clips.csv"
        data = LatentPairsDataModule(index, tiny_latents, str(tiny_backbone), (48, 48), frames=9, **options)
        data.setup("fit")
        return data

    return make


def test_crops_are_windows_of_the_whole(opened: Any) -> None:
    options = {"scales": [1.5, 3.0], "crop": (3, 3, 3)}
    data, kept = opened(**options), opened(**options, preload=True)
    whole = WholeLatentPairs(data.store, data.pairs["train"], data.scales)
    for kind, scale in enumerate(data.scales):
        key = SampleKey(index=1, kind=kind, seed=(0, 0, 7))
        item, full = data.crops[key], whole[kind * len(data.pairs["train"]) + 1]
        assert item["clip_id"] == full["clip_id"]
        high, low = aligned_windows((3, 6, 6), CropRule((3, 3, 3)), scale, np.random.default_rng([0, 0, 7]))
        for name, (t, y, x) in (("hr", high), ("lr", low)):
            assert torch.equal(item[name], full[name][:, slice(*t), slice(*y), slice(*x)])
        assert torch.equal(kept.crops[key]["hr"], item["hr"])
        assert full["video"].shape == (3, 9, 48, 48)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_a_crop_brings_the_clips_own_pixels(opened: Any, frames: int) -> None:
    options = {"scales": [1.5, 2.0], "crop": (3, 2, 2), "crop_at": "low", "crop_frames": "first"}
    data, without = opened(**options, video_crop=(frames, 2, 3)), opened(**options)
    whole = WholeLatentPairs(data.store, data.pairs["train"], data.scales)
    starts = set()
    for kind, seed in ((0, 1), (0, 2), (0, 3), (1, 4)):
        key = SampleKey(index=2, kind=kind, seed=(0, 0, seed))
        item, full = data.crops[key], whole[kind * len(data.pairs["train"]) + 2]
        assert torch.equal(item["hr"], without.crops[key]["hr"])  # pixels change nothing else
        t, y, x = item["window"].tolist()
        assert (t, y[1] - y[0], x[1] - x[0]) == ([0, frames], 2, 3)
        starts.add((y[0], x[0]))
        ((t0, _), (y0, _), (x0, _)), _ = aligned_windows(
            (3, 6, 6), data.crop, data.scales[kind], np.random.default_rng([0, 0, seed])
        )
        assert t0 == 0
        rows, columns = (slice(8 * (at + a), 8 * (at + b)) for at, (a, b) in ((y0, y), (x0, x)))
        own = full["video"][:, : 4 * frames - 3, rows, columns]
        torch.testing.assert_close(item["video"], own, rtol=0, atol=1e-5)
        assert item["video"].abs().max() <= 1
    assert len(starts) > 1
    batch = next(iter(data.train_dataloader()))
    assert batch["video"].shape == (2, 3, 4 * frames - 3, 16, 24)
    assert batch["window"].shape == (2, 3, 2)
