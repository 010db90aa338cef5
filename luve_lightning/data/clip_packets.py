"""The packets of a video file, without decoding them, and whether they are all there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from luve_lightning.data.clip_container import ClipError, Start, random_access, steady_parameters

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
MATROSKA = "matroska,webm"


@dataclass(frozen=True)
class Packet:
    """What matters of one packet of the video stream.

    Attributes:
        pts: when its picture is shown, in the stream's time base.
        end: when the next one is, seconds; `pts` when the file does not say how long it lasts.
        hidden: an edit list leaves it out.
        start: how decoding may start here; None when it is not a keyframe.
        steady: it does not change the parameters of an H.264 stream, as far as keyframes are concerned.
    """

    pts: int | None
    end: float
    hidden: bool
    start: Start | None
    steady: bool = True


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
        found.append(Packet(packet.pts, end, packet.is_discard, start, steady))
    if not found:
        raise ClipError(path, "has a video stream without a single frame")
    _check_whole(path, container, stream, found, end_of_all)
    return found


def _check_whole(
    path: Path, container: InputContainer, stream: VideoStream, found: list[Packet], end_of_all: float
) -> None:
    """Compare the packets with what the container promises: no library minds a truncated file."""
    # An mp4's edit list may leave packets out of its index, so there the index counts, elsewhere the header.
    promised = len(stream.index_entries) if container.format.name == MP4 else stream.frames
    if len(found) < promised:
        raise ClipError(path, f"is cut short: {len(found)} of {promised} packets are there")
    if container.format.name != MATROSKA:
        return
    times = sorted(packet.pts for packet in found if packet.pts is not None)
    tick = float(stream.time_base or 0)
    one_frame = float(np.median(np.diff(times))) * tick if len(times) > 1 else 0.0
    # Some muxers write no duration for a packet: then it lasts until the next one would come.
    end = max(packet.end for packet in found)
    end = max(end, times[-1] * tick + one_frame) if times else end
    duration = _seconds(stream.metadata.get("DURATION", ""))
    if duration is None and container.duration:
        duration, end = container.duration / 1e6, max(end, end_of_all)
    # Matroska rounds every time to its tick: the length of a frame, too, which is all that a clip of one frame has.
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
