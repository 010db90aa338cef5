"""What every part of clip reading shares: the error, the facts about a file, and the frame array."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
"""Decoded frames: uint8, frames x height x width x 3, red first."""


class ClipError(RuntimeError):
    """A file that does not give the frames asked for.

    Args:
        path: the file.
        reason: what is wrong with it, as the end of a sentence. May be left out when `path` is a whole
            message, which is how a DataLoader raises an exception of a worker again.
    """

    def __init__(self, path: str | Path, reason: str = "") -> None:
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.reason else str(self.path)


class RefusedClip(ClipError):
    """A sound file that a player shows in a way that cannot be reproduced here."""


@dataclass(frozen=True)
class ClipInfo:
    """Facts about a video file, measured from its packets rather than believed from its header.

    Attributes:
        frames: how many frames can be read, in presentation order.
        fps: average frames per second, 0 when the file does not say.
        width: of a frame as it is shown (square pixels, turned), pixels.
        height: of a frame as it is shown, pixels.
        codec: FFmpeg's name of the codec: "h264", "hevc", "vp9", "av1", ...; empty when unknown.
        trusted_by_decord: decord gives exactly the frames asked for.
        doubt: why not, when it is not trusted.
    """

    frames: int
    fps: float
    width: int
    height: int
    codec: str
    trusted_by_decord: bool
    doubt: str = ""


def last_frame(start: int, count: int, stride: int) -> int:
    """Number of the last frame of `count` frames, `stride` apart, from `start` on."""
    return start + (count - 1) * stride


def require_frames(path: Path, frames: int, start: int, count: int, stride: int) -> None:
    """Raise ClipError when a clip of `frames` frames has not all those asked for."""
    last = last_frame(start, count, stride)
    if last >= frames:
        raise ClipError(path, f"too short: frames {start} to {last} asked for, it has {frames}")
