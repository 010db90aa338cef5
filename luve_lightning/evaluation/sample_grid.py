"""Frames of generated videos in a grid, a caption above each row."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Frames narrower than this are enlarged by a whole factor, wider ones are reduced.
_FRAME_WIDTH = (96, 320)
_GAP, _LINE = 4, 16
_BACKGROUND, _TEXT = (255, 255, 255), (0, 0, 0)


@dataclass(frozen=True)
class CaptionedVideo:
    """A video and what it was made from.

    Attributes:
        caption: printed above its frames.
        frames: uint8, T x H x W x 3.
    """

    caption: str
    frames: np.ndarray


def sample_grid(videos: Sequence[CaptionedVideo], columns: int = 5, per_row: int = 1) -> Image.Image:
    """Equally spaced frames of each video, first and last among them.

    Args:
        videos: at least one, all of one height and width.
        columns: frames of each video, at least 1.
        per_row: videos side by side.
    """
    if not videos or columns < 1 or per_row < 1:
        raise ValueError("a grid needs at least one video, one column and one video a row")
    height, width = videos[0].frames.shape[1:3]
    low, high = _FRAME_WIDTH
    factor = -(-low // width) if width < low else min(1.0, high / width)
    shown = (round(width * factor), max(1, round(height * factor)))
    font = ImageFont.load_default(12)
    strip_width = columns * (shown[0] + _GAP)
    labels = [textwrap.wrap(video.caption, max(8, int(strip_width / 6.3))) or [""] for video in videos]
    label_height = _LINE * max(map(len, labels))
    rows = -(-len(videos) // per_row)
    cell = (strip_width + 2 * _GAP, label_height + shown[1] + _GAP)
    grid = Image.new("RGB", (cell[0] * per_row, cell[1] * rows), _BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for i, (video, label) in enumerate(zip(videos, labels, strict=True)):
        x, y = (i % per_row) * cell[0], (i // per_row) * cell[1]
        draw.multiline_text((x + 1, y), "\n".join(label), fill=_TEXT, font=font, spacing=2)
        for column, t in enumerate(np.linspace(0, len(video.frames) - 1, columns).round().astype(int)):
            frame = Image.fromarray(video.frames[t]).resize(shown, Image.Resampling.BICUBIC)
            grid.paste(frame, (x + column * (shown[0] + _GAP), y + label_height))
    return grid
