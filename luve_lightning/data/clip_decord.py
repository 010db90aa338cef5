"""Reading frames with decord.

decord 0.6.0 is exact only for some files (`luve_lightning.data.clip_scan` says which), and hides damage:
FFmpeg fills damaged parts in from neighbouring frames. A reader is opened for each read: one opened before a
fork hangs in the child, it cannot be pickled, and an open 1080p reader holds 215 MB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from luve_lightning.data.clip_container import ClipError, ClipInfo, Frames

CHUNK = 16  # frames decoded at a time where only unbroken ranges come out evenly spaced


@lru_cache(maxsize=1)
def load_decord() -> ModuleType | None:
    """The module, or None where it is not installed or does not load."""
    try:
        import decord
        import decord.logging
    except (ImportError, OSError, RuntimeError):
        return None
    decord.logging.set_level(
        decord.logging.QUIET
    )  # errors come as exceptions; FFmpeg's own lines say no file
    # A signal's exception that comes before the constructor's first line leaves a reader without this attribute, at
    # whose end decord prints a traceback.
    decord.VideoReader._handle = None
    return decord


def read_frames(path: Path, indices: range, info: ClipInfo) -> Frames:
    """Read frames by their numbers.

    Args:
        path: the file.
        indices: frame numbers, ascending, within the clip.
        info: what is known of the file; the frames must agree with it.

    Returns:
        uint8, len(indices) x height x width x 3.
    """
    with _opened(path) as reader:
        if len(reader) != info.frames:
            raise ClipError(path, f"has {info.frames} frames, but decord sees {len(reader)}")
        if info.trusted_by_decord or indices.step == 1:
            frames: Frames = reader.get_batch(indices).asnumpy()
        else:
            # On open GOPs a seek for each step lands unevenly; one unbroken run from the start of the range
            # does not.
            frames = _every(reader, indices)
    if frames.shape != (len(indices), info.height, info.width, 3):
        raise ClipError(path, f"gives an array of shape {frames.shape} for {len(indices)} frames")
    return frames


def _every(reader: Any, indices: range) -> Frames:
    """Frames `indices.step` apart out of an unbroken run, a chunk at a time to bound memory."""
    kept = []
    for low in range(indices[0], indices[-1] + 1, CHUNK):
        chunk = range(low, min(low + CHUNK, indices[-1] + 1))
        frames = reader.get_batch(chunk).asnumpy()
        kept.append(frames[[i - low for i in chunk if i in indices]])
    return np.concatenate(kept)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    decord = load_decord()
    if decord is None:
        raise ModuleNotFoundError("decord is not installed: pip install decord")
    try:
        # Often it fails on reading, not on opening, and with RuntimeError, its own DECORDError, or
        # AssertionError.
        yield decord.VideoReader(str(path.absolute()), ctx=decord.cpu(0), num_threads=1)
    except ClipError:
        raise
    except (decord.DECORDError, RuntimeError, AssertionError, ValueError, LookupError, OSError) as error:
        raise ClipError(path, f"cannot be read by decord: {_words(error)}") from error


def _words(error: BaseException) -> str:
    """The first line of an exception, less the time and the source lines that decord puts before it."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"(\[\d\d:\d\d:\d\d\] )?\S+\.(cc|h):\d+: ", "", first).strip()
