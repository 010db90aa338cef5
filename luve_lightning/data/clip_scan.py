"""What a video file contains, from its packets: how many frames, at what times, where decoding may start.

One pass over the packets without decoding them (except the first frame) costs what decord itself spends on opening
a file. What cannot be vouched for is read with PyAV, and an incomplete file is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from luve_lightning.data.clip_container import (
    MATROSKA,
    MP4,
    ClipError,
    ClipInfo,
    Start,
    decode,
    file_facts,
    may_interlace,
    opened,
    random_access,
    steady_parameters,
)
from luve_lightning.data.clip_presentation import Presentation, presentation_of, refuse_interlaced, require_progressive
from luve_lightning.functional.frame_times import FrameTimes

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream


@dataclass(frozen=True)
class Packet:
    """What matters about one packet of the video stream.

    Attributes:
        pts: when its picture is shown, in the stream's time base.
        end: when the next one is, seconds; `pts` when the file does not say how long it lasts.
        lasts: how long it is shown, in the stream's time base; 0 when the file does not say.
        hidden: whether an edit list leaves it out.
        start: how decoding may start here; None when it is not a keyframe.
        steady: whether it keeps the parameters of an H.264 stream, for keyframes.
    """

    pts: int | None
    end: float
    hidden: bool
    start: Start | None
    steady: bool = True
    lasts: int = 0


def read_packets(path: Path, container: InputContainer, stream: VideoStream) -> list[Packet]:
    """All packets of the video stream, in file order; ClipError when the file ends before its index says."""
    found: list[Packet] = []
    end_of_all = 0.0
    extradata, codec = stream.codec_context.extradata, codec_of(stream)
    for packet in container.demux():
        if not packet.size:
            continue
        end = 0.0 if packet.pts is None else float((packet.pts + (packet.duration or 0)) * packet.time_base)
        end_of_all = max(end_of_all, end)
        if packet.stream_index != stream.index:
            continue
        if packet.is_corrupt:
            raise ClipError(path, f"is cut short: packet {len(found)} is incomplete")
        start, steady = None, True
        if packet.is_keyframe:
            start = random_access(codec, bytes(packet), extradata)
            steady = codec != "h264" or steady_parameters(bytes(packet), extradata)
        found.append(Packet(packet.pts, end, packet.is_discard, start, steady, packet.duration or 0))
    if not found:
        raise ClipError(path, "has a video stream without a single frame")
    _check_whole(path, container, stream, found, end_of_all)
    return found


def _check_whole(
    path: Path, container: InputContainer, stream: VideoStream, found: list[Packet], end_of_all: float
) -> None:
    """Compare the packets with what the container promises: no library minds a truncated file."""
    # An mp4's edit list may remove packets from its index, so the index counts there, elsewhere the header.
    promised = len(stream.index_entries) if container.format.name == MP4 else stream.frames
    if len(found) < promised:
        raise ClipError(path, f"is cut short: {len(found)} of {promised} packets are there")
    if container.format.name != MATROSKA:
        return
    times = sorted(packet.pts for packet in found if packet.pts is not None)
    tick = float(stream.time_base or 0)
    one_frame = float(np.median(np.diff(times))) * tick if len(times) > 1 else 0.0
    # Some muxers write no duration for a packet: it then lasts until the next one would come.
    end = max(packet.end for packet in found)
    end = max(end, times[-1] * tick + one_frame) if times else end
    duration = _seconds(stream.metadata.get("DURATION", ""))
    if duration is None and container.duration:
        duration, end = container.duration / 1e6, max(end, end_of_all)
    # Matroska rounds every time to its tick: also a frame's length, which is all that a clip of one frame has.
    if duration is not None and end < duration - max(0.75 * one_frame, 2 * tick):
        raise ClipError(path, f"is cut short: {end:.2f} of {duration:.2f} seconds are there")


def codec_of(stream: VideoStream) -> str:
    """The codec's own name; `codec_context.name` is the decoder's, such as libdav1d."""
    return str(stream.codec_context.codec.canonical_name)


def _seconds(text: str) -> float | None:
    """Seconds of a Matroska duration such as 00:00:02.500000000."""
    try:
        hours, minutes, seconds = (float(part) for part in text.split(":"))
    except ValueError:
        return None
    return 3600 * hours + 60 * minutes + seconds


# In these containers decord 0.6.0 gave every frame exactly, when every keyframe is a clean start. It was up to
# three frames off in HEVC and open-GOP H.264, cannot open AV1, and was silently wrong in .avi and .ts. VP8 and VP9
# may change the frame size at any picture, which it hides by scaling.
TRUSTED_CODECS = frozenset({"h264"})
SCANS_KEPT = 4096  # about 8 KB each for a clip of 600 frames


@dataclass(frozen=True)
class Scan:
    """What the readers need to know about a file.

    Attributes:
        info: the public facts.
        times: pts of every frame in presentation order; empty when they are useless and frames are counted.
        starts: pts of the keyframes where decoding may start, in file order.
        stream: index of the video stream.
        show: how its pictures are shown.
        shape: a pixel's width over its height, from the codec at the first frame; 1 when it does not say.
        solid_from: pts from which on every frame must decode.
        tick: the stream's time base, seconds.
        last: how long the last frame is shown, ticks.
    """

    info: ClipInfo
    times: NDArray[np.int64]
    starts: tuple[int, ...]
    stream: int
    show: Presentation
    shape: Fraction | int
    solid_from: int | None
    tick: Fraction
    last: int

    @property
    def shown(self) -> FrameTimes:
        """When its frames are shown; counted frames are equally far apart.

        Raises:
            ValueError: frames are counted, and the file does not say how many a second it shows.
        """
        if len(self.times):
            return FrameTimes(self.times, int(self.times[-1]) + self.last, self.tick)
        if not self.info.fps:
            raise ValueError("does not say how many frames a second it shows")
        every = 1 / Fraction(self.info.fps).limit_denominator(1001)
        return FrameTimes(np.arange(self.info.frames), self.info.frames, every)


def scan(path: Path) -> Scan:
    """Scan a file, or reuse an earlier scan of the same file (by size and time of change).

    Raises:
        ClipError: the file is missing, empty, cut short, damaged at its start, holds no video, or is shown in a
            way that cannot be reproduced.
    """
    found = _scan_once(path, *file_facts(path))
    if isinstance(found, ClipError):
        raise type(found)(path, found.reason)
    return found


@lru_cache(maxsize=SCANS_KEPT)
def _scan_once(path: Path, size: int, changed_ns: int) -> Scan | ClipError:
    """The scan, or the error: a bad file comes up in every epoch and need not be looked at each time."""
    try:
        with opened(path) as (container, stream):
            packets = read_packets(path, container, stream)
            return _conclude(path, container, stream, packets)
    except ClipError as error:
        if isinstance(error.__cause__, (OSError, MemoryError)):
            raise  # the disk's or the machine's fault, perhaps temporary: not kept
        return type(error)(path, error.reason)


def _conclude(path: Path, container: InputContainer, stream: VideoStream, packets: list[Packet]) -> Scan:
    starts = tuple(p.pts for p in packets if p.start in (Start.CLEAN, Start.OPEN) and p.pts is not None)
    solid_from = next((p.pts for p in packets if p.start is not None), None)
    times = np.array(sorted(p.pts for p in packets if p.pts is not None and not p.hidden), dtype=np.int64)
    head, show, shape = _head(path, stream, packets, solid_from)
    doubt = _doubt(container, stream, packets, times)
    if may_interlace(codec_of(stream), stream.codec_context.extradata):
        require_progressive(path, stream.index)
        doubt = doubt or "its pictures may be interlaced"
    if not show.by_decord:
        doubt = f"decord does not show it as a player does ({show.label})"
    frames = len(times)
    if container.format.name not in (MP4, MATROSKA) or not _times_hold(packets, times, head):
        frames, times, starts = _count(path, stream.index, solid_from), times[:0], ()
        doubt = doubt or "its times are not reliable"
    elif head[0].pts != times[0]:
        # A cut kept pictures whose references it lost. No decoder shows them: they are not in the clip.
        doubt = doubt or "its first pictures cannot be decoded"
        solid_from = int(head[0].pts or 0)
        times = times[times >= solid_from]
        frames = len(times)
    height, width = show.size
    fps = _fps(stream, times, exact=frames == len(packets))
    info = ClipInfo(frames, fps, width, height, codec_of(stream), not doubt, doubt)
    tick, last = stream.time_base or Fraction(1), _last(packets, times)
    return Scan(info, times, starts, stream.index, show, shape, solid_from, tick, last)


def _last(packets: list[Packet], times: NDArray[np.int64]) -> int:
    """How long the last frame is shown, in ticks: by its packet, or else as long as most of the others."""
    if not len(times):
        return 0
    said = next(p.lasts for p in packets if p.pts == times[-1])
    return said or max(1, round(float(np.median(np.diff(times))))) if len(times) > 1 else max(1, said)


def _head(
    path: Path, stream: VideoStream, packets: list[Packet], solid_from: int | None
) -> tuple[list[VideoFrame], Presentation, Fraction | int]:
    """The first frame: it shows that the file decodes, how it is shown, and what a cut has lost.

    Where the decoder should reorder pictures but the packets' times are in file order, as after passing through a
    container without presentation times, it reads some more frames, to see whose times they get.
    """
    in_file_order = all(a.pts < b.pts for a, b in pairwise(packets) if a.pts is not None and b.pts is not None)
    count = 16 if in_file_order and stream.codec_context.has_b_frames else 1
    with opened(path, stream.index) as (container, video):
        frames = list(islice(decode(path, container.demux(video), solid_from), count))
        if not frames:
            raise ClipError(path, "has no frame that can be decoded")
        return frames, presentation_of(path, video, frames[0]), video.codec_context.sample_aspect_ratio or 1


def _times_hold(packets: list[Packet], times: NDArray[np.int64], head: list[VideoFrame]) -> bool:
    """Whether every frame has its own time, and the decoder gives frames the times of their packets."""
    shown = [frame.pts for frame in head]
    if any(p.pts is None for p in packets) or len(np.unique(times)) != len(times):
        return False
    if any(a is None or b is None or a >= b for a, b in pairwise(shown)) or shown[0] not in times:
        return False
    # From a clean start nothing is lost, so the first frame must be the first.
    return bool(shown[0] == times[0]) or packets[0].start is not Start.CLEAN


def _count(path: Path, stream: int, solid_from: int | None) -> int:
    """Number of frames in the file, by decoding all of it."""
    with opened(path, stream) as (container, video):
        count = 0
        for frame in decode(path, container.demux(video), solid_from):
            refuse_interlaced(path, frame)
            count += 1
        return count


def _doubt(container: InputContainer, stream: VideoStream, packets: list[Packet], times: NDArray[np.int64]) -> str:
    """Why decord may give other frames than requested; empty when it will not."""
    codec = codec_of(stream)
    if codec not in TRUSTED_CODECS:
        return f"decord is not exact with {codec}"
    if container.format.name not in (MP4, MATROSKA):
        return f"decord is not exact with {container.format.name}"
    pixels = stream.codec_context.format
    if pixels is None or any(component.bits > 8 for component in pixels.components):
        return "decord converts deep colour to 8 bits differently"
    if len(container.streams.video) > 1:
        return "it has more than one video stream"
    if any(p.hidden for p in packets):
        return "an edit list hides some of its frames"
    if not all(p.steady for p in packets):
        return "its parameters may change midway"
    if packets[0].start is not Start.CLEAN or any(p.start in (Start.OPEN, Start.UNSAFE) for p in packets):
        return "not every keyframe is a clean start (open GOP)"
    if _any_leading(packets):
        return "pictures are shown before the keyframe that they follow"
    # Lost clusters of a damaged Matroska file leave only a gap. Variable frame rates have gaps, too: be careful.
    gaps = np.diff(times)
    if container.format.name == MATROSKA and len(gaps) and gaps.max() > 2.5 * np.median(gaps):
        return "its frames are unevenly spaced"
    return ""


def _any_leading(packets: list[Packet]) -> bool:
    key: int | None = None
    for packet in packets:
        if packet.start is not None:
            key = packet.pts
        elif key is not None and packet.pts is not None and packet.pts < key:
            return True
    return False


def _fps(stream: VideoStream, times: NDArray[np.int64], exact: bool) -> float:
    """Frames per second: the stream's own average, measured where a cut or FFmpeg's guess makes that wrong."""
    declared = float(stream.average_rate or stream.guessed_rate or 0)
    if len(times) < 2 or not stream.time_base:
        return declared
    measured = float((len(times) - 1) / ((times[-1] - times[0]) * stream.time_base))
    return declared if exact and abs(declared / measured - 1) < 0.01 else measured
