"""Videos inside the page, in a form that browsers play."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.video_files import encode_h264, find_videos, read_video
from luve_lightning.reporting.document import data_uri
from luve_lightning.reporting.provenance import Unreadable

_CRF = 18


@dataclass(frozen=True)
class PageVideo:
    """A video of the page.

    Attributes:
        name: in the configuration, with the file's name where that names a folder.
        prompt: from the JSON file beside it; empty without one.
        note: its frames, rate and size, and whether it was encoded again.
        height: of a frame, pixels.
        width: of a frame, pixels.
        address: holds the mp4 file.
    """

    name: str
    prompt: str
    note: str
    height: int
    width: int
    address: str

    @property
    def characters(self) -> int:
        """How much of the page it takes."""
        return len(self.address)


def sample_files(name: str, path: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of each video that an input names: a file, or every video of a folder.

    Raises:
        FileNotFoundError: no such file, or no videos in the folder.
        Unreadable: two videos of one name.
    """
    if path.is_dir():
        try:
            files = find_videos(path)
        except FileNotFoundError:
            raise FileNotFoundError("missing: no videos in this folder") from None
        except ValueError as error:
            raise Unreadable(str(error)) from None
        yield from ((f"{name}: {file.stem}", file) for file in files)
    elif path.is_file():
        yield name, path
    else:
        raise FileNotFoundError("missing")


def read_sample(name: str, path: Path) -> PageVideo:
    """Read a video as browsers play it: H.264 in mp4, 8-bit 4:2:0; any other is encoded again.

    Raises:
        ClipError: it cannot be read.
        Unreadable: it does not say its frames per second.
    """
    frames, fps = read_video(path)  # also finds out whether all of it can be decoded
    if fps <= 0:
        raise Unreadable("it does not say its frames per second")
    content, note = path.read_bytes(), "the file as it is"
    if not _plays(path):
        content, note = _encoded(frames, fps), f"encoded again for browsers (H.264, CRF {_CRF})"
    count, height, width = frames.shape[:3]
    told = f"{count} frames, {fps:g} per second, {height}x{width}; {note}"
    return PageVideo(name, _prompt(path), told, height, width, data_uri(content, "video/mp4"))


def _plays(path: Path) -> bool:
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            kind = (stream.codec_context.name, stream.codec_context.pix_fmt)
            return path.suffix.lower() == ".mp4" and kind == ("h264", "yuv420p")
    except (av.FFmpegError, IndexError, UnicodeDecodeError) as error:
        raise ClipError(path, f"cannot be read: {error}") from error


def _encoded(frames: np.ndarray, fps: float) -> bytes:
    # 4:2:0 has even sides only.
    odd = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
    even = np.pad(frames, odd, mode="edge")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "video.mp4"
        encode_h264(target, even, Fraction(fps).limit_denominator(1001), _CRF)
        return target.read_bytes()


def _prompt(path: Path) -> str:
    beside = path.with_suffix(".json")
    try:
        content = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""  # a video need not have one
    prompt = content.get("prompt") if isinstance(content, dict) else None
    return prompt if isinstance(prompt, str) else ""
