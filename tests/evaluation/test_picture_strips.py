"""Strips of pictures, looked at pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.evaluation.picture_strips import Panel, detail_box, picture_strip


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("y", "x"), [(0, 0), (0, 60), (60, 30), (30, 60)])
def test_the_detail_is_where_the_edges_are(y: int, x: int) -> None:
    frame = np.full((90, 90, 3), 128, dtype=np.uint8)
    frame[y : y + 30, x : x + 30] = noise(30, 30)
    assert detail_box(frame) == (y, x, 30, 30)


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40))
def test_the_detail_lies_inside(height: int, width: int) -> None:
    top, left, box_height, box_width = detail_box(noise(height, width))
    assert top >= 0
    assert left >= 0
    assert box_height >= 1
    assert box_width >= 1
    assert top + box_height <= height
    assert left + box_width <= width


def test_panels_show_their_pixels_enlarged_and_the_detail_below() -> None:
    low, high = noise(24, 48), noise(48, 96, seed=1)
    strip = np.asarray(picture_strip([Panel("low", low), Panel("high", high)]))
    factor, line, gap = 3, 20, 4  # 96 pixels become at least 256
    assert strip.shape == (line + 2 * 48 * factor + gap, 2 * 96 * factor + gap, 3)
    shown = strip[line : line + 48 * factor, : 96 * factor]
    assert np.array_equal(shown, low.repeat(2 * factor, axis=0).repeat(2 * factor, axis=1))
    top, left, height, width = detail_box(high)
    detail = strip[line + 48 * factor + gap :, 96 * factor + gap :]
    rows, columns = top + np.arange(144) * height // 144, left + np.arange(288) * width // 288
    assert np.array_equal(detail, high[rows][:, columns])


def test_labels_stand_above_their_panels() -> None:
    frame = np.zeros((64, 64, 3), dtype=np.uint8)
    plain = np.asarray(picture_strip([Panel("", frame), Panel("", frame)]))
    labelled = np.asarray(picture_strip([Panel("", frame), Panel("VLUer", frame)]))
    assert (plain[:20] == 255).all()
    changed = np.argwhere((plain != labelled).any(axis=2))
    assert len(changed) > 20
    assert changed[:, 0].max() < 20
    assert 260 <= changed[:, 1].min() < 270


def test_large_frames_are_reduced() -> None:
    strip = picture_strip([Panel(name, noise(1088, 1920)) for name in "abcd"])
    assert strip.size == (4 * 640 + 3 * 4, 20 + 2 * 363 + 4)


def test_a_strip_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one panel"):
        picture_strip([])
