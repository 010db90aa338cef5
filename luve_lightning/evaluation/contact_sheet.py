"""A picture of a generated video: a row for each stage of the cascade, frames side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# The widest row's frames are enlarged by a whole factor when narrower, reduced when wider.
_FRAME_WIDTH = (192, 480)
_LABEL_WIDTH, _LINE, _GAP = 120, 18, 4
_BACKGROUND, _TEXT, _FAINT = (255, 255, 255), (0, 0, 0), (110, 110, 110)


@dataclass(frozen=True)
class StageFrames:
    """What one stage made.

    Attributes:
        label: printed beside its row, each line on a line of its own.
        frames: uint8, T x H x W x 3; the stages may differ in size.
    """

    label: str
    frames: np.ndarray


def contact_sheet(stages: Sequence[StageFrames], caption: str = "", columns: int = 5) -> Image.Image:
    """Equally spaced frames of each stage, first and last among them, all drawn at one size.

    A stage of smaller frames is shown with its pixels enlarged, not smoothed: what it lacks can be seen.

    Args:
        stages: at least one, each with at least one frame; of one length.
        caption: printed above all, wrapped.
        columns: frames of each stage, at least 1; a shorter video shows all it has.

    Raises:
        ValueError: no stages, no columns, frames of another type, or stages of different lengths.
    """
    lengths = {len(stage.frames) for stage in stages}
    if not stages or columns < 1 or len(lengths) != 1 or lengths == {0}:
        raise ValueError("a contact sheet needs at least one column, and stages that all have as many frames")
    for stage in stages:
        if stage.frames.dtype != np.uint8 or stage.frames.ndim != 4 or stage.frames.shape[-1] != 3:
            raise ValueError(f"{stage.label}: expected uint8 frames T x H x W x 3, got {stage.frames.shape}")
    (length,) = lengths
    times = np.linspace(0, length - 1, min(columns, length)).round().astype(int)
    width, height = _shown_size(stages)
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    full = _LABEL_WIDTH + len(times) * (width + _GAP)
    lines = textwrap.wrap(caption, max(20, int(full / 6.6)))
    top = _LINE * len(lines) + _LINE
    sheet = Image.new("RGB", (full, top + len(stages) * (height + _GAP)), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((_GAP, 2), "\n".join(lines), fill=_TEXT, font=font, spacing=4)
    for column, t in enumerate(times):
        x = _LABEL_WIDTH + column * (width + _GAP)
        draw.text((x + 2, top - _LINE + 2), f"frame {t}", fill=_FAINT, font=small)
    for row, stage in enumerate(stages):
        y = top + row * (height + _GAP)
        draw.multiline_text((_GAP, y + 4), stage.label, fill=_TEXT, font=font, spacing=4)
        for column, t in enumerate(times):
            picture = _fit(Image.fromarray(stage.frames[t]), (width, height))
            sheet.paste(picture, (_LABEL_WIDTH + column * (width + _GAP), y))
    return sheet


def _shown_size(stages: Sequence[StageFrames]) -> tuple[int, int]:
    """Width and height at which every frame is drawn: from the stage with the largest ones."""
    height, width = max((stage.frames.shape[1:3] for stage in stages), key=lambda size: size[0] * size[1])
    low, high = _FRAME_WIDTH
    factor = -(-low // width) if width < low else min(1.0, high / width)
    return round(width * factor), max(1, round(height * factor))


def _fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Enlarge by repeating pixels, reduce by averaging them."""
    kind = Image.Resampling.NEAREST if size[0] >= picture.width else Image.Resampling.BOX
    return picture.resize(size, kind)
