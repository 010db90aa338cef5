"""Reading exact frames with PyAV, from any file that FFmpeg decodes."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from luve_lightning.data.clip_container import ClipError, Frames, decode, opened
from luve_lightning.data.clip_presentation import presentation_of
from luve_lightning.data.clip_scan import Scan

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.stream import VideoStream

TRIES = 2  # keyframes to start from before the file is decoded from its beginning


def read_frames(path: Path, scan: Scan, indices: range) -> Frames:
    """Read frames by their numbers in presentation order.

    A frame is known by its time: the scan lists the times of all frames, decoding starts at a keyframe before the
    first one wanted, and goes on until the last has come. When one did not come, decoding starts further ahead.

    Args:
        path: the file.
        scan: what `luve_lightning.data.clip_scan.scan` found in it.
        indices: frame numbers, ascending, within the clip.

    Returns:
        uint8, len(indices) x height x width x 3, as a player shows it.
    """
    if not len(scan.times):
        return _read_counting(path, scan, indices)
    wanted = {int(scan.times[index]): place for place, index in enumerate(indices)}
    before = [start for start in scan.starts if start <= min(wanted)]
    for start in [*reversed(before[-TRIES:]), None]:
        frames = _read_from(path, scan, start, wanted)
        if frames is not None:
            return frames
    raise ClipError(path, f"has frames between {indices[0]} and {indices[-1]} that cannot be decoded")


def _read_from(path: Path, scan: Scan, start: int | None, wanted: dict[int, int]) -> Frames | None:
    """The frames at the times wanted, decoding from `start` or the beginning; None if one did not come."""
    result = _Result(path, scan, len(wanted))
    last = max(wanted)
    with opened(path, scan.stream) as (container, stream):
        if start is not None:
            container.seek(start, stream=stream, backward=True)
        packets = container.demux(stream)
        first = next(packets)
        solid_from = scan.solid_from
        if start is not None:
            # The containers seek by their own lights: only an early enough, known start will do.
            if first.pts is None or first.pts > start or first.pts not in scan.starts:
                return None
            solid_from = first.pts
        for frame in decode(path, chain([first], packets), solid_from):
            if frame.pts in wanted:
                result.put(wanted[frame.pts], frame, stream)
            if frame.pts is not None and frame.pts >= last:
                break
    return None if result.missing else result.frames


def _read_counting(path: Path, scan: Scan, indices: range) -> Frames:
    """Read by counting frames from the file's beginning, for files whose times say nothing."""
    result = _Result(path, scan, len(indices))
    with opened(path, scan.stream) as (container, stream):
        for number, frame in enumerate(decode(path, container.demux(stream), scan.solid_from)):
            if number in indices:
                result.put(indices.index(number), frame, stream)
            if number == indices[-1]:
                return result.frames
    raise ClipError(path, f"ends before frame {indices[-1]}")


class _Result:
    """The array being filled, and which of its frames are missing."""

    def __init__(self, path: Path, scan: Scan, count: int) -> None:
        from av.video.reformatter import VideoReformatter

        self.path, self.scan = path, scan
        self.frames: Frames = np.empty((count, scan.info.height, scan.info.width, 3), dtype=np.uint8)
        self.missing = set(range(count))
        self._checked: tuple[object, ...] | None = None
        # One for all: each sets up a scaler, a third of the time for small frames.
        self._convert = VideoReformatter()

    def put(self, place: int, frame: VideoFrame, stream: VideoStream) -> None:
        self._check(frame, stream)
        self.frames[place] = self.scan.show.apply(frame, self._convert)
        self.missing.discard(place)

    def _check(self, frame: VideoFrame, stream: VideoStream) -> None:
        """Refuse a picture that is shown otherwise than the first one of the file."""
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
