"""Contact sheets: every stage's frames where they belong."""

from __future__ import annotations

import numpy as np
import pytest

from luve_lightning.evaluation.contact_sheet import StageFrames, contact_sheet


def plain(length: int, height: int, width: int, first: int) -> np.ndarray:
    """Frames of one colour each: grey level `first` plus the frame's number."""
    levels = np.arange(first, first + length, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (length, height, width, 3)).copy()


def test_rows_are_stages_and_columns_are_frames() -> None:
    stages = [
        StageFrames("motion\n24x16", plain(9, 16, 24, 10)),
        StageFrames("refined", plain(9, 32, 48, 60)),
    ]
    sheet = np.asarray(contact_sheet(stages, "a caption", columns=3))
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
    sheet = np.asarray(
        contact_sheet([StageFrames("a", checks), StageFrames("b", plain(1, 480, 960, 7))], columns=5)
    )
    picture = sheet[-2 * 244 : -2 * 244 + 240, -484:-4]
    assert set(np.unique(picture)) == {0, 255}, "enlarging must not smooth"
    assert (sheet[-244:-4, -484:-4] == 7).all()


def test_a_long_caption_is_wrapped() -> None:
    stage = [StageFrames("a", plain(2, 16, 16, 0))]
    short, long = contact_sheet(stage, "word"), contact_sheet(stage, "word " * 100)
    assert long.width == short.width
    assert long.height > short.height


@pytest.mark.parametrize(
    ("stages", "columns", "message"),
    [
        ([], 3, "at least one column"),
        ([StageFrames("a", plain(2, 8, 8, 0))], 0, "at least one column"),
        ([StageFrames("a", plain(2, 8, 8, 0)), StageFrames("b", plain(3, 8, 8, 0))], 3, "as many frames"),
        ([StageFrames("a", plain(2, 8, 8, 0).astype(np.float32))], 3, "a: expected uint8 frames"),
    ],
)
def test_what_cannot_be_drawn(stages: list[StageFrames], columns: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contact_sheet(stages, columns=columns)
