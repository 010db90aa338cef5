"""Where decoding may start: what the packet of a keyframe says, beneath what its container claims.

A container marks as keyframe what its muxer was told. H.264 and HEVC have keyframes of several kinds, and
only some are a clean start: after an IDR picture nothing refers to, or is shown, before it (ITU-T H.264
7.4.1.2.4, H.265 7.4.2.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum


class Start(Enum):
    """How decoding may start at a keyframe."""

    CLEAN = "clean"
    """Everything from here on decodes, and nothing after it is shown before it."""
    OPEN = "open"
    """Everything shown from here on decodes; pictures that follow but are shown earlier may not."""
    UNSAFE = "unsafe"
    """Not known to be a place to start."""


def random_access(codec: str, packet: bytes, extradata: bytes | None) -> Start:
    """Tell how decoding may start at a packet that its container marks as a keyframe.

    Args:
        codec: FFmpeg's name of the codec.
        packet: the packet's bytes, as an mp4 or Matroska file holds them.
        extradata: the stream's configuration record (avcC, hvcC).
    """
    if codec == "h264":
        return _h264(packet, extradata)
    if codec in ("hevc", "h265"):
        return _hevc(packet, extradata)
    # A keyframe of VP8, VP9 or AV1 resets every reference, and what is coded after it is shown after it.
    return Start.CLEAN if codec in ("vp8", "vp9", "av1") else Start.OPEN


def _h264(packet: bytes, extradata: bytes | None) -> Start:
    if not extradata or len(extradata) < 7 or extradata[0] != 1:
        return Start.UNSAFE
    recovers = False
    for nal in _nals(packet, (extradata[4] & 3) + 1):
        kind = nal[0] & 0x1F
        if kind == 5:
            return Start.CLEAN
        # An SEI recovery point (payload type 6) opens with recovery_frame_cnt as Exp-Golomb: first bit 1
        # means 0 frames.
        if kind == 6 and len(nal) > 3 and nal[1] == 6 and nal[3] & 0x80:
            recovers = True
    return Start.OPEN if recovers else Start.UNSAFE


def _hevc(packet: bytes, extradata: bytes | None) -> Start:
    if not extradata or len(extradata) < 23 or extradata[0] != 1:
        return Start.UNSAFE
    kinds = {nal[0] >> 1 & 0x3F for nal in _nals(packet, (extradata[21] & 3) + 1)}
    if kinds & {19, 20}:  # IDR_W_RADL, IDR_N_LP
        return Start.CLEAN
    return Start.OPEN if kinds & set(range(16, 22)) else Start.UNSAFE


def _nals(packet: bytes, length_size: int) -> Iterator[bytes]:
    """The heads (at most 8 bytes) of a packet's NAL units, up to the first whose length cannot be."""
    position = 0
    while position + length_size < len(packet):
        size = int.from_bytes(packet[position : position + length_size], "big")
        position += length_size
        if size == 0 or position + size > len(packet):
            return
        yield packet[position : position + min(size, 8)]
        position += size
