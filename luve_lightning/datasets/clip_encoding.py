"""Encoding frames as H.264 in mp4, the same bytes every time."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from luve_lightning.files import replacing

if TYPE_CHECKING:
    from av import VideoFrame

# No mbtree: in x264 it reads memory that nothing wrote, and the bytes differ from run to run.
_X264 = "threads=1:lookahead-threads=1:mbtree=0:open-gop=0:keyint=16:min-keyint=16:scenecut=0"
_BT709 = "colorprim=bt709:transfer=bt709:colormatrix=bt709:range=tv"


def encode_h264(path: Path, frames: np.ndarray, fps: int | Fraction, crf: int | None) -> None:
    """Encode frames into a finished file that takes its place in one step.

    Closed groups of 16 frames, one thread, and no times or versions in the container, so equal frames give equal
    bytes. Lossy: yuv420p as UltraVideo has it, tagged bt709 limited range and converted with that matrix. Lossless:
    RGB, without any conversion.

    Args:
        path: where to; its folder exists.
        frames: uint8 T x H x W x 3, H and W even when lossy.
        fps: frames per second.
        crf: x264's constant rate factor; None is lossless.
    """
    with replacing(path) as temporary:
        _encode(temporary, frames, fps, crf)


def _encode(path: Path, frames: np.ndarray, fps: int | Fraction, crf: int | None) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    _, height, width, _ = frames.shape
    # The bitexact flag leaves the muxer's version out of the file.
    with av.open(
        str(path), "w", format="mp4", options={"fflags": "+bitexact", "movflags": "+faststart"}
    ) as container:
        stream = container.add_stream("libx264rgb" if crf is None else "libx264", rate=fps)
        stream.width, stream.height = width, height
        stream.pix_fmt = "rgb24" if crf is None else "yuv420p"
        rate = {"qp": "0"} if crf is None else {"crf": str(crf)}
        parameters = _X264 if crf is None else f"{_X264}:{_BT709}"
        stream.options = {"preset": "medium", "threads": "1", "x264-params": parameters, **rate}
        if crf is not None:
            context = stream.codec_context
            context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
            context.color_primaries, context.color_trc = 1, 1
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if crf is not None:
                frame = _bt709(frame)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _bt709(frame: VideoFrame) -> VideoFrame:
    from av.video.reformatter import ColorRange, Colorspace

    return frame.reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
    )
