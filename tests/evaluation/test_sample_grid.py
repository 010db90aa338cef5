"""Frames of generated videos in a grid."""

from __future__ import annotations

import numpy as np
import pytest

from luve_lightning.evaluation.sample_grid import CaptionedVideo, sample_grid


def video(colour: int, frames: int = 9, width: int = 96) -> CaptionedVideo:
    """Frame t is of one grey, 10 t + colour."""
    greys = 10 * np.arange(frames, dtype=np.uint8) + colour
    return CaptionedVideo(
        "grey " * colour, np.broadcast_to(greys[:, None, None, None], (frames, 64, width, 3))
    )


def greys(picture: object, row: int) -> list[int]:
    """The colours along a row of pixels, white left out, repeats joined."""
    line = np.asarray(picture)[row, :, 0]
    return [int(v) for v, before in zip(line, [255, *line[:-1]], strict=True) if v != before and v != 255]


def test_equally_spaced_frames_the_first_and_the_last_among_them() -> None:
    grid = sample_grid([video(1)], columns=5)
    assert greys(grid, grid.height - 10) == [1, 21, 41, 61, 81]
    assert greys(sample_grid([video(1, frames=1)], columns=2), grid.height - 10) == [1, 1]


def test_videos_fill_rows_of_one_height() -> None:
    grid = sample_grid([video(1), video(2), video(40)], columns=2, per_row=2)
    one = sample_grid([video(1)], columns=2)
    assert grid.width == 2 * one.width
    cell = grid.height // 2
    assert greys(grid, cell - 10) == [1, 81, 2, 82]
    assert greys(grid, 2 * cell - 10) == [40, 120]
    assert cell > one.height, "a long caption takes lines of its own in every cell"


@pytest.mark.parametrize(("width", "shown"), [(32, 96), (40, 120), (96, 96), (640, 320)])
def test_small_frames_grow_by_a_whole_factor_and_large_ones_shrink(width: int, shown: int) -> None:
    grid = np.asarray(sample_grid([video(1, frames=1, width=width)], columns=1))
    assert int((grid[-10, :, 0] == 1).sum()) == shown


def test_nothing_to_draw_is_refused() -> None:
    for options in ({"columns": 0}, {"per_row": 0}):
        with pytest.raises(
            ValueError, match="a grid needs at least one video, one column and one video a row"
        ):
            sample_grid([video(1)], **options)
    with pytest.raises(ValueError, match="a grid needs"):
        sample_grid([])
