"""Reading clips: exactly the requested frames, or a ClipError that says why not.

Frames are what a player shows: turned and mirrored as the file says, with square pixels, in SDR. What cannot be
shown exactly is refused by name (`luve_lightning.data.clip_presentation`). A picture is a clip of one frame
(`luve_lightning.data.stills`).

decord reads the files that it reads exactly, PyAV all others; a scan of the file decides, and is kept for the next
read. Both give the same pixels, bit for bit. PyAV also notices damage inside a frame, which decord hides: use
`backend="pyav"` where that matters more.

Both libraries are imported on first use, so this module imports anywhere. Reading needs PyAV, which alone tells
how a file is shown; decord is optional.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from luve_lightning.data.clip_container import ClipError, ClipInfo, Frames, decode, has_pyav, opened
from luve_lightning.data.clip_presentation import presentation_of
from luve_lightning.data.clip_scan import Scan, scan
from luve_lightning.data.still_files import still_kind
from luve_lightning.data.stills import probe_still, read_still
from luve_lightning.terminal import amount

if TYPE_CHECKING:
    from av import VideoFrame
    from av.codec.hwaccel import HWAccel
    from av.video.stream import VideoStream


Backend = Literal["auto", "decord", "pyav"]


def probe_clip(path: str | Path) -> ClipInfo:
    """Facts about a video file or a still, which has one frame and no frame rate.

    Reads every packet of the file but decodes only one frame; files with useless times (.avi, .ts) are decoded.

    Raises:
        ClipError: the file is missing, empty, cut short, damaged at its start, or holds no video; RefusedClip when a
            player shows it in a way that cannot be reproduced.
        ModuleNotFoundError: PyAV is not installed.
    """
    path = Path(path)
    if still_kind(path) is not None:
        still = probe_still(path)
        return ClipInfo(1, 0.0, still.width, still.height, still.kind.lower(), False, "it is a still")
    _require_pyav()
    return scan(path).info


def read_clip(
    path: str | Path,
    start: int,
    count: int,
    *,
    stride: int = 1,
    fps: float | None = None,
    backend: Backend = "auto",
    matte: str | None = None,
    hardware: str | None = None,
) -> Frames:
    """Read frames of a video file or a still, exactly those requested.

    Args:
        path: the file.
        start: number of the first frame, from 0 in presentation order.
        count: number of frames.
        stride: distance between frames; 2 takes every other one.
        fps: read the clip as one of this many frames a second, by the times at which a player shows its frames
            (`luve_lightning.functional.frame_times`); `start` and `stride` then count these. None takes the frames
            as they are.
        backend: "decord" and "pyav" insist on one library. "auto" uses decord where it is exact, and PyAV
            elsewhere or where decord fails or is missing.
        matte: colour behind the transparent parts of a still, see `luve_lightning.data.stills.read_still`.
        hardware: "cuda", or another name of FFmpeg's: PyAV decodes by it the codecs that it knows. The file's first
            frame must equal software's, or the clip is refused. None decodes in software.

    Returns:
        uint8, count x height x width x 3, red first, as a player shows them.

    Raises:
        ClipError: the file is missing, empty, corrupt, cut short, has no video, or too few frames; RefusedClip
            when a player shows it in a way that cannot be reproduced.
        ModuleNotFoundError: the required library is not installed.
        ValueError: no such hardware can be used here.
    """
    if start < 0 or count < 1 or stride < 1:
        raise ValueError(f"start >= 0, count >= 1 and stride >= 1 expected, got {start}, {count}, {stride}")
    if backend not in ("auto", "decord", "pyav"):
        raise ValueError(f'backend: expected "auto", "decord" or "pyav", got {backend!r}')
    path = Path(path)
    samples = range(start, start + count * stride, stride)
    if still_kind(path) is not None:
        if samples[-1] > 0:
            raise ClipError(path, f"too short: frames {start} to {samples[-1]} asked for, a still has 1")
        return read_still(path, matte)
    _require_pyav()
    found = scan(path)
    indices = _indices(path, found, samples, fps)
    if fps is None:
        return _read(path, found, indices, backend, hardware)
    # What is shown twice is decoded once.
    once = sorted(set(indices))
    frames = _read(path, found, once, backend, hardware)
    return frames if len(once) == len(indices) else frames[np.searchsorted(once, indices)]


def _indices(path: Path, found: Scan, samples: range, fps: float | None) -> Sequence[int]:
    """Frame numbers of samples, ascending; ClipError when the clip has fewer."""
    asked = f"frames {samples[0]} to {samples[-1]}"
    if fps is None:
        if samples[-1] >= found.info.frames:
            raise ClipError(path, f"too short: {asked} asked for, it has {found.info.frames}")
        return samples
    try:
        shown = found.shown
    except ValueError as error:
        raise ClipError(path, str(error)) from None
    if samples[-1] >= (total := shown.count(fps)):
        raise ClipError(path, f"too short: {asked} at {fps:g} frames a second asked for, it has {total}")
    return shown.frames(samples, fps)


def _read(path: Path, found: Scan, indices: Sequence[int], backend: Backend, hardware: str | None) -> Frames:
    if hardware is not None:
        require_hardware(hardware)
        _check_hardware(path, found, hardware)
        return read_with_pyav(path, found, indices, hardware)
    if backend == "decord":
        if not found.show.by_decord:
            raise ClipError(path, found.info.doubt)
        return read_with_decord(path, indices, found.info)
    if backend == "auto" and found.info.trusted_by_decord and load_decord() is not None:
        try:
            return read_with_decord(path, indices, found.info)
        except ClipError:
            pass  # PyAV reads it, or says more plainly what is wrong
    return read_with_pyav(path, found, indices)


@lru_cache(maxsize=8)
def require_hardware(kind: str) -> None:
    """Raise ValueError, in one line, where video cannot be decoded by this kind of hardware.

    Args:
        kind: FFmpeg's name of it, such as "cuda".
    """
    import av
    from av.codec.hwaccel import hwdevices_available

    if kind not in (known := hwdevices_available()):
        raise ValueError(f"hardware: expected one of {', '.join(known) or 'none, in this build of PyAV'}, got {kind!r}")
    try:
        found = av.CodecContext.create("h264", "r", _accelerator(kind)).is_hwaccel
        reason = "FFmpeg has no H.264 decoder for it"
    except (av.error.FFmpegError, OSError, RuntimeError) as error:
        found, reason = False, str(getattr(error, "strerror", None) or error)
    if not found:
        raise ValueError(f"hardware: {kind} cannot decode here ({reason}); expected null, which decodes in software")


def _accelerator(kind: str | None) -> HWAccel | None:
    if kind is None:
        return None
    from av.codec.hwaccel import HWAccel

    # Of several processes on a machine, each decodes on the GPU on which it encodes.
    return HWAccel(kind, os.environ.get("LOCAL_RANK") if kind == "cuda" else None)


def _check_hardware(path: Path, found: Scan, hardware: str) -> None:
    """Refuse a clip whose first frame is another one by this hardware than in software."""
    first = []
    for by in (None, hardware):
        with opened(path, found.stream, _accelerator(by)) as (container, stream):
            result = _Result(path, found, 1)
            for frame in decode(path, container.demux(stream), found.solid_from):
                result.put(0, frame, stream)
                break
        if result.missing:
            raise ClipError(path, f"gives no frame by {by}")
        first.append(result.frames.astype(np.int16))
    if differs := int(abs(first[0] - first[1]).max()):
        raise ClipError(path, f"is decoded differently by {hardware}, by up to {differs} of 255 levels")


def _require_pyav() -> None:
    if not has_pyav():
        raise ModuleNotFoundError("reading video needs PyAV: pip install av")


TRIES = 2  # number of keyframes to try before decoding from the file's beginning


def read_with_pyav(path: Path, scan: Scan, indices: Sequence[int], hardware: str | None = None) -> Frames:
    """Read frames by number, in presentation order.

    A frame is identified by its time. The scan lists the times of all frames; decoding starts at a keyframe before
    the first requested one and continues until the last has come. When one did not come, decoding starts further
    ahead.

    Args:
        path: the file.
        scan: what `luve_lightning.data.clip_scan.scan` found in the file.
        indices: frame numbers, each above the one before it, within the clip.
        hardware: what decodes, see `read_clip`.

    Returns:
        uint8, len(indices) x height x width x 3, as a player shows it.
    """
    if not len(scan.times):
        return _read_counting(path, scan, indices, hardware)
    wanted = {int(scan.times[index]): place for place, index in enumerate(indices)}
    before = [start for start in scan.starts if start <= min(wanted)]
    for start in [*reversed(before[-TRIES:]), None]:
        frames = _read_from(path, scan, start, wanted, hardware)
        if frames is not None:
            return frames
    raise ClipError(path, f"has frames between {indices[0]} and {indices[-1]} that cannot be decoded")


def _read_from(
    path: Path, scan: Scan, start: int | None, wanted: dict[int, int], hardware: str | None
) -> Frames | None:
    """The frames at the requested times, decoding from `start` or the beginning; None if one did not come."""
    result = _Result(path, scan, len(wanted))
    last = max(wanted)
    with opened(path, scan.stream, _accelerator(hardware)) as (container, stream):
        if start is not None:
            container.seek(start, stream=stream, backward=True)
        packets = container.demux(stream)
        first = next(packets)
        solid_from = scan.solid_from
        if start is not None:
            # Containers seek in their own ways: only an early enough, known start will do.
            if first.pts is None or first.pts > start or first.pts not in scan.starts:
                return None
            solid_from = first.pts
        for frame in decode(path, chain([first], packets), solid_from):
            if frame.pts in wanted:
                result.put(wanted[frame.pts], frame, stream)
            if frame.pts is not None and frame.pts >= last:
                break
    return None if result.missing else result.frames


def _read_counting(path: Path, scan: Scan, indices: Sequence[int], hardware: str | None) -> Frames:
    """Read by counting frames from the file's beginning, for files with useless times."""
    result, places = _Result(path, scan, len(indices)), {index: place for place, index in enumerate(indices)}
    with opened(path, scan.stream, _accelerator(hardware)) as (container, stream):
        for number, frame in enumerate(decode(path, container.demux(stream), scan.solid_from)):
            if number in places:
                result.put(places[number], frame, stream)
            if number == indices[-1]:
                return result.frames
    raise ClipError(path, f"ends before frame {indices[-1]}")


# Hardware gives the same values in other orders. Back in software's, they are converted to RGB by the same code.
PLANAR = {"nv12": "yuv420p", "p010le": "yuv420p10le", "p016le": "yuv420p16le", "nv16": "yuv422p", "nv24": "yuv444p"}


class _Result:
    """The array to fill, and which of its frames are missing."""

    def __init__(self, path: Path, scan: Scan, count: int) -> None:
        from av.video.reformatter import VideoReformatter

        self.path, self.scan = path, scan
        self.frames: Frames = np.empty((count, scan.info.height, scan.info.width, 3), dtype=np.uint8)
        self.missing = set(range(count))
        self._checked: tuple[object, ...] | None = None
        # One for all: each sets up a scaler, a third of the time for small frames.
        self._convert, self._separate = VideoReformatter(), VideoReformatter()

    def put(self, place: int, frame: VideoFrame, stream: VideoStream) -> None:
        self._check(frame, stream)
        if (planar := PLANAR.get(frame.format.name)) is not None:
            frame = self._separate.reformat(frame, format=planar, threads=1)
        self.frames[place] = self.scan.show.apply(frame, self._convert)
        self.missing.discard(place)

    def _check(self, frame: VideoFrame, stream: VideoStream) -> None:
        """Refuse a picture that is shown differently from the file's first one."""
        colour = (frame.color_trc, frame.color_primaries, frame.colorspace)
        now = (*colour, frame.interlaced_frame, frame.rotation, frame.width, frame.height)
        if (stream.codec_context.sample_aspect_ratio or 1) != self.scan.shape:
            raise ClipError(self.path, "changes the shape of its pixels midway")
        if now != self._checked:
            show = presentation_of(self.path, stream, frame)
            if show.size != self.scan.show.size:
                raise ClipError(self.path, "changes its frame size midway")
            if show != self.scan.show:
                raise ClipError(self.path, "changes how it is shown midway")
            self._checked = now


CHUNK = 16  # frames decoded at a time where only unbroken ranges come out evenly spaced


@lru_cache(maxsize=1)
def load_decord() -> ModuleType | None:
    """The module, or None where it is not installed or does not load."""
    try:
        import decord
        import decord.logging
    except (ImportError, OSError, RuntimeError):
        return None
    decord.logging.set_level(decord.logging.QUIET)  # errors are raised; FFmpeg's own lines name no file
    # A signal's exception before the constructor's first line leaves a reader without this attribute, and decord
    # prints a traceback at its end.
    decord.VideoReader._handle = None
    return decord


def read_with_decord(path: Path, indices: Sequence[int], info: ClipInfo) -> Frames:
    """Read frames by number.

    Args:
        path: the file.
        indices: frame numbers, each above the one before it, within the clip.
        info: facts about the file; the frames must agree with them.

    Returns:
        uint8, len(indices) x height x width x 3.
    """
    with _opened(path) as reader:
        if len(reader) != info.frames:
            raise ClipError(path, f"has {amount(info.frames, 'frame')}, but decord sees {len(reader)}")
        if info.trusted_by_decord or indices[-1] - indices[0] == len(indices) - 1:
            frames: Frames = reader.get_batch(indices).asnumpy()
        else:
            # On open GOPs a seek per step lands unevenly; one unbroken run from the start of the range does not.
            frames = _every(reader, indices)
    if frames.shape != (len(indices), info.height, info.width, 3):
        raise ClipError(path, f"gives an array of shape {frames.shape} for {len(indices)} frames")
    return frames


def _every(reader: Any, indices: Sequence[int]) -> Frames:
    """Some frames out of an unbroken run, a chunk at a time to bound memory."""
    kept, wanted = [], set(indices)
    for low in range(indices[0], indices[-1] + 1, CHUNK):
        chunk = range(low, min(low + CHUNK, indices[-1] + 1))
        frames = reader.get_batch(chunk).asnumpy()
        kept.append(frames[[i - low for i in chunk if i in wanted]])
    return np.concatenate(kept)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    decord = load_decord()
    if decord is None:
        raise ModuleNotFoundError("decord is not installed: pip install decord")
    try:
        # It often fails on reading, not on opening, and with RuntimeError, its own DECORDError, or AssertionError.
        yield decord.VideoReader(str(path.absolute()), ctx=decord.cpu(0), num_threads=1)
    except ClipError:
        raise
    except (decord.DECORDError, RuntimeError, AssertionError, ValueError, LookupError, OSError) as error:
        raise ClipError(path, f"cannot be read by decord: {_words(error)}") from error


def _words(error: BaseException) -> str:
    """The first line of an exception, without the time and source lines that decord puts before it."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"(\[\d\d:\d\d:\d\d\] )?\S+\.(cc|h):\d+: ", "", first).strip()
