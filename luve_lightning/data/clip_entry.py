"""What the sample entry of an mp4 or mov file says of its pictures, where PyAV does not tell (ISO/IEC 14496-12)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_WAY = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")
# What stands between a box's head and the boxes in it.
_STSD, _SAMPLE_ENTRY = 8, 78
_HEAD = 8
_ENOUGH = 64  # bytes of the boxes that are looked at here


def entry_boxes(path: Path) -> dict[bytes, bytes]:
    """The boxes in the sample entries of a file's tracks by name, up to 64 bytes of each; none where it has none."""
    found: dict[bytes, bytes] = {}
    try:
        with path.open("rb") as file:
            places = [(0, path.stat().st_size)]
            for name in _WAY:
                inside = [box for place in places for box in _boxes(file, *place)]
                places = [(start, end) for kind, start, end in inside if kind == name]
            entries = [entry for start, end in places for entry in _boxes(file, start + _STSD, end)]
            for _, start, end in entries:
                for kind, inner, inner_end in _boxes(file, start + _SAMPLE_ENTRY, end):
                    file.seek(inner)
                    found[kind] = file.read(min(inner_end - inner, _ENOUGH))
    except (OSError, struct.error):
        pass  # whether it can be read at all, FFmpeg says
    return found


def clean_aperture(boxes: dict[bytes, bytes]) -> tuple[float, ...] | None:
    """The part of the pictures that is to be shown, or None for all: (width, height, right, down) in pixels.

    The last two are how far its middle lies from that of the picture.
    """
    content = boxes.get(b"clap", b"")
    if len(content) < 32:
        return None
    numbers = struct.unpack(">IIIIiIiI", content[:32])
    return tuple(part / max(whole, 1) for part, whole in zip(numbers[::2], numbers[1::2], strict=True))


def dolby_vision_alone(boxes: dict[bytes, bytes]) -> bool:
    """Whether it is Dolby Vision that other players cannot show, as profile 5 is (bl_signal_compatibility_id 0)."""
    records = [boxes[name] for name in (b"dvcC", b"dvvC", b"dvwC") if len(boxes.get(name, b"")) > 4]
    return any(record[4] >> 4 == 0 for record in records)


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of the contents of each box in a stretch of the file."""
    while start + _HEAD <= end:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(_HEAD))
        head = _HEAD
        if size == 1:
            size, head = struct.unpack(">Q", file.read(8))[0], 16
        elif size == 0:
            size = end - start
        if size < head:
            return
        yield kind, start + head, min(start + size, end)
        start += size
