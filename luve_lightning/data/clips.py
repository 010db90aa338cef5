"""Reading clips: the frames asked for are the frames given, or a ClipError says why not.

Frames are what a player shows: turned and mirrored as the file says, with square pixels, in SDR. What cannot be shown
so exactly is refused by name (`luve_lightning.data.clip_presentation`).

decord reads the files that it reads exactly, PyAV all others; which, is decided by a scan of the file that is
kept for the next read. Both give the same pixels, bit for bit. PyAV also notices damage inside a frame, which
decord hides: read with `backend="pyav"` where that matters more.

Both libraries are imported on first use, so this module imports anywhere. Reading needs PyAV, which alone tells how a
file is shown; decord may be missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from luve_lightning.data import clip_decord, clip_pyav
from luve_lightning.data.clip_container import ClipError, ClipInfo, Frames, has_pyav, require_frames
from luve_lightning.data.clip_scan import scan

__all__ = [
    "Backend",
    "ClipError",
    "ClipInfo",
    "Frames",
    "probe_clip",
    "random_crop",
    "random_window",
    "read_clip",
]

Backend = Literal["auto", "decord", "pyav"]


def probe_clip(path: str | Path) -> ClipInfo:
    """Facts about a video file.

    Reads every packet of the file but decodes only one frame; files whose times say nothing (.avi, .ts) are
    decoded.

    Raises:
        ClipError: the file is missing, empty, cut short, damaged at its start, or holds no video; RefusedClip when a
            player shows it in a way that cannot be reproduced.
        ModuleNotFoundError: PyAV is not installed.
    """
    _require_pyav()
    return scan(Path(path)).info


def read_clip(
    path: str | Path, start: int, count: int, *, stride: int = 1, backend: Backend = "auto"
) -> Frames:
    """Read frames of a video file, exactly those asked for.

    Args:
        path: the file.
        start: number of the first frame, counted from 0 in presentation order.
        count: how many frames.
        stride: frames from one to the next; 2 takes every other one.
        backend: "decord" and "pyav" insist on one library. "auto" takes decord where it is exact and PyAV
            elsewhere, or where decord fails or is missing.

    Returns:
        uint8, count x height x width x 3, red first, as a player shows them.

    Raises:
        ClipError: the file is missing, empty, corrupt, cut short, has no video, or fewer frames than asked
            for; RefusedClip when a player shows it in a way that cannot be reproduced.
        ModuleNotFoundError: the library needed is not installed.
    """
    if start < 0 or count < 1 or stride < 1:
        raise ValueError(f"start >= 0, count >= 1 and stride >= 1 expected, got {start}, {count}, {stride}")
    if backend not in ("auto", "decord", "pyav"):
        raise ValueError(f'backend: expected "auto", "decord" or "pyav", got {backend!r}')
    _require_pyav()
    path = Path(path)
    found = scan(path)
    require_frames(path, found.info.frames, start, count, stride)
    indices = range(start, start + count * stride, stride)
    if backend == "decord":
        if not found.show.by_decord:
            raise ClipError(path, found.info.doubt)
        return clip_decord.read_frames(path, indices, found.info)
    if backend == "auto" and found.info.trusted_by_decord and clip_decord.load_decord() is not None:
        try:
            return clip_decord.read_frames(path, indices, found.info)
        except ClipError:
            pass  # PyAV reads it, or says in plainer words what is wrong
    return clip_pyav.read_frames(path, found, indices)


def _require_pyav() -> None:
    if not has_pyav():
        raise ModuleNotFoundError("reading video needs PyAV: pip install av")


def random_window(total: int, count: int, stride: int, rng: np.random.Generator) -> int:
    """A random first frame so that `count` frames, `stride` apart, lie within `total`.

    Args:
        total: frames of the clip.
        count: frames wanted, >= 1.
        stride: frames from one to the next, >= 1.
        rng: where the randomness comes from.

    Returns:
        A start in [0, total - 1 - (count - 1) * stride], each equally likely.
    """
    room = total - (count - 1) * stride
    if count < 1 or stride < 1 or room < 1:
        raise ValueError(f"{count} frames, {stride} apart, do not fit into {total}")
    return int(rng.integers(room))


def random_crop(
    height: int, width: int, size: int | tuple[int, int], rng: np.random.Generator
) -> tuple[slice, slice]:
    """A random rectangle within a frame.

    Args:
        height: of the frame, pixels.
        width: of the frame, pixels.
        size: (height, width) of the rectangle, or one number for a square.
        rng: where the randomness comes from.

    Returns:
        Row and column slices: `frames[:, rows, columns]`.
    """
    crop_height, crop_width = (size, size) if isinstance(size, int) else size
    if not (1 <= crop_height <= height and 1 <= crop_width <= width):
        raise ValueError(f"a crop of {crop_height}x{crop_width} does not fit into {height}x{width}")
    top, left = int(rng.integers(height - crop_height + 1)), int(rng.integers(width - crop_width + 1))
    return slice(top, top + crop_height), slice(left, left + crop_width)
