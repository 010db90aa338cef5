"""Writing one clip as H.264 in mp4, the same bytes every time."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

# Constant rate factor: visually lossless for these small frames, and the default world stays near 30 MB.
CRF = 14


def write_clip(path: Path, frames: np.ndarray, fps: int) -> None:
    """Encodes frames and puts the finished file in place in one step.

    H.264, yuv420p as UltraVideo has it, closed groups of 16 frames, tagged bt709 limited range and converted
    with that matrix, one thread and no times or versions in the container, so equal frames give equal bytes.

    Args:
        path: Where to; its folder exists.
        frames: uint8 `T x H x W x 3`, H and W even.
        fps: Frames per second.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _encode(temporary, frames, fps)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode(path: Path, frames: np.ndarray, fps: int) -> None:
    _, height, width, _ = frames.shape
    # The bitexact flag leaves the muxer's version out of the file.
    with av.open(
        str(path), "w", format="mp4", options={"fflags": "+bitexact", "movflags": "+faststart"}
    ) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {
            "crf": str(CRF),
            "preset": "medium",
            "threads": "1",
            # No mbtree: in x264 it reads memory that nothing wrote, and the bytes differ from run to run.
            "x264-params": "threads=1:lookahead-threads=1:mbtree=0:"
            "open-gop=0:keyint=16:min-keyint=16:scenecut=0:"
            "colorprim=bt709:transfer=bt709:colormatrix=bt709:range=tv",
        }
        context = stream.codec_context
        context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
        context.color_primaries, context.color_trc = 1, 1
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
            )
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
