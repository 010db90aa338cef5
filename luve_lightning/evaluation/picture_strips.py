"""Pictures of one frame side by side, labelled, with a detail enlarged below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Panels narrower than this are enlarged by a whole factor, wider ones are reduced.
_PANEL_WIDTH = (256, 640)
# The detail is this share of the frame's width and height.
_DETAIL = 3
_GAP = 4
_LABEL_HEIGHT = 20
_BACKGROUND, _TEXT, _MARK = (255, 255, 255), (0, 0, 0), (255, 196, 0)


@dataclass(frozen=True)
class Panel:
    """One picture of a strip.

    Attributes:
        label: printed above it.
        frame: uint8, H x W x 3; may be smaller than the strip's largest frame, and is then shown with its pixels
            enlarged.
    """

    label: str
    frame: np.ndarray


def detail_box(frame: np.ndarray) -> tuple[int, int, int, int]:
    """The part of a frame with the strongest edges: where upsamplers differ.

    Args:
        frame: uint8, H x W x 3, at least 1 x 1.

    Returns:
        (top, left, height, width) of one of 5 x 5 overlapping windows of a third of each side.
    """
    grey = frame.astype(np.float64).mean(axis=2)
    edges = np.zeros_like(grey)
    edges[1:] += np.abs(np.diff(grey, axis=0))
    edges[:, 1:] += np.abs(np.diff(grey, axis=1))
    height, width = (max(1, n // _DETAIL) for n in grey.shape)
    tops, lefts = (
        np.linspace(0, n - m, 5).astype(int) for n, m in zip(grey.shape, (height, width), strict=True)
    )
    boxes = [(int(top), int(left), height, width) for top in tops for left in lefts]
    return max(boxes, key=lambda box: float(edges[box[0] : box[0] + height, box[1] : box[1] + width].sum()))


def picture_strip(panels: Sequence[Panel]) -> Image.Image:
    """Panels in a row, and under each its detail; where the detail lies is framed in the last panel.

    The last panel is the reference: its size is the strip's, and its edges choose the detail.

    Args:
        panels: at least one.
    """
    if not panels:
        raise ValueError("a strip needs at least one panel")
    reference = panels[-1].frame
    height, width = reference.shape[:2]
    top, left, box_height, box_width = detail_box(reference)
    low, high = _PANEL_WIDTH
    factor = -(-low // width) if width < low else min(1.0, high / width)
    shown = (round(width * factor), max(1, round(height * factor)))
    line = _LABEL_HEIGHT
    strip = Image.new(
        "RGB", ((shown[0] + _GAP) * len(panels) - _GAP, line + 2 * shown[1] + _GAP), _BACKGROUND
    )
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(14)
    for i, panel in enumerate(panels):
        x = i * (shown[0] + _GAP)
        draw.text((x + 2, 2), panel.label, fill=_TEXT, font=font)
        picture = Image.fromarray(panel.frame)
        whole = picture.resize((width, height), Image.Resampling.NEAREST)
        detail = whole.crop((left, top, left + box_width, top + box_height))
        strip.paste(_fit(whole, shown), (x, line))
        strip.paste(_fit(detail, shown), (x, line + shown[1] + _GAP))
    x = (len(panels) - 1) * (shown[0] + _GAP)
    corners = [left, top, left + box_width, top + box_height]
    box = [round(c * factor) + offset for c, offset in zip(corners, (x, line, x - 1, line - 1), strict=True)]
    draw.rectangle(box, outline=_MARK, width=2)
    return strip


def _fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Enlarge by repeating pixels, reduce by averaging them."""
    kind = Image.Resampling.NEAREST if size[0] >= picture.width else Image.Resampling.BOX
    return picture.resize(size, kind)
