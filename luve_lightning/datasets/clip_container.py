"""Opening a video file with PyAV and decoding it strictly: damage is an error, never a guess."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from luve_lightning.datasets.clip_types import ClipError, RefusedClip

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

# FFmpeg tells these by their content, whatever the file is called, and takes the pictures from other files. The bytes
# of such a text vouch for none of them.
_LISTS = frozenset({"concat", "dash", "hls", "image2", "imf", "sdp", "webm_dash_manifest"})


@lru_cache(maxsize=1)
def has_pyav() -> bool:
    """Whether PyAV can be imported here."""
    try:
        import av  # noqa: F401
    except (ImportError, OSError):  # OSError: a shared library of the wheel does not load
        return False
    return True


def file_facts(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns of a file; ClipError when there is nothing to read."""
    try:
        facts = path.stat()
    except OSError as error:
        reason = (
            "is missing" if isinstance(error, FileNotFoundError) else f"cannot be opened: {error.strerror}"
        )
        raise ClipError(path, reason) from None
    if not path.is_file():
        raise ClipError(path, "is not a file")
    if facts.st_size == 0:
        raise ClipError(path, "is empty (0 bytes)")
    return facts.st_size, facts.st_mtime_ns


@contextmanager
def opened(path: Path, stream_index: int | None = None) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file for strict decoding on one thread; whatever goes wrong within is a ClipError.

    Args:
        path: the file.
        stream_index: the stream to read; None takes the first that is neither cover art nor anything but
            video.
    """
    import av

    try:
        # Absolute, so that a name with a colon is not taken for a protocol. Titles in an unknown encoding are
        # no failure.
        with av.open(os.fspath(path.absolute()), metadata_errors="replace") as container:
            if not _LISTS.isdisjoint(container.format.name.split(",")):
                raise RefusedClip(path, f"is a list of other files ({container.format.name}), not a video")
            stream = _video_stream(path, container, stream_index)
            if stream.codec_context is None:
                raise ClipError(path, "has a codec that FFmpeg does not know here, or is encrypted")
            stream.codec_context.thread_count = 1  # DataLoader workers are the parallelism
            stream.codec_context.thread_type = "NONE"
            if stream.codec_context.codec.canonical_name == "hevc":
                # FFmpeg marks frames that it patched up in H.264, but hardly any in HEVC: there it must stop
                # at errors. In H.264 that finds no more, and refuses sound pictures after open-GOP seeks.
                stream.codec_context.options = {"err_detect": "explode"}
            yield container, stream
    except ClipError:
        raise
    # PyAV raises IndexError on files of sound only and UnicodeDecodeError (a ValueError) on some corrupt
    # ones.
    except (av.error.FFmpegError, OSError, ValueError, LookupError, RuntimeError, MemoryError) as error:
        raise ClipError(path, f"cannot be read: {_words(error)}") from error


def _video_stream(path: Path, container: InputContainer, index: int | None) -> VideoStream:
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise ClipError(path, f"has no video stream (it looks like {container.format.name})")
    if index is not None:
        return next(s for s in streams if s.index == index)
    first, *others = streams
    if others and not first.disposition & Disposition.default:
        # Players show the one that is marked; which it is otherwise, they do not agree on.
        marked = next((n for n, s in enumerate(streams) if s.disposition & Disposition.default), None)
        if marked is not None:
            raise RefusedClip(
                path,
                f"has {len(streams)} video streams, and players show number {marked + 1}; keep that one "
                f"(ffmpeg -map 0:v:{marked} -c copy)",
            )
    return first


def _words(error: BaseException) -> str:
    """An exception in words, less the file name and number that FFmpeg's errors repeat."""
    strerror = getattr(error, "strerror", None)
    return str(strerror) if strerror else f"{type(error).__name__}: {error}"


def decode(
    path: Path, packets: Iterable[Packet[VideoStream]], solid_from: int | None = None
) -> Iterator[VideoFrame]:
    """Decode packets; one that fails is damage.

    Args:
        path: for the error.
        packets: the packets of one stream, in file order.
        solid_from: pts from which on everything must decode. Pictures shown before it may refer to ones that
            were not read, or not kept when the file was cut, and are passed over.

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
