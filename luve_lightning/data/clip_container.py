"""What every part of clip reading shares: the error, the facts about a file, its bitstream and decoding."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.codec.hwaccel import HWAccel
    from av.container import InputContainer
    from av.video.stream import VideoStream


# FFmpeg's names of the containers with reliable times.
MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
MATROSKA = "matroska,webm"

Frames = NDArray[np.uint8]
"""Decoded frames: uint8, frames x height x width x 3, red first."""


class ClipError(RuntimeError):
    """A file that does not give the requested frames.

    Args:
        path: the file.
        reason: what is wrong with it, as the end of a sentence. Omitted when `path` is a whole message, which is
            how a DataLoader re-raises a worker's exception.
    """

    def __init__(self, path: str | Path, reason: str = "") -> None:
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.reason else str(self.path)


class RefusedClip(ClipError):
    """A sound file that a player shows in a way that cannot be reproduced here."""


@dataclass(frozen=True)
class ClipInfo:
    """Facts about a video file, measured from its packets rather than believed from its header.

    Attributes:
        frames: number of readable frames, in presentation order.
        fps: average frames per second, 0 when the file does not say.
        width: width of a frame as shown (square pixels, turned), pixels.
        height: height of a frame as shown, pixels.
        codec: FFmpeg's name of the codec: "h264", "hevc", "vp9", "av1", ...; empty when unknown.
        trusted_by_decord: whether decord gives exactly the requested frames.
        doubt: why not, when it does not.
    """

    frames: int
    fps: float
    width: int
    height: int
    codec: str
    trusted_by_decord: bool
    doubt: str = ""


# FFmpeg recognises these by their content, whatever the file's name, and takes the pictures from other files. The
# bytes of such a text vouch for none of them.
_LISTS = frozenset({"concat", "dash", "hls", "image2", "imf", "sdp", "webm_dash_manifest"})


@lru_cache(maxsize=1)
def has_pyav() -> bool:
    """Whether PyAV can be imported here."""
    try:
        import av  # noqa: F401
    except (ImportError, OSError):  # OSError: one of the wheel's shared libraries does not load
        return False
    return True


def file_facts(path: Path) -> tuple[int, int]:
    """A file's size in bytes and time of its last change in ns; ClipError when there is nothing to read."""
    try:
        facts = path.stat()
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be opened: {error.strerror}"
        raise ClipError(path, reason) from None
    if not path.is_file():
        raise ClipError(path, "is not a file")
    if facts.st_size == 0:
        raise ClipError(path, "is empty (0 bytes)")
    return facts.st_size, facts.st_mtime_ns


@contextmanager
def opened(
    path: Path, stream_index: int | None = None, accelerator: HWAccel | None = None
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file for strict decoding on one thread; every error inside becomes a ClipError.

    Args:
        path: the file.
        stream_index: stream to read; None takes the first that is neither cover art nor anything but video.
        accelerator: hardware that decodes the codecs that it knows; None decodes all in software.
    """
    import av

    try:
        # Absolute, so that a name with a colon is not taken for a protocol. Titles in an unknown encoding are no
        # failure.
        with av.open(os.fspath(path.absolute()), metadata_errors="replace", hwaccel=accelerator) as container:
            if not _LISTS.isdisjoint(container.format.name.split(",")):
                raise RefusedClip(path, f"is a list of other files ({container.format.name}), not a video")
            if container.format.name.endswith("_pipe"):  # a picture by its content, which FFmpeg decodes as stored
                kind = container.format.name.removesuffix("_pipe")
                raise RefusedClip(path, f"is a picture of a kind that is not read ({kind}); save it as PNG")
            stream = _video_stream(path, container, stream_index)
            if stream.codec_context is None:
                raise ClipError(path, "has a codec that FFmpeg does not know here, or is encrypted")
            stream.codec_context.thread_count = 1  # DataLoader workers run in parallel already
            stream.codec_context.thread_type = "NONE"
            if stream.codec_context.codec.canonical_name == "hevc":
                # FFmpeg marks the frames that it repaired in H.264, but hardly any in HEVC: there it must stop at
                # errors. In H.264 stopping finds no more, and refuses sound pictures after open-GOP seeks.
                stream.codec_context.options = {"err_detect": "explode"}
            yield container, stream
    except ClipError:
        raise
    # PyAV raises IndexError on audio-only files and UnicodeDecodeError (a ValueError) on some corrupt ones.
    except (av.error.FFmpegError, OSError, ValueError, LookupError, RuntimeError, MemoryError) as error:
        raise ClipError(path, f"cannot be read: {_words(error)}{_look(path, error)}") from error


def _look(path: Path, error: BaseException) -> str:
    """What a file that FFmpeg does not know looks like, in brackets; empty when its first bytes do not tell."""
    import av

    if not isinstance(error, av.error.InvalidDataError):
        return ""
    with suppress(OSError), path.open("rb") as file:
        start = file.read(4096)
        if start[4:8] == b"ftyp":
            return "" if _has_index(file) else " (cut short: its index, the moov box, is missing)"
        if not any(start):
            return " (zeros instead of a video: an unfinished download?)"
        with suppress(UnicodeDecodeError):
            text = start.decode(
                "utf-8-sig", errors="strict" if len(start) < 4096 else "ignore"
            )  # a character may be cut
            if all(letter.isprintable() or letter in "\r\n\t" for letter in text):
                return " (it is text)"
    return ""


def _has_index(file: BinaryIO) -> bool:
    """Whether an mp4 has a box of frames' places and times."""
    at = 0
    while True:
        file.seek(at)
        head = file.read(16)
        if len(head) < 8 or head[4:8] == b"moov":
            return len(head) >= 8
        size = int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\1" else head[:4])
        if size < 8:  # up to the file's end
            return False
        at += size


def _video_stream(path: Path, container: InputContainer, index: int | None) -> VideoStream:
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise ClipError(path, f"has no video stream (it looks like {container.format.name})")
    if index is not None:
        return next(s for s in streams if s.index == index)
    first, *others = streams
    if others and not first.disposition & Disposition.default:
        # Players show the one that is marked; otherwise they do not agree.
        marked = next((n for n, s in enumerate(streams) if s.disposition & Disposition.default), None)
        if marked is not None:
            raise RefusedClip(
                path,
                f"has {len(streams)} video streams, and players show number {marked + 1}; keep that one "
                f"(ffmpeg -map 0:v:{marked} -c copy)",
            )
    return first


def _words(error: BaseException) -> str:
    """An exception in words, without the file name and number that FFmpeg's errors repeat."""
    strerror = getattr(error, "strerror", None)
    return str(strerror) if strerror else f"{type(error).__name__}: {error}"


def decode(path: Path, packets: Iterable[Packet[VideoStream]], solid_from: int | None = None) -> Iterator[VideoFrame]:
    """Decode packets; a failure means damage.

    Args:
        path: file, for the error.
        packets: the packets of one stream, in file order.
        solid_from: pts from which on everything must decode. Pictures shown before it may refer to ones that were
            not read, or that a cut removed, and are skipped.

    Yields:
        Frames in presentation order.
    """
    import av

    for packet in packets:
        may_fail = solid_from is not None and packet.pts is not None and packet.pts < solid_from
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            if may_fail:
                continue
            raise ClipError(path, f"is damaged{_moment(packet)}: {_words(error)}") from error
        for frame in frames:
            if not frame.is_corrupt:
                yield frame
            elif solid_from is None or frame.pts is None or frame.pts >= solid_from:
                raise ClipError(path, f"is damaged{_moment(packet)}: a frame is incomplete")


def _moment(packet: Packet[VideoStream]) -> str:
    return "" if packet.pts is None else f" near second {float(packet.pts * packet.time_base):.2f}"


class Start(Enum):
    """How decoding may start at a keyframe."""

    CLEAN = "clean"
    """Everything from here on decodes, and nothing after it is shown before it."""
    OPEN = "open"
    """Everything shown from here on decodes; pictures that follow but are shown earlier may not."""
    UNSAFE = "unsafe"
    """Not known to be a place to start."""


def random_access(codec: str, packet: bytes, extradata: bytes | None) -> Start:
    """How decoding may start at a packet that its container marks as a keyframe.

    Args:
        codec: FFmpeg's name of the codec.
        packet: the packet's bytes, as stored in an mp4 or Matroska file.
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

    Each picture says whether it does. Other codecs are judged by their first picture.
    """
    if codec != "h264":
        return False
    found = _parameter_sets(extradata)
    return not found or not all(map(_frames_only, found))


def steady_parameters(packet: bytes, extradata: bytes | None) -> bool:
    """Whether an H.264 packet brings no parameters (size, pixel shape, colour) but the stream's only ones."""
    known = _parameter_sets(extradata)
    if len(known) != 1 or not extradata:
        return False
    brought = _nals(packet, (extradata[4] & 3) + 1, whole=True)
    return all(nal in known for nal in brought if nal[0] & 0x1F == 7)


def _parameter_sets(extradata: bytes | None) -> list[bytes]:
    """The sequence parameter sets in an avcC record."""
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
        self.data, self.at = nal.replace(b"\0\0\3", b"\0\0"), 8  # without the bytes that prevent start codes

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
    """A packet's NAL units or their heads (at most 8 bytes), up to the first with an impossible length."""
    position = 0
    while position + length_size < len(packet):
        size = int.from_bytes(packet[position : position + length_size], "big")
        position += length_size
        if size == 0 or position + size > len(packet):
            return
        yield packet[position : position + (size if whole else min(size, 8))]
        position += size
