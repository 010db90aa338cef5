"""Writing one clip as H.264 in mp4, the same bytes every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from luve_lightning.datasets.clip_encoding import encode_h264

# Constant rate factor: visually lossless for these small frames, and the default world stays near 30 MB.
CRF = 14


def write_clip(path: Path, frames: np.ndarray, fps: int) -> None:
    """Encodes frames and puts the finished file in place in one step; see `encode_h264`.

    Args:
        path: Where to; its folder exists.
        frames: uint8 `T x H x W x 3`, H and W even.
        fps: Frames per second.
    """
    encode_h264(path, frames, fps, CRF)
