"""Windows, sizes and keys that writer and readers must agree on."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.data.latent_store import HIGH_RESOLUTION, LatentRecipe, check_scales

RECIPE = LatentRecipe(vae="v", size=(192, 96), scales=(1.5, 2.0, 3.0), frames=9)


@given(
    frames=st.integers(1, 12),
    start=st.integers(0, 6),
    windows=st.integers(1, 5),
    stride=st.integers(1, 3),
    total=st.integers(0, 60),
)
def test_windows_lie_in_the_clip_and_spread_over_it(
    frames: int, start: int, windows: int, stride: int, total: int
) -> None:
    recipe = replace(RECIPE, frames=frames, start=start, windows=windows, stride=stride)
    ranges = recipe.frame_ranges(total)
    read = [list(range(a, b, stride)) for a, b in ranges]
    assert all(len(numbers) == frames and numbers[-1] == b - 1 for numbers, (_, b) in zip(read, ranges, strict=True))
    assert all(start <= a and b <= total for a, b in ranges)
    room = total - start - (frames - 1) * stride - 1
    assert len(ranges) == (0 if room < 0 else min(windows, room + 1))
    if ranges:
        assert ranges[0][0] == start
    if len(ranges) > 1:
        assert ranges[-1][1] == total
        gaps = [b[0] - a[0] for a, b in pairwise(ranges)]
        assert max(gaps) - min(gaps) <= 1
    if not ranges:
        counted = "1 frame" if total == 1 else f"{total} frames"
        assert recipe.too_short(total) == f"{counted}, expected at least {start + (frames - 1) * stride + 1}"


@given(
    windows=st.integers(1, 5),
    stride=st.integers(1, 2),
    total=st.integers(1, 300),
    rate=st.sampled_from([24, 29.97, 60]),
)
def test_windows_at_a_frame_rate_are_equally_long_in_seconds(
    windows: int, stride: int, total: int, rate: float
) -> None:
    recipe = replace(RECIPE, windows=windows, stride=stride, start=4, fps=16)
    ranges, reason = recipe.clip_ranges(total, rate)
    # Without the time that the last frame is shown, which an index does not say.
    seconds = Fraction(total - 1) / Fraction(str(rate))
    assert all((b - 1) / Fraction(16) <= seconds for _, b in ranges)
    assert {b - a for a, b in ranges} <= {recipe.span}
    if ranges:
        assert ranges[0][0] == 4
        assert windows == 1 or (ranges[-1][1] / Fraction(16) > seconds)
        assert not reason
    else:
        assert (4 + recipe.span - 1) / Fraction(16) > seconds
        assert re.fullmatch(rf"(1 frame|\d+ frames) at 16 frames a second, expected at least {4 + recipe.span}", reason)


def test_slow_clips_have_no_window_at_a_frame_rate() -> None:
    recipe = replace(RECIPE, fps=16)
    assert recipe.clip_ranges(200, 7.9)[1].startswith("7.9 frames a second, less than half of 16")
    assert recipe.clip_ranges(200, 8) == ([(0, 9)], "")
    assert replace(recipe, frames=1).clip_ranges(1, 0) == ([(0, 1)], "")  # a still
    assert RECIPE.clip_ranges(200, 7.9) == ([(0, 9)], "")
    with pytest.raises(ValueError, match="fps: expected frames a second above 0"):
        replace(RECIPE, fps=-1)


def test_a_frame_rate_makes_other_keys() -> None:
    plain, timed = (replace(RECIPE, fps=fps).key("a" * 64, (0, 9)) for fps in (None, 16))
    assert "fps" not in plain.json
    assert '"fps":16.0' in timed.json
    assert timed.count == plain.count == 9


def test_keys_name_every_scale_and_variant() -> None:
    recipe = replace(RECIPE, variants=("plain", "sharpened (amount 1)"), stride=2)
    keys = recipe.keys("a" * 64, (0, 17))
    assert len(keys) == recipe.count == 8
    assert next(iter(keys)) == ("plain", HIGH_RESOLUTION)
    assert len({key.digest for key in keys.values()}) == 8
    key = keys["sharpened (amount 1)", 1.5]
    assert key == recipe.key("a" * 64, (0, 17), 1.5, "sharpened (amount 1)")
    assert (key.size, key.resized_from, key.frames, key.stride) == ((128, 64), (192, 96), (0, 17), 2)
    assert keys["plain", 1.0].size == keys["plain", 1.0].resized_from == (192, 96)


def test_yaml_values_make_an_equal_recipe() -> None:
    from_yaml = LatentRecipe(vae="v", size=[192, 96], scales=[1.5, 2, 3], frames=9)  # type: ignore[arg-type]
    assert from_yaml == RECIPE
    assert from_yaml.keys("a" * 64, (0, 9)) == RECIPE.keys("a" * 64, (0, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "frames, windows, stride >= 1"),
        ({"windows": 0}, "frames, windows, stride >= 1"),
        ({"start": -1}, "start >= 0"),
        ({"scales": (1.0,)}, "above 1"),
        ({"scales": (2, 2.0)}, "different"),
        ({"variants": ()}, "variants"),
        ({"variants": ("plain", "plain")}, "variants"),
        ({"dtype": "float8"}, "dtype must be one of float16, bfloat16, float32"),
    ],
)
def test_impossible_values_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **change)


@pytest.mark.parametrize("size", [(192, 192), (48, 96), (2160, 3840)])
def test_sizes_that_all_scales_divide(size: tuple[int, int]) -> None:
    check_scales(size, [1.5, 2, 3], 8)


def test_wrong_size_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="multiples of 48") as error:
        check_scales((200, 192), [1.5, 2, 3], 8)
    assert str(error.value) == (
        "size 200x192: scales 1.5, 2, 3 and a VAE of 8 pixels per latent need multiples of 48, "
        "not height 200 (nearest 192 or 240)"
    )
    with pytest.raises(ValueError, match=r"height 20 \(nearest 48\) and width 100 \(nearest 96 or 144\)"):
        check_scales((20, 100), [1.5, 2, 3], 8)


@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    ratio=st.sampled_from([4, 8]),
    scales=st.lists(st.sampled_from([1.25, 1.5, 2.0, 3.0, 4 / 3, 2.5]), max_size=3, unique=True),
)
def test_accepted_sizes_are_those_that_divide(height: int, width: int, ratio: int, scales: list[float]) -> None:
    exact = [Fraction(1), *(Fraction(scale).limit_denominator(100) for scale in scales)]
    divides = all((Fraction(n) / scale / ratio).denominator == 1 for n in (height, width) for scale in exact)
    if not divides:
        with pytest.raises(ValueError, match="need multiples of"):
            check_scales((height, width), scales, ratio)
        return
    check_scales((height, width), scales, ratio)
    recipe = LatentRecipe(vae="v", size=(height, width), scales=tuple(scales), frames=1)
    for scale in exact[1:]:
        small = recipe.pixel_size(float(scale))
        assert (small[0] * scale, small[1] * scale) == (height, width)
