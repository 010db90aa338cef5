"""Real video files whose frames carry their own number, written with PyAV.

The top quarter of frame ``i`` shows the bits of ``i`` as black and white squares, large enough to survive
lossy coding; below it a texture drifts, so that encoders have motion to predict and put B-frames to use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

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


H264_CLOSED = Kind(".mp4", "libx264", {"g": "12", "preset": "veryfast", "x264-params": "open-gop=0:scenecut=0:threads=1"})
H264_OPEN = Kind(".mp4", "libx264", {"g": "12", "bf": "3", "preset": "fast", "x264-params": "open-gop=1:scenecut=0:threads=1"})
KINDS = {
    "h264": H264_CLOSED,
    "h264_mkv": Kind(".mkv", "libx264", H264_CLOSED.options),
    "h264_444": Kind(".mp4", "libx264", H264_CLOSED.options, "yuv444p"),
    "h264_10bit": Kind(".mp4", "libx264", H264_CLOSED.options, "yuv420p10le"),
    "h264_open": H264_OPEN,
    "h264_open_mkv": Kind(".mkv", "libx264", H264_OPEN.options),
    "h264_intra_refresh": Kind(".mp4", "libx264", {"g": "12", "preset": "fast", "x264-params": "intra-refresh=1:threads=1"}),
    "h264_avi": Kind(".avi", "libx264", H264_CLOSED.options),
    "h264_ts": Kind(".ts", "libx264", H264_CLOSED.options),
    # x265's own defaults (open GOP, 4 B-frames), but for a GOP short enough for a short clip to have several.
    "hevc": Kind(".mp4", "libx265", {"preset": "veryfast", "x265-params": "keyint=24:min-keyint=8:log-level=none:pools=1"}),
    "vp8": Kind(".webm", "libvpx", {"g": "12", "deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp9": Kind(".webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp9_mp4": Kind(".mp4", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "av1": Kind(".mp4", "libsvtav1", {"g": "12", "preset": "10", "svtav1-params": "lp=1"}),
}


def encoder_missing(kind: Kind) -> str:
    """The reason to skip a test of ``kind`` on this machine, empty when its encoder is in this build of
    PyAV."""
    import av

    try:
        av.codec.Codec(kind.encoder, "w")
    except av.codec.codec.UnknownCodecError:
        return f"this build of PyAV has no {kind.encoder} encoder"
    return ""


def numbered_frame(index: int, height: int = SIZE, width: int = SIZE) -> Frames:
    """One frame, uint8 (height, width, 3), that shows ``index``."""
    rows, columns = np.mgrid[0:height, 0:width]
    texture = 128 + 50 * np.sin((columns + 3 * index) / 9) + 40 * np.cos((rows - 2 * index) / 7)
    frame = np.repeat(texture[..., None], 3, axis=2).astype(np.uint8)
    for bit in range(BITS):
        top, left = SQUARE * (bit // 8), SQUARE * (bit % 8)
        frame[top : top + SQUARE, left : left + SQUARE] = 235 if index >> bit & 1 else 16
    return frame


def read_numbers(frames: Frames) -> list[int]:
    """The numbers that frames of shape (count, height, width, 3) show."""
    numbers = []
    for frame in frames:
        number = 0
        for bit in range(BITS):
            top, left = SQUARE * (bit // 8), SQUARE * (bit % 8)
            inner = frame[top + 3 : top + SQUARE - 3, left + 3 : left + SQUARE - 3]
            number |= int(inner.mean() > 125) << bit
        numbers.append(number)
    return numbers


def write_video(
    folder: Path,
    kind: Kind = H264_CLOSED,
    count: int = 60,
    *,
    name: str = "clip",
    fps: int = 24,
    pts: Sequence[int] | None = None,
    sizes: Iterable[tuple[int, int]] | None = None,
    rotation: int = 0,
    mux: dict[str, str] | None = None,
) -> Path:
    """Write ``count`` numbered frames and return the file's path.

    Args:
        folder: where to; the file's name is ``name`` and the kind's suffix.
        kind: how to code it.
        count: how many frames.
        name: the file's stem.
        fps: frames a second.
        pts: the time of each frame in units of 1 / fps; ``range(count)`` when left out. Gaps make a variable
            frame rate.
        rotation: degrees to write into the display matrix.
        mux: options of the container.
    """
    import av

    path = folder / f"{name}{kind.suffix}"
    with av.open(path, "w", options=mux or {}) as container:
        stream = container.add_stream(kind.encoder, rate=fps, options=dict(kind.options))
        stream.width = stream.height = SIZE
        stream.pix_fmt = kind.pix_fmt
        stream.codec_context.time_base = Fraction(1, fps)
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(numbered_frame(index), format="rgb24")
            frame.pts = index if pts is None else pts[index]
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
