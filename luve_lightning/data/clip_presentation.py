"""What a player does to decoded pictures before showing them, decided here for every reader.

Files say beside the pictures how these are to be shown. What is said here is done by `Presentation.apply`; what cannot
be done exactly is refused with a `RefusedClip` that names it. data/README.md lists both for users.

High dynamic range and wide gamut are converted to the SDR picture that a player without either shows. The light of a
1,000 cd/m2 display (ITU-R BT.2100: the PQ curve, or HLG with its system gamma of 1.2) is converted to BT.709's
primaries. Its largest component is rolled off to 203 cd/m2, BT.2408's reference white, by the curve of ITU-R BT.2390
(section 5.4, the "EETF"), which changes nothing below its knee of about 88 cd/m2. The three components keep their
ratios, so hues stay. The result is encoded for a display of gamma 2.4 (ITU-R BT.1886). Only transfer and primaries
count among the metadata: equal pixels always give equal pixels.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

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


def _entry_boxes(path: Path) -> dict[bytes, bytes]:
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
                    found[kind] = file.read(min(inner_end - inner, 64))
    except (OSError, struct.error):
        pass  # FFmpeg says whether it can be read at all
    return found


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
_OTHER_MATRICES = {8: "ycgco", 10: "bt2020c", 11: "smpte2085", 12: "chroma-derived-nc", 13: "chroma-derived-c"}
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


class Colour(NamedTuple):
    """The coding of a picture, as far as it must be converted.

    Attributes:
        transfer: "smpte2084" (PQ), "arib-std-b67" (HLG), or "sdr".
        primaries: "bt709", "bt2020" or "display-p3".
    """

    transfer: str
    primaries: str


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
            image = _to_sdr(image, self.colour)
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
    boxes, whole = _entry_boxes(path), (frame.width, frame.height, 0, 0)
    if len(aperture := boxes.get(b"clap", b"")) >= 32:
        # Width and height, and the distance of its middle from the picture's, rightwards and downwards; fractions.
        numbers = struct.unpack(">IIIIiIiI", aperture[:32])
        shown = [part / max(unit, 1) for part, unit in zip(numbers[::2], numbers[1::2], strict=True)]
        if max(abs(a - b) for a, b in zip(shown, whole, strict=True)) >= 0.5:
            cut = f"{shown[0]:g}x{shown[1]:g} of {frame.width}x{frame.height} pixels"
            raise RefusedClip(path, f"is cropped by its container to {cut}; cut it first (ffmpeg -vf crop)")
    records = [boxes[name] for name in (b"dvcC", b"dvvC", b"dvwC") if len(boxes.get(name, b"")) > 4]
    if any(record[4] >> 4 == 0 for record in records):  # bl_signal_compatibility_id
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
        name = _TRANSFERS.get(transfer, transfer)
        raise RefusedClip(path, f"has a transfer that is not shown as stored ({name})")
    if primaries not in _NEAR_BT709 and primaries not in _WIDE:
        name = _PRIMARIES.get(primaries, primaries)
        raise RefusedClip(path, f"has primaries that cannot be converted ({name})")
    if matrix not in _MATRICES:
        name = _OTHER_MATRICES.get(matrix, matrix)
        raise RefusedClip(path, f"has a colour matrix that cannot be converted ({name})")
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
        off = max(abs(x - y) for x, y in zip(exact, nearest, strict=True))
        if nearest in _TURNS and off < math.sin(math.radians(1)):
            return _TURNS[nearest]
    shown = " ".join(f"{value / 65536:.3g}" for value in (a, b, c, d))
    raise RefusedClip(
        path, f"is shown turned or sheared otherwise than by quarter turns and flips (display matrix {shown})"
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


def _square(path: Path, shape: Fraction | None, height: int, width: int) -> tuple[int, int] | None:
    """(height, width) with square pixels, the shorter side enlarged so that nothing is lost; None if unchanged."""
    if not shape or shape == 1:
        return None
    if not 1 / LARGEST_SHAPE <= shape <= LARGEST_SHAPE:
        raise RefusedClip(path, f"has pixels of {shape.numerator}:{shape.denominator}, which no camera makes")
    square = (height, round(width * shape)) if shape > 1 else (round(height / shape), width)
    return None if square == (height, width) else square


def _resized(image: Frames, size: tuple[int, int]) -> Frames:
    # Only these clips need torch.
    from luve_lightning.functional.pixels import frames_to_video, resize_video, video_to_frames

    video = frames_to_video(np.ascontiguousarray(image)[None]).unsqueeze(0)
    resized: Frames = video_to_frames(resize_video(video, size))[0, 0].numpy()
    return resized


Floats = NDArray[np.float32]

PEAK = 1000.0  # cd/m2 of the display that HDR is graded for
WHITE = 203.0  # cd/m2 of SDR white
GAMMA = 2.4
_ROWS = 128  # number of values converted at a time: a 4K frame as floats takes 100 MB

# To BT.709's primaries; the white point is D65 throughout. Rows: red, green, blue.
_TO_BT709 = {
    "bt709": np.eye(3),
    "bt2020": np.array(
        [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]]
    ),
    "display-p3": np.array([[1.224940, -0.224940, 0.0], [-0.042057, 1.042057, 0.0], [-0.019638, -0.078636, 1.098274]]),
}
_BT2020_LUMINANCE = np.array([0.2627, 0.6780, 0.0593])


def _to_sdr(image: NDArray[np.uint16], colour: Colour) -> Frames:
    """One frame, full-range R'G'B' of 16 bits as coded, H x W x 3, as uint8 BT.709."""
    shown = np.empty(image.shape, dtype=np.uint8)
    light = _light(colour.transfer)
    matrix = _TO_BT709[colour.primaries].T.astype(np.float32)
    for top in range(0, len(image), _ROWS):
        linear = light[image[top : top + _ROWS]]
        if colour.transfer == "arib-std-b67":
            linear *= _system_gain(linear)
        linear = np.maximum(linear @ matrix, 0)
        if colour.transfer != "sdr":
            linear *= _gain(linear.max(axis=2, keepdims=True))
        encoded = np.minimum(linear, 1) ** np.float32(1 / GAMMA)
        shown[top : top + _ROWS] = (encoded * 255 + 0.5).astype(np.uint8)
    return shown


@lru_cache(maxsize=3)
def _light(transfer: str) -> Floats:
    """Light of each of the 65,536 code values; 1 is SDR white."""
    code = np.arange(65536) / 65535
    if transfer == "sdr":
        light = code**GAMMA
    elif transfer == "smpte2084":
        light = _pq_light(code) / WHITE
    else:  # the scene light of HLG, which `_system_gain` turns into the display's
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12) * (PEAK / WHITE)
    return light.astype(np.float32)


def _system_gain(scene: Floats) -> Floats:
    """HLG's OOTF for a peak of 1,000 cd/m2: the luminance to the power 0.2 (ITU-R BT.2100, table 5)."""
    luminance = scene @ (_BT2020_LUMINANCE * (WHITE / PEAK)).astype(np.float32)
    return (luminance ** np.float32(0.2))[..., None]


def _gain(largest: Floats) -> Floats:
    """The factor for pixels with this largest component that rolls it off to at most 1."""
    gain = np.ones_like(largest)
    knee = float(_pq_light(1.5 * _pq_code(WHITE) - 0.5 * _pq_code(PEAK))) / WHITE
    bright = largest > knee
    level = largest[bright]
    gain[bright] = _rolled_off(level) / level
    return gain


def _rolled_off(light: NDArray[np.floating]) -> NDArray[np.floating]:
    """BT.2390's Hermite spline above the knee, in PQ values relative to the source's peak."""
    peak = _pq_code(PEAK)
    top = _pq_code(WHITE) / peak
    knee = 1.5 * top - 0.5
    code = np.minimum(_pq_code(light * WHITE) / peak, 1)
    t = (code - knee) / (1 - knee)
    code = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * top
    return _pq_light(code * peak) / WHITE


_M1, _M2, _C1, _C2, _C3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875


def _pq_light(code):  # type: ignore[no-untyped-def]  # floats or arrays of floats
    """cd/m2 of a PQ value in [0, 1] (SMPTE ST 2084)."""
    root = code ** (1 / _M2)
    return 10000 * (np.maximum(root - _C1, 0) / (_C2 - _C3 * root)) ** (1 / _M1)


def _pq_code(light):  # type: ignore[no-untyped-def]
    """PQ value of a luminance in cd/m2."""
    power = (light / 10000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2
