"""Videos of a report: frames of two laid over each other, and clips in a form that browsers play."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.video_files import encode_h264, find_videos, read_video
from luve_lightning.files import find_json
from luve_lightning.reporting.page import Unreadable, data_uri

_LOSSLESS_PIXELS = 512 * 512  # larger ones are stored at high quality: a 4K frame would take 10 MB losslessly
_QUALITY = 92
_FRAMES = 3


@dataclass(frozen=True)
class Comparison:
    """Two videos to compare.

    Attributes:
        a: video file shown left of the divider.
        b: video file shown right of it.
        labels: names of the two; default the names of their folders.
        frames: numbers of the frames to show; default three, equally spaced, including first and last.
        caption: caption of the comparison.
    """

    a: Path
    b: Path
    labels: tuple[str, str] | None = None
    frames: list[int] | None = None
    caption: str = ""


@dataclass(frozen=True)
class FramePair:
    """One frame of both videos, as data URIs of the pictures."""

    number: int
    a: str
    b: str


@dataclass(frozen=True)
class ComparedFrames:
    """The displayed content of a comparison.

    Attributes:
        name: name in the configuration.
        labels: names of the left and the right one.
        caption: caption of the comparison.
        sizes: height and width of the frames of both.
        pairs: at least one.
        note: how the pictures are stored, and what else a viewer must know.
    """

    name: str
    labels: tuple[str, str]
    caption: str
    sizes: tuple[tuple[int, int], tuple[int, int]]
    pairs: tuple[FramePair, ...]
    note: str

    @property
    def size(self) -> tuple[int, int]:
        """Size of the larger ones."""
        return max(self.sizes)

    @property
    def characters(self) -> int:
        """Number of characters it adds to the page."""
        return sum(len(pair.a) + len(pair.b) for pair in self.pairs)


def read_comparison(name: str, comparison: Comparison) -> ComparedFrames:
    """Read the frames of both videos.

    Frames of different sizes are laid over each other at the size of the larger ones; the smaller ones' pixels are
    enlarged, not smoothed.

    Raises:
        FileNotFoundError: a file is missing.
        Unreadable: sizes of different shape, or a frame that one of them lacks.
        ClipError: a video cannot be read.
    """
    for side, path in (("a", comparison.a), ("b", comparison.b)):
        if not path.is_file():
            raise FileNotFoundError(f"{side}: {path} is missing")
    frames = [read_video(path)[0] for path in (comparison.a, comparison.b)]
    sizes = [(video.shape[1], video.shape[2]) for video in frames]
    if sizes[0][0] * sizes[1][1] != sizes[0][1] * sizes[1][0]:
        raise Unreadable(f"frames of {_size(sizes[0])} and of {_size(sizes[1])} have different shapes")
    length = min(len(video) for video in frames)
    numbers = comparison.frames
    if numbers is None:
        numbers = np.unique(np.linspace(0, length - 1, min(_FRAMES, length)).round().astype(int)).tolist()
    wrong = [number for number in numbers if not 0 <= number < length]
    if wrong or not numbers:
        raise Unreadable(f"frames: expected numbers from 0 to {length - 1}, got {numbers}")
    pairs = tuple(FramePair(n, _picture(frames[0][n]), _picture(frames[1][n])) for n in numbers)
    labels = comparison.labels or (comparison.a.parent.name, comparison.b.parent.name)
    note = _note(sizes, [len(video) for video in frames])
    return ComparedFrames(name, labels, comparison.caption, (sizes[0], sizes[1]), pairs, note)


def _picture(frame: np.ndarray) -> str:
    target = io.BytesIO()
    lossless = _is_lossless(frame.shape[:2])
    Image.fromarray(frame).save(target, "WEBP", lossless=lossless, quality=80 if lossless else _QUALITY, method=4)
    return data_uri(target.getvalue(), "image/webp")


def _is_lossless(size: Sequence[int]) -> bool:
    return size[0] * size[1] <= _LOSSLESS_PIXELS


def _note(sizes: Sequence[tuple[int, int]], lengths: Sequence[int]) -> str:
    kept = "lossless" if all(_is_lossless(size) for size in sizes) else f"WebP of quality {_QUALITY}"
    told = f"{_size(sizes[0])} pixels, {kept}"
    if sizes[0] != sizes[1]:
        told = f"{_size(sizes[0])} against {_size(sizes[1])} pixels, the smaller enlarged without smoothing, {kept}"
    if lengths[0] != lengths[1]:
        told += f"; the videos have {lengths[0]} and {lengths[1]} frames, paired by number"
    return told


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


_CRF = 18


@dataclass(frozen=True)
class PageVideo:
    """A video of the page.

    Attributes:
        name: name in the configuration, with the file's name where that names a folder.
        prompt: from the JSON file beside it; empty without one.
        note: its frames, rate and size, and whether it was re-encoded.
        height: height of a frame, pixels.
        width: width of a frame, pixels.
        address: data URI of the mp4 file.
    """

    name: str
    prompt: str
    note: str
    height: int
    width: int
    address: str

    @property
    def characters(self) -> int:
        """Number of characters it adds to the page."""
        return len(self.address)


def sample_files(name: str, path: Path) -> list[tuple[str, Path]]:
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
        return [(f"{name}: {file.stem}", file) for file in files]
    if path.is_file():
        return [(name, path)]
    raise FileNotFoundError("missing")


def read_sample(name: str, path: Path) -> PageVideo:
    """Read a video as browsers play it: H.264 in mp4, 8-bit 4:2:0; any other is re-encoded.

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
    prompt = find_json(path.with_suffix(".json")).get("prompt")  # a video need not have one
    return prompt if isinstance(prompt, str) else ""
