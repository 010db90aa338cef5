"""Pictures of frames, looked at pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from luve_lightning.evaluation.pictures import contact_sheet, detail_box, picture_strip, side_by_side


def plain(length: int, height: int, width: int, first: int) -> np.ndarray:
    """Frames of one colour each: grey level `first` plus the frame's number."""
    levels = np.arange(first, first + length, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (length, height, width, 3)).copy()


def test_rows_are_stages_and_columns_are_frames() -> None:
    videos = {"motion\n24x16": plain(9, 16, 24, 10), "refined": plain(9, 32, 48, 60)}
    sheet = np.asarray(contact_sheet(videos, "a caption", columns=3))
    drawn = (192, 128)  # the larger stage, enlarged by a whole factor
    for row, first in enumerate((10, 60)):
        for column, t in enumerate((0, 4, 8)):
            y = sheet.shape[0] - (2 - row) * (drawn[1] + 4)
            x = sheet.shape[1] - (3 - column) * (drawn[0] + 4)
            picture = sheet[y : y + drawn[1], x : x + drawn[0]]
            assert (picture == first + t).all(), (row, column)
    # Captions and labels are where no frame is, in the colour of text.
    label = sheet[-2 * (drawn[1] + 4) :, : sheet.shape[1] - 3 * (drawn[0] + 4)]
    assert (label == 0).all(axis=-1).any()
    assert (sheet[: sheet.shape[0] - 2 * (drawn[1] + 4)] == 0).all(axis=-1).any()


def test_small_frames_are_enlarged_pixel_by_pixel_and_large_ones_reduced() -> None:
    checks = (np.indices((1, 4, 4)).sum(0)[..., None] % 2 * 255).astype(np.uint8).repeat(3, axis=-1)
    sheet = np.asarray(contact_sheet({"a": checks, "b": plain(1, 480, 960, 7)}, columns=5))
    picture = sheet[-2 * 244 : -2 * 244 + 240, -484:-4]
    assert set(np.unique(picture)) == {0, 255}, "enlarging must not smooth"
    assert (sheet[-244:-4, -484:-4] == 7).all()


def test_a_long_caption_is_wrapped() -> None:
    video = {"a": plain(2, 16, 16, 0)}
    short, long = contact_sheet(video, "word"), contact_sheet(video, "word " * 100)
    assert long.width == short.width
    assert long.height > short.height


@pytest.mark.parametrize(
    ("videos", "columns", "message"),
    [
        ({}, 3, "at least one column"),
        ({"a": plain(2, 8, 8, 0)}, 0, "at least one column"),
        ({"a": plain(2, 8, 8, 0), "b": plain(3, 8, 8, 0)}, 3, "as many frames"),
        ({"a": plain(2, 8, 8, 0).astype(np.float32)}, 3, "a: expected uint8 frames"),
    ],
)
def test_what_cannot_be_drawn(videos: dict[str, np.ndarray], columns: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contact_sheet(videos, columns=columns)


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
    strip = np.asarray(picture_strip({"low": low, "high": high}))
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
    blank = np.asarray(picture_strip({"": frame, " ": frame}))
    labelled = np.asarray(picture_strip({"": frame, "VLUer": frame}))
    assert (blank[:20] == 255).all()
    changed = np.argwhere((blank != labelled).any(axis=2))
    assert len(changed) > 20
    assert changed[:, 0].max() < 20
    assert 260 <= changed[:, 1].min() < 270


def test_large_frames_are_reduced() -> None:
    strip = picture_strip({name: noise(1088, 1920) for name in "abcd"})
    assert strip.size == (4 * 640 + 3 * 4, 20 + 2 * 363 + 4)


def test_pictures_stand_in_rows() -> None:
    colours = ["red", "lime", "blue"]
    whole = side_by_side([Image.new("RGB", (20, 10 + i), c) for i, c in enumerate(colours)])
    assert whole.size == (2 * 24, 2 * 16)
    places = [(0, 0), (24, 0), (0, 16)]
    assert [whole.getpixel(place) for place in places] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert whole.getpixel((24, 16)) == (255, 255, 255)
    with pytest.raises(ValueError, match="at least one picture"):
        side_by_side([])


def test_a_strip_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        picture_strip({})
