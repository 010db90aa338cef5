"""Pictures of labelled frames in rows and columns: contact sheets of videos, strips that compare one frame."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Frames narrower than the first width are enlarged by a whole factor, those wider than the second reduced.
_SHEET_WIDTHS, _STRIP_WIDTHS = (192, 480), (256, 640)
_LABEL_WIDTH, _LINE, _HEADING, _GAP = 120, 18, 20, 4
_BACKGROUND, _TEXT, _MARK = (255, 255, 255), (0, 0, 0), (255, 196, 0)
# A strip's detail is this share of the frame's width and height.
_DETAIL = 3


def contact_sheet(videos: Mapping[str, np.ndarray], caption: str = "", columns: int = 5) -> Image.Image:
    """One row per video: equally spaced frames, including the first and the last, all at one size.

    Smaller frames are shown with enlarged pixels, not smoothed, so that missing detail is visible.

    Args:
        videos: uint8, T x H x W x 3, by the label beside the row, which may have several lines; all of one length
            T.
        caption: printed above, wrapped.
        columns: frames per video, at least 1; a shorter one shows all its frames.

    Raises:
        ValueError: no videos or columns, frames of another type, or videos of different lengths.
    """
    lengths = {len(frames) for frames in videos.values()}
    if not videos or columns < 1 or len(lengths) != 1 or lengths == {0}:
        raise ValueError("a contact sheet needs at least one column, and videos that all have as many frames")
    for label, frames in videos.items():
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"{label}: expected uint8 frames T x H x W x 3, got {frames.shape}")
    (length,) = lengths
    times = np.linspace(0, length - 1, min(columns, length)).round().astype(int)
    height, width = max((frames.shape[1:3] for frames in videos.values()), key=lambda size: size[0] * size[1])
    size, _ = _shown(width, height, _SHEET_WIDTHS)
    rows = {label: [_fit(Image.fromarray(frames[t]), size) for t in times] for label, frames in videos.items()}
    return _table(rows, [f"frame {t}" for t in times], caption)


def side_by_side(pictures: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """One picture of several, row by row; each keeps its size.

    Raises:
        ValueError: no pictures or columns.
    """
    if not pictures or columns < 1:
        raise ValueError("expected at least one picture and one column")
    width, height = max(one.width for one in pictures), max(one.height for one in pictures)
    rows = -(-len(pictures) // columns)
    whole = Image.new("RGB", (min(columns, len(pictures)) * (width + _GAP), rows * (height + _GAP)), _BACKGROUND)
    for place, picture in enumerate(pictures):
        whole.paste(picture, (place % columns * (width + _GAP), place // columns * (height + _GAP)))
    return whole


def picture_strip(frames: Mapping[str, np.ndarray]) -> Image.Image:
    """One frame per column, and below each the detail in which the last one has its strongest edges.

    The last frame is the reference: the strip has its size, and the detail is outlined in it.

    Args:
        frames: uint8, H x W x 3, by the label above the column; smaller ones are shown with enlarged pixels.

    Raises:
        ValueError: no frames.
    """
    if not frames:
        raise ValueError("a strip needs at least one frame")
    reference = list(frames.values())[-1]
    height, width = reference.shape[:2]
    top, left, box_height, box_width = detail_box(reference)
    box = (left, top, left + box_width, top + box_height)
    whole = [Image.fromarray(f).resize((width, height), Image.Resampling.NEAREST) for f in frames.values()]
    size, factor = _shown(width, height, _STRIP_WIDTHS)
    pictures = [_fit(picture, size) for picture in whole]
    x, y, right, bottom = (round(corner * factor) for corner in box)
    ImageDraw.Draw(pictures[-1]).rectangle((x, y, right - 1, bottom - 1), outline=_MARK, width=2)
    table = _table({"": pictures, " ": [_fit(picture.crop(box), size) for picture in whole]}, list(frames))
    return table.crop((0, 0, table.width - _GAP, table.height - _GAP))


def detail_box(frame: np.ndarray) -> tuple[int, int, int, int]:
    """The part of a frame with the strongest edges, where upsamplers differ.

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
    tops, lefts = (np.linspace(0, n - m, 5).astype(int) for n, m in zip(grey.shape, (height, width), strict=True))
    boxes = [(int(top), int(left), height, width) for top in tops for left in lefts]
    return max(boxes, key=lambda box: float(edges[box[0] : box[0] + height, box[1] : box[1] + width].sum()))


def _table(rows: Mapping[str, Sequence[Image.Image]], columns: Sequence[str], caption: str = "") -> Image.Image:
    """Pictures of one size in rows, labelled at the left unless every label is blank, with column headings."""
    width, height = next(iter(rows.values()))[0].size
    font = ImageFont.load_default(13)
    left = _LABEL_WIDTH if any(label.strip() for label in rows) else 0
    full = left + len(columns) * (width + _GAP)
    lines = textwrap.wrap(caption, max(20, int(full / 6.6)))
    top = _LINE * len(lines) + _HEADING
    table = Image.new("RGB", (full, top + len(rows) * (height + _GAP)), _BACKGROUND)
    draw = ImageDraw.Draw(table)
    draw.multiline_text((_GAP, 2), "\n".join(lines), fill=_TEXT, font=font, spacing=4)
    for column, heading in enumerate(columns):
        draw.text((left + column * (width + _GAP) + 2, top - _HEADING + 2), heading, fill=_TEXT, font=font)
    for row, (label, pictures) in enumerate(rows.items()):
        y = top + row * (height + _GAP)
        draw.multiline_text((_GAP, y + 4), label.strip(), fill=_TEXT, font=font, spacing=4)
        for column, picture in enumerate(pictures):
            table.paste(picture, (left + column * (width + _GAP), y))
    return table


def _shown(width: int, height: int, widths: tuple[int, int]) -> tuple[tuple[int, int], float]:
    """Width and height at which frames are drawn, and the scale factor."""
    least, most = widths
    factor = -(-least // width) if width < least else min(1.0, most / width)
    return (round(width * factor), max(1, round(height * factor))), factor


def _fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Enlarge by repeating pixels, reduce by averaging them."""
    kind = Image.Resampling.NEAREST if size[0] >= picture.width else Image.Resampling.BOX
    return picture.resize(size, kind)
