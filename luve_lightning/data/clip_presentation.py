"""What a player does to decoded pictures before showing them, decided here for every reader.

Files say beside the pictures how these are to be shown. What is said here is done by `Presentation.apply`; what cannot
be done exactly is refused with a `RefusedClip` that names it. data/README.md lists both for users.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from luve_lightning.data.clip_colour import Colour, to_sdr
from luve_lightning.data.clip_container import MP4, Frames, RefusedClip, opened

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.reformatter import VideoReformatter
    from av.video.stream import VideoStream


_WAY = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")
# Bytes between a box's head and the boxes inside it.
_STSD, _SAMPLE_ENTRY = 8, 78
_HEAD = 8
_ENOUGH = 64  # bytes of each box that are read here


def entry_boxes(path: Path) -> dict[bytes, bytes]:
    """The boxes in the sample entries of a file's tracks by name, up to 64 bytes of each; empty where it has none."""
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
        pass  # FFmpeg says whether it can be read at all
    return found


def clean_aperture(boxes: dict[bytes, bytes]) -> tuple[float, ...] | None:
    """The visible part of the pictures, or None for all: (width, height, right, down) in pixels.

    The last two are the distance of its middle from the picture's.
    """
    content = boxes.get(b"clap", b"")
    if len(content) < 32:
        return None
    numbers = struct.unpack(">IIIIiIiI", content[:32])
    return tuple(part / max(whole, 1) for part, whole in zip(numbers[::2], numbers[1::2], strict=True))


def dolby_vision_alone(boxes: dict[bytes, bytes]) -> bool:
    """Whether it is Dolby Vision that other players cannot show, like profile 5 (bl_signal_compatibility_id 0)."""
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


# Numbers of ITU-T H.273, as in FFmpeg.
_HDR = {16: "smpte2084", 18: "arib-std-b67"}
_SDR = {*range(8), 11, 12, 13, 14, 15}  # curves that players show alike, and 0, 2, 3: not given
_TRANSFERS = {8: "linear", 9: "log100", 10: "log316", 17: "smpte428", 256: "vlog"}
_WIDE = {9: "bt2020", 12: "display-p3"}
# The primaries of BT.601 and its kin are near BT.709's, and few players distinguish them.
_NEAR_BT709 = {*range(8), 22}
_PRIMARIES = {8: "film", 10: "smpte428", 11: "smpte431"}
_MATRICES = {*range(8), 9}
_OTHER_MATRICES = {
    8: "ycgco",
    10: "bt2020c",
    11: "smpte2085",
    12: "chroma-derived-nc",
    13: "chroma-derived-c",
}
_OTHER_MATRICES |= {14: "ictcp", 15: "ipt-c2", 16: "ycgco-re", 17: "ycgco-ro"}

LARGEST_SHAPE = 4  # a pixel's width over its height, or the inverse; anamorphic films have 2

# (a, b, c, d) of x' = ax + cy, y' = bx + dy, y downwards: whether to mirror left and right first, quarter turns to
# the left.
_TURNS = {
    (1, 0, 0, 1): (False, 0),
    (0, -1, 1, 0): (False, 1),
    (-1, 0, 0, -1): (False, 2),
    (0, 1, -1, 0): (False, 3),
    (-1, 0, 0, 1): (True, 0),
    (0, 1, 1, 0): (True, 1),
    (1, 0, 0, -1): (True, 2),
    (0, -1, -1, 0): (True, 3),
}


@dataclass(frozen=True)
class Presentation:
    """How the pictures of a clip are shown.

    Attributes:
        size: (height, width) as shown.
        square: (height, width) that makes the pixels square, before turning; None when they are.
        mirrored: whether left and right are swapped, before turning.
        turns: quarter turns to the left.
        colour: what to convert to SDR BT.709; None for nothing.
        old_turns: quarter turns by the angle alone, as all clips were read once.
    """

    size: tuple[int, int]
    square: tuple[int, int] | None
    mirrored: bool
    turns: int
    colour: Colour | None
    old_turns: int

    @property
    def by_decord(self) -> bool:
        """Whether decord applies all of this: it turns pictures by the matrix's angle, and nothing else."""
        return not self.label

    @property
    def label(self) -> str:
        """What is done besides decoding and turning, in words; empty for ordinary clips.

        Latents and scores of clips are stored under it (`luve_lightning.data.hashes`): doing any of this
        differently needs other words.
        """
        parts = []
        if self.colour is not None:
            rolled = "" if self.colour.transfer == "sdr" else " by bt2390 from 1000 to 203 cd/m2"
            parts.append(f"{self.colour.transfer} {self.colour.primaries} to bt709{rolled} 1")
        if self.square is not None:
            parts.append(f"square pixels {self.square[0]}x{self.square[1]} bicubic 1")
        if self.mirrored or self.turns != self.old_turns:
            parts.append(f"{'mirrored ' if self.mirrored else ''}turned {self.turns}")
        return ", ".join(parts)

    def apply(self, frame: VideoFrame, convert: VideoReformatter) -> Frames:
        """The picture of a decoded frame, uint8 H x W x 3."""
        # Planes: FFmpeg 8.0 makes noise from bright pixels in interleaved ones of 16 bits.
        form = "rgb24" if self.colour is None else "gbrp16le"
        image: Any = convert.reformat(frame, format=form, threads=1).to_ndarray()
        if self.colour is not None:
            image = to_sdr(image, self.colour)
        if self.square is not None:
            image = _resized(image, self.square)
        if self.mirrored:
            image = image[:, ::-1]
        return np.rot90(image, self.turns)


def presentation_of(path: Path, stream: VideoStream, frame: VideoFrame) -> Presentation:
    """How a decoded frame is shown.

    Args:
        path: file, for the error.
        stream: stream of an open file, for its pixel shape.
        frame: any frame of it.

    Raises:
        RefusedClip: it is shown in a way that cannot be reproduced here.
    """
    refuse_interlaced(path, frame)
    if stream.container.format.name == MP4:
        _refuse_by_container(path, frame)
    colour = _colour(path, frame)
    mirrored, turns = _turning(path, frame)
    square = _square(path, stream.sample_aspect_ratio, frame.height, frame.width)
    height, width = square or (frame.height, frame.width)
    size = (width, height) if turns % 2 else (height, width)
    return Presentation(size, square, mirrored, turns, colour, frame.rotation // 90 % 4)


def _refuse_by_container(path: Path, frame: VideoFrame) -> None:
    boxes = entry_boxes(path)
    aperture, whole = clean_aperture(boxes), (frame.width, frame.height, 0, 0)
    if aperture is not None and max(abs(a - b) for a, b in zip(aperture, whole, strict=True)) >= 0.5:
        shown = f"{aperture[0]:g}x{aperture[1]:g} of {frame.width}x{frame.height} pixels"
        raise RefusedClip(path, f"is cropped by its container to {shown}; cut it first (ffmpeg -vf crop)")
    if dolby_vision_alone(boxes):
        raise RefusedClip(path, "is Dolby Vision without a picture for other players (profile 5)")


def refuse_interlaced(path: Path, frame: VideoFrame) -> None:
    """Raise RefusedClip for a picture of two fields, taken one after the other."""
    if frame.interlaced_frame:
        raise RefusedClip(path, "is interlaced; deinterlace it first (ffmpeg -vf bwdif)")


def require_progressive(path: Path, stream_index: int) -> None:
    """Decode a file whose pictures may be interlaced, and raise RefusedClip at the first that is."""
    with opened(path, stream_index) as (container, stream):
        for frame in decode_leniently(container, stream):
            refuse_interlaced(path, frame)


def decode_leniently(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Whatever can be decoded from a stream: even a damaged picture says how it is shown."""
    import av

    for packet in container.demux(stream):
        with suppress(av.error.FFmpegError):
            yield from packet.decode()


def _colour(path: Path, frame: VideoFrame) -> Colour | None:
    transfer, primaries, matrix = int(frame.color_trc), int(frame.color_primaries), int(frame.colorspace)
    if transfer not in _SDR and transfer not in _HDR:
        raise RefusedClip(
            path, f"has a transfer that is not shown as stored ({_TRANSFERS.get(transfer, transfer)})"
        )
    if primaries not in _NEAR_BT709 and primaries not in _WIDE:
        raise RefusedClip(
            path, f"has primaries that cannot be converted ({_PRIMARIES.get(primaries, primaries)})"
        )
    if matrix not in _MATRICES:
        raise RefusedClip(
            path, f"has a colour matrix that cannot be converted ({_OTHER_MATRICES.get(matrix, matrix)})"
        )
    if transfer in _HDR:
        if matrix == 2 and not frame.format.is_rgb:
            raise RefusedClip(path, f"is HDR ({_HDR[transfer]}) and does not say its colour matrix")
        # HDR that does not give its primaries has BT.2020's.
        return Colour(_HDR[transfer], _WIDE.get(primaries, "bt709" if primaries == 1 else "bt2020"))
    return Colour("sdr", _WIDE[primaries]) if primaries in _WIDE else None


def _turning(path: Path, frame: VideoFrame) -> tuple[bool, int]:
    """Whether the display matrix mirrors, and the quarter turns to the left that follow."""
    matrix = _display_matrix(frame)
    if matrix is None:
        return False, frame.rotation // 90 % 4
    a, b, u, c, d, v, _, _, _ = struct.unpack("=9i", matrix[:36])
    # Scaling is no part of it: FFmpeg turns it into the pixel shape where it differs by direction.
    columns = (math.hypot(a, c), math.hypot(b, d))
    if all(columns) and not (u or v):
        exact = (a / columns[0], b / columns[1], c / columns[0], d / columns[1])
        nearest = tuple(round(value) for value in exact)
        # Players ignore less than a degree.
        if nearest in _TURNS and max(abs(x - y) for x, y in zip(exact, nearest, strict=True)) < math.sin(
            math.radians(1)
        ):
            return _TURNS[nearest]
    raise RefusedClip(
        path, f"is shown turned or sheared otherwise than by quarter turns and flips ({_degrees(a, b, c, d)})"
    )


def _display_matrix(frame: VideoFrame) -> bytes | None:
    from av.sidedata.sidedata import SideDataContainer

    # Like `frame.side_data`, which fails as a whole where FFmpeg knows a kind of data that PyAV does not, such as
    # Exif. The matrix comes before those.
    found = SideDataContainer.__new__(SideDataContainer)
    with suppress(ValueError):
        found.__init__(frame)  # type: ignore[misc]
    matrix = found.get("DISPLAYMATRIX")
    return None if matrix is None else bytes(matrix)


def _degrees(a: int, b: int, c: int, d: int) -> str:
    return f"display matrix {' '.join(f'{value / 65536:.3g}' for value in (a, b, c, d))}"


def _square(path: Path, shape: Fraction | None, height: int, width: int) -> tuple[int, int] | None:
    """(height, width) with square pixels, the shorter side enlarged so that nothing is lost; None if unchanged."""
    if not shape or shape == 1:
        return None
    if not 1 / LARGEST_SHAPE <= shape <= LARGEST_SHAPE:
        raise RefusedClip(path, f"has pixels of {shape.numerator}:{shape.denominator}, which no camera makes")
    square = (height, round(width * shape)) if shape > 1 else (round(height / shape), width)
    return None if square == (height, width) else square


def _resized(image: Frames, size: tuple[int, int]) -> Frames:
    # only these clips need torch
    from luve_lightning.functional.pixels import frames_to_video, resize_video, video_to_frames

    video = frames_to_video(np.ascontiguousarray(image)[None]).unsqueeze(0)
    resized: Frames = video_to_frames(resize_video(video, size))[0, 0].numpy()
    return resized
