"""Reading exact frames with PyAV, from any file that FFmpeg decodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from luve_lightning.datasets.clip_container import decode, opened
from luve_lightning.datasets.clip_scan import Scan
from luve_lightning.datasets.clip_types import ClipError, Frames

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

TRIES = 2  # keyframes to start from before the file is decoded from its beginning


def read_frames(path: Path, scan: Scan, indices: range) -> Frames:
    """Read frames by their numbers in presentation order.

    A frame is known by its time: the scan lists the times of all frames, decoding starts at a keyframe before
        the first
    one wanted, and goes on until the last has come. When one did not come, decoding starts further ahead.

    Args:
        path: the file.
        scan: what `luve_lightning.datasets.clip_scan.scan` found in it.
        indices: frame numbers, ascending, within the clip.

    Returns:
        uint8, len(indices) x height x width x 3, shown upright.
    """
    if not len(scan.times):
        return _read_counting(path, scan, indices)
    wanted = {int(scan.times[index]): place for place, index in enumerate(indices)}
    before = [start for start in scan.starts if start[0] <= min(wanted)]
    for start in [*reversed(before[-TRIES:]), None]:
        frames = _read_from(path, scan, start, wanted)
        if frames is not None:
            return frames
    raise ClipError(path, f"has frames between {indices[0]} and {indices[-1]} that cannot be decoded")


def _read_from(
    path: Path, scan: Scan, start: tuple[int, int] | None, wanted: dict[int, int]
) -> Frames | None:
    """The frames at the times wanted, decoding from `start` or the beginning; None if one did not come."""
    result = _Result(path, scan, len(wanted))
    with opened(path, scan.stream) as (container, stream):
        packets: Iterator[Packet[VideoStream]] | None = container.demux(stream)
        solid_from = scan.solid_from
        if start is not None:
            packets, solid_from = _packets_from(container, stream, start), start[0]
        if packets is None:
            return None
        last = max(wanted)
        for frame in decode(path, packets, solid_from):
            if frame.pts in wanted:
                result.put(wanted[frame.pts], frame)
            if frame.pts is not None and frame.pts >= last:
                break
    return result.frames if result.missing == 0 else None


def _packets_from(
    container: InputContainer, stream: VideoStream, start: tuple[int, int]
) -> Iterator[Packet[VideoStream]] | None:
    """Packets from a keyframe on, or None when the container's seek led elsewhere."""
    pts, timestamp = start
    container.seek(timestamp, stream=stream, backward=True)
    packets = container.demux(stream)
    first = next(packets, None)
    if first is None or first.pts != pts:
        return None

    def with_first() -> Iterator[Packet[VideoStream]]:
        yield first
        yield from packets

    return with_first()


def _read_counting(path: Path, scan: Scan, indices: range) -> Frames:
    """Read by counting frames from the file's beginning, for files whose times say nothing."""
    result = _Result(path, scan, len(indices))
    with opened(path, scan.stream) as (container, stream):
        for number, frame in enumerate(decode(path, container.demux(stream), scan.solid_from)):
            if number in indices:
                result.put(indices.index(number), frame)
            if number == indices[-1]:
                return result.frames
    raise ClipError(path, f"ends before frame {indices[-1]}")


class _Result:
    """The array being filled, and how many of its frames are missing."""

    def __init__(self, path: Path, scan: Scan, count: int) -> None:
        from av.video.reformatter import VideoReformatter

        self.path = path
        self.frames: Frames = np.empty((count, scan.info.height, scan.info.width, 3), dtype=np.uint8)
        self.missing = count
        self._convert = (
            VideoReformatter()
        )  # one for all: each sets up a scaler, a third of the time for small frames

    def put(self, place: int, frame: VideoFrame) -> None:
        image = self._convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
        # The display matrix of phone videos: degrees counter-clockwise. decord turns them too.
        image = np.rot90(image, frame.rotation // 90 % 4)
        if image.shape != self.frames.shape[1:]:
            raise ClipError(self.path, "changes its frame size midway")
        self.frames[place] = image
        self.missing -= 1
