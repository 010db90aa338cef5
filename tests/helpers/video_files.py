"""Real video files whose frames carry their own number, written with PyAV.

The top rows of frame ``i`` show the bits of ``i`` as black and white squares, large enough to survive lossy
coding; below them a texture drifts, so that encoders have motion to predict and put B-frames to use.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

SIZE = 96
"""Height and width of every frame, in pixels."""
SQUARE = 12
BITS = 16  # two rows of eight squares

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Kind:
    """One way of coding: container suffix, encoder, encoder options and pixel format."""

    suffix: str
    encoder: str
    options: dict[str, str] = field(default_factory=dict)
    pix_fmt: str = "yuv420p"


# mbtree is off because x264 reads memory there that nothing wrote, and codes differently from run to run.
H264_CLOSED = Kind(
    ".mp4", "libx264", {"g": "12", "preset": "veryfast", "x264-params": "open-gop=0:scenecut=0:mbtree=0:threads=1"}
)
H264_OPEN = Kind(
    ".mp4",
    "libx264",
    {"g": "12", "bf": "3", "preset": "fast", "x264-params": "open-gop=1:scenecut=0:mbtree=0:threads=1"},
)
# x265's own defaults (open GOP, 4 B-frames), but for a GOP short enough for a short clip to have several.
HEVC = Kind(".mp4", "libx265", {"preset": "veryfast", "x265-params": "keyint=24:min-keyint=8:log-level=none:pools=1"})
VPX = {"g": "12", "deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}

# Kinds that decord reads exactly, with the very pixels that PyAV gives.
CLOSED = {
    "h264": H264_CLOSED,
    "h264_mkv": replace(H264_CLOSED, suffix=".mkv"),
    "h264_444": replace(H264_CLOSED, pix_fmt="yuv444p"),
    "h264_full_range": replace(H264_CLOSED, pix_fmt="yuvj420p"),
    "vp8": Kind(".webm", "libvpx", VPX),
    "vp9": Kind(".webm", "libvpx-vp9", VPX),
    "vp9_mp4": Kind(".mp4", "libvpx-vp9", VPX),
}
# Kinds that it cannot open, is not exact with, or converts to other pixels.
OTHER = {
    "h264_open": H264_OPEN,
    "h264_open_mkv": replace(H264_OPEN, suffix=".mkv"),
    "h264_intra_refresh": Kind(
        ".mp4", "libx264", {"g": "12", "preset": "fast", "x264-params": "intra-refresh=1:mbtree=0:threads=1"}
    ),
    "h264_avi": replace(H264_CLOSED, suffix=".avi"),
    "h264_ts": replace(H264_CLOSED, suffix=".ts"),
    "h264_10bit": replace(H264_CLOSED, pix_fmt="yuv420p10le"),
    "hevc": HEVC,
    "hevc_mkv": replace(HEVC, suffix=".mkv"),
    "av1": Kind(".mp4", "libsvtav1", {"g": "12", "preset": "10", "svtav1-params": "lp=1"}),
}
KINDS = CLOSED | OTHER


def missing_encoder(kind: Kind) -> str:
    """The reason to skip a test of ``kind``; empty when this build of PyAV has its encoder."""
    try:
        av.codec.Codec(kind.encoder, "w")
    except av.codec.codec.UnknownCodecError:
        return f"this build of PyAV has no {kind.encoder} encoder"
    return ""


def numbered_frame(index: int) -> Frames:
    """One frame, uint8 (SIZE, SIZE, 3), that shows ``index``."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    texture = 128 + 50 * np.sin((columns + 3 * index) / 9) + 40 * np.cos((rows - 2 * index) / 7)
    frame = np.stack([texture, texture[::-1], texture[:, ::-1]], axis=2).astype(np.uint8)
    for bit in range(BITS):
        top, left = SQUARE * (bit // 8), SQUARE * (bit % 8)
        frame[top : top + SQUARE, left : left + SQUARE] = 235 if index >> bit & 1 else 16
    return frame


def numbers_of(frames: Frames) -> list[int]:
    """The numbers that frames of shape (count, SIZE, SIZE, 3) show."""
    numbers = []
    for frame in frames:
        number = 0
        for bit in range(BITS):
            top, left = SQUARE * (bit // 8), SQUARE * (bit % 8)
            inner = frame[top + 3 : top + SQUARE - 3, left + 3 : left + SQUARE - 3]
            number |= int(inner.mean() > 125) << bit
        numbers.append(number)
    return numbers


@contextmanager
def ordinary_scheduling() -> Iterator[None]:
    """Undo what SVT-AV1 does to a process of root: it makes it a real-time one, and all others stand still."""
    try:
        yield
    finally:
        for thread in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):
                if os.sched_getscheduler(int(thread.name)) != os.SCHED_OTHER:
                    os.sched_setscheduler(int(thread.name), os.SCHED_OTHER, os.sched_param(0))


def write_video(
    folder: Path,
    kind: Kind = H264_CLOSED,
    count: int = 60,
    *,
    name: str = "clip",
    pts: Sequence[int] | None = None,
    rotation: int = 0,
    mux: dict[str, str] | None = None,
    unit: Fraction = Fraction(1, 24),
) -> Path:
    """Write ``count`` numbered frames, at 24 frames a second unless told otherwise, and return the file's path.

    Args:
        folder: where to; the file's name is ``name`` and the kind's suffix.
        kind: how to code it.
        count: how many frames.
        name: the file's stem.
        pts: the time of each frame in ``unit``; ``range(count)`` when left out.
        rotation: degrees to write into the display matrix.
        mux: options of the container.
        unit: the unit of the frames' times, seconds.
    """
    path = folder / f"{name}{kind.suffix}"
    os.environ.setdefault("SVT_LOG", "1")  # or SVT-AV1 prints its settings
    with ordinary_scheduling(), av.open(path, "w", options=mux or {}) as container:
        stream = container.add_stream(kind.encoder, rate=1 / unit, options=dict(kind.options))
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = SIZE
        stream.pix_fmt = kind.pix_fmt
        stream.codec_context.time_base = unit
        stream.codec_context.thread_count = 1
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(numbered_frame(index), format="rgb24")
            frame.pts = index if pts is None else pts[index]
            frame.time_base = unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if rotation:
        set_matrix(path, *QUARTER_TURNS[rotation])
    return path


QUARTER_TURNS = {90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), 270: (0, 1, -1, 0)}
"""Display matrices (a, b, c, d) by the degrees that they turn to the left."""


def set_matrix(path: Path, a: float, b: float, c: float, d: float) -> Path:
    """Write the display matrix x' = ax + cy, y' = bx + dy (y downwards) into the one track of an mp4."""
    data = path.read_bytes()
    at = data.index(b"tkhd") + 44
    numbers = [round(value * 65536) for value in (a, b, 0, c, d, 0, 0, 0)]
    path.write_bytes(data[:at] + struct.pack(">9i", *numbers, 1 << 30) + data[at + 36 :])
    return path


def add_entry_box(path: Path, name: bytes, content: bytes) -> Path:
    """Add a box to the sample entry of an mp4 whose index comes last, as `write_video` writes it."""
    data = bytearray(path.read_bytes())
    moov = data.rindex(b"moov")
    heads = [data.index(kind, moov) - 4 for kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")]
    heads.append(heads[-1] + 16)  # the sample entry
    end = heads[-1] + int.from_bytes(data[heads[-1] : heads[-1] + 4], "big")
    for head in heads:
        size = int.from_bytes(data[head : head + 4], "big") + 8 + len(content)
        data[head : head + 4] = size.to_bytes(4, "big")
    data[end:end] = struct.pack(">I4s", 8 + len(content), name) + content
    path.write_bytes(data)
    return path


def write_planes(
    path: Path, planes: Sequence[np.ndarray], pix_fmt: str, encoder: str = "libx264", **options: str
) -> Path:
    """Write 4:4:4 frames as they are, without loss: what `options` say of them is all that is said.

    Args:
        path: where to.
        planes: of each frame, 3 x H x W, uint8 or uint16: Y, U and V, or G, B and R.
        pix_fmt: of the frames.
        encoder: FFmpeg's name.
        options: of the encoder.
    """
    with av.open(path, "w") as container:
        stream = container.add_stream(encoder, rate=24, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = planes[0].shape[1:]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        for number, content in enumerate(planes):
            frame = av.VideoFrame(stream.width, stream.height, pix_fmt)
            for plane, values in zip(frame.planes, content, strict=True):
                rows = np.zeros((values.shape[0], plane.line_size // values.itemsize), dtype=values.dtype)
                rows[:, : values.shape[1]] = values
                plane.update(rows)
            frame.pts, frame.time_base = number, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def copy_stream(source: Path, target: Path, *, keyframe: int = 0, zero: int = 0) -> Path:
    """Copy packets without decoding, as a quick cut does.

    Args:
        source: a file of ``write_video``.
        target: where to; its suffix chooses the container.
        keyframe: start at this keyframe packet, counted from 0.
        zero: number of the frame that gets time 0; what is shown before it, an mp4 hides by an edit list.
    """
    with av.open(source) as reading, av.open(target, "w") as writing:
        stream = reading.streams.video[0]
        copy = writing.add_stream_from_template(stream)
        assert stream.time_base
        shift = round(Fraction(zero, 24) / stream.time_base)
        keys = -1
        for packet in reading.demux(stream):
            keys += packet.is_keyframe and packet.size > 0
            if not packet.size or keys < keyframe:
                continue
            packet.pts = None if packet.pts is None else packet.pts - shift
            packet.dts = None if packet.dts is None else packet.dts - shift
            packet.stream = copy
            writing.mux(packet)
    return target


def forget_presentation_times(source: Path, target: Path) -> Path:
    """Copy packets with times in file order, as files have them that came through .avi."""
    with av.open(source) as reading, av.open(target, "w") as writing:
        stream = reading.streams.video[0]
        copy = writing.add_stream_from_template(stream)
        assert stream.time_base
        packets = [packet for packet in reading.demux(stream) if packet.size]
        for number, packet in enumerate(packets):
            packet.pts = packet.dts = round(Fraction(number, 24) / stream.time_base)
            packet.stream = copy
            writing.mux(packet)
    return target


def write_sound(path: Path) -> Path:
    """A file of half a second of sound and no picture."""
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for block in range(8):
            samples = np.zeros((1, 1024), dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.rate, frame.pts = 16000, 1024 * block
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
