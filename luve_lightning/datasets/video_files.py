"""Videos as files: writing all frames of one, reading them back, and finding them in a folder."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np

from luve_lightning.datasets.clip_encoding import encode_h264
from luve_lightning.datasets.clips import Frames, probe_clip, read_clip
from luve_lightning.datasets.file_names import video_name

# Visually lossless: what is measured on such a file is about the frames, not about the encoder.
CRF = 10
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".ts")
MAX_FPS = 240


def write_video(path: str | Path, frames: np.ndarray, fps: float, lossless: bool = False) -> None:
    """Write frames as H.264 in mp4, so that the file is either whole or not there; equal frames give equal bytes.

    Lossy files are yuv420p tagged bt709, which every player shows. Lossless ones are RGB: `read_video` gives the
    very frames back, many players and browsers show nothing.

    Args:
        path: where to, ending in .mp4; its folder is made.
        frames: uint8 T x H x W x 3, full-range sRGB; H and W even unless lossless.
        fps: frames per second, in (0, 240].
        lossless: keep every bit.

    Raises:
        ValueError: other frames, rates or file names.
    """
    path = Path(path)
    if path.suffix != ".mp4":
        raise ValueError(f"video files are written as .mp4, got {path}")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(
            f"{path}: expected uint8 frames T x H x W x 3, got {frames.dtype} {' x '.join(map(str, frames.shape))}"
        )
    height, width = frames.shape[1:3]
    if not lossless and (height % 2 or width % 2):
        raise ValueError(f"{path}: frames of {height}x{width}: expected even sides, or lossless=True")
    if not (math.isfinite(fps) and 0 < fps <= MAX_FPS):
        raise ValueError(f"{path}: fps: expected a number in (0, {MAX_FPS}], got {fps}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # 30000/1001 and its like are within 1e-6 of their decimals.
    rate = Fraction(fps).limit_denominator(1001)
    encode_h264(path, frames, rate, None if lossless else CRF)


def read_video(path: str | Path) -> tuple[Frames, float]:
    """Every frame of a video file.

    Read with PyAV: it notices damage inside a frame, which decord fills in silently.

    Args:
        path: any container and codec that `datasets/clips.py` reads.

    Returns:
        uint8 T x H x W x 3, full-range sRGB as a player shows them, and the frames per second (0 when the file does
        not say).

    Raises:
        ClipError: the file is missing, empty, corrupt, cut short, holds no video, or is shown in a way that cannot
            be reproduced; its text is one line.
    """
    info = probe_clip(path)
    return read_clip(path, 0, info.frames, backend="pyav"), info.fps


def find_videos(folder: str | Path) -> list[Path]:
    """The video files of a folder by name, not those of folders inside it or hidden ones.

    Raises:
        FileNotFoundError: when there is no such folder, or no video in it.
        ValueError: when a name is not UTF-8, or two files differ only in their suffix or in how an accent is written:
            a video is known by its name without suffix.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of videos")
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".")
    )
    if not found:
        raise FileNotFoundError(f"{folder}: no videos there ({', '.join(VIDEO_SUFFIXES)})")
    stems: dict[str, Path] = {}
    for path in found:
        if any("\ud800" <= sign <= "\udfff" for sign in path.name):
            raise ValueError(f"{folder}: {path.name!a}: expected file names in UTF-8; rename it")
        first = stems.setdefault(video_name(path), path)
        if first != path:
            raise ValueError(f"{folder}: {first.name} and {path.name} have the same name")
    return found
