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


def may_interlace(codec: str, extradata: bytes | None) -> bool:
    """Whether an H.264 stream may hold fields (frame_mbs_only_flag 0), or does not say so in its extradata.

    Whether it does, each picture says. Other codecs are judged by their first picture.
    """
    if codec != "h264":
        return False
    found = _parameter_sets(extradata)
    return not found or not all(map(_frames_only, found))


def steady_parameters(packet: bytes, extradata: bytes | None) -> bool:
    """Whether an H.264 packet brings no parameters (size, shape of pixels, colour) but the stream's only ones."""
    known = _parameter_sets(extradata)
    if len(known) != 1 or not extradata:
        return False
    brought = _nals(packet, (extradata[4] & 3) + 1, whole=True)
    return all(nal in known for nal in brought if nal[0] & 0x1F == 7)


def _parameter_sets(extradata: bytes | None) -> list[bytes]:
    """The sequence parameter sets of an avcC record."""
    found: list[bytes] = []
    if not extradata or len(extradata) < 7 or extradata[0] != 1:
        return found
    position = 6
    for _ in range(extradata[5] & 31):
        size = int.from_bytes(extradata[position : position + 2], "big")
        found.append(extradata[position + 2 : position + 2 + size])
        position += 2 + size
    return found


class _Bits:
    """Reads the fields of a NAL unit; IndexError at its end."""

    def __init__(self, nal: bytes) -> None:
        self.data, self.at = nal.replace(b"\0\0\3", b"\0\0"), 8  # less the bytes that prevent start codes

    def flag(self) -> int:
        bit = self.data[self.at >> 3] >> (7 - (self.at & 7)) & 1
        self.at += 1
        return bit

    def number(self) -> int:
        """An Exp-Golomb code."""
        zeros = 0
        while not self.flag():
            zeros += 1
        value = 1
        for _ in range(zeros):
            value = 2 * value + self.flag()
        return value - 1

    def signed(self) -> int:
        """A signed Exp-Golomb code."""
        value = self.number()
        return (value + 1) // 2 if value % 2 else -(value // 2)


def _frames_only(parameters: bytes) -> bool:
    """frame_mbs_only_flag of a sequence parameter set (ITU-T H.264 7.3.2.1.1); False where it cannot be parsed."""
    bits = _Bits(parameters)
    try:
        profile = bits.data[1]
        bits.at += 24
        bits.number()
        if profile in (100, 110, 122, 244, 44, 83, 86, 118, 128, 134, 135, 138, 139):
            chroma = bits.number()
            if chroma == 3:
                bits.flag()
            bits.number(), bits.number(), bits.flag()
            if bits.flag():
                for place in range(12 if chroma == 3 else 8):
                    if bits.flag():
                        _skip_scaling(bits, 16 if place < 6 else 64)
        bits.number()
        order = bits.number()
        if order == 0:
            bits.number()
        elif order == 1:
            bits.flag(), bits.signed(), bits.signed()
            for _ in range(bits.number()):
                bits.signed()
        bits.number(), bits.flag(), bits.number(), bits.number()
        return bool(bits.flag())
    except IndexError:
        return False


def _skip_scaling(bits: _Bits, count: int) -> None:
    last = following = 8
    for _ in range(count):
        if following:
            following = (last + bits.signed()) % 256
        last = following or last


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


def _nals(packet: bytes, length_size: int, whole: bool = False) -> Iterator[bytes]:
    """A packet's NAL units or their heads (at most 8 bytes), up to the first whose length cannot be."""
    position = 0
    while position + length_size < len(packet):
        size = int.from_bytes(packet[position : position + length_size], "big")
        position += length_size
        if size == 0 or position + size > len(packet):
            return
        yield packet[position : position + (size if whole else min(size, 8))]
        position += size
