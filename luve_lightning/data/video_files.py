"""Video and picture files: writing frames as H.264 in mp4 or PNG, the same bytes every time, and finding them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from threading import Condition, Thread

import numpy as np
from PIL import Image

from luve_lightning.data.clip_container import Frames
from luve_lightning.data.clips import probe_clip, read_clip
from luve_lightning.files import replacing

# No mbtree: in x264 it reads uninitialised memory, and the bytes differ from run to run.
_X264 = "lookahead-threads=1:mbtree=0:open-gop=0:keyint=16:min-keyint=16:scenecut=0"
_BT709 = "colorprim=bt709:transfer=bt709:colormatrix=bt709:range=tv"


def encode_h264(
    path: Path,
    frames: np.ndarray | _ArrivingFrames,
    fps: int | Fraction,
    crf: int | None,
    threads: int = 1,
    encoded: Callable[[], None] = lambda: None,
) -> None:
    """Encode frames into a file that is put in place atomically.

    Closed groups of 16 frames, a given number of threads, and no times or versions in the container, so equal frames
    give equal bytes. Lossy: yuv420p as in UltraVideo, tagged bt709 limited range and converted with that matrix.
    Lossless: RGB, without any conversion, by x264's fastest preset: a fifth more bytes, read some three times as fast.

    Args:
        path: target; its folder exists.
        frames: uint8 T x H x W x 3, H and W even when lossy.
        fps: frames per second.
        crf: x264's constant rate factor; None is lossless.
        threads: threads of the encoder; another number gives slightly other lossy frames.
        encoded: called before the file is put in place; where it raises, it is not.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    _, height, width, _ = frames.shape
    # The bitexact flag keeps the muxer's version out of the file.
    flags = {"fflags": "+bitexact", "movflags": "+faststart"}
    with (
        replacing(path) as temporary,
        _then(encoded),
        av.open(str(temporary), "w", format="mp4", options=flags) as container,
    ):
        stream = container.add_stream("libx264rgb" if crf is None else "libx264", rate=fps)
        stream.width, stream.height = width, height
        stream.pix_fmt = "rgb24" if crf is None else "yuv420p"
        rate = {"qp": "0", "preset": "ultrafast"} if crf is None else {"crf": str(crf), "preset": "medium"}
        parameters = f"threads={threads}:{_X264}" if crf is None else f"threads={threads}:{_X264}:{_BT709}"
        stream.options = {"threads": str(threads), "x264-params": parameters, **rate}
        if crf is not None:
            context = stream.codec_context
            context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
            context.color_primaries, context.color_trc = 1, 1
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if crf is not None:
                frame = frame.reformat(
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    src_color_range=ColorRange.JPEG,
                    dst_color_range=ColorRange.MPEG,
                )
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@contextmanager
def _then(call: Callable[[], None]) -> Iterator[None]:
    yield
    call()


# Visually lossless: measures on such a file concern the frames, not the encoder.
CRF = 10
GIT_LFS = "pointer of Git LFS"
"""What `kind_of_file` calls the small file that stands for one that was not downloaded."""
_LFS_START = "version https://git-lfs.github.com/spec/"
# Where in a file what stands, and what it then is.
_MAGIC = (
    (0, b"\x89PNG", "image (PNG)"), (0, b"\xff\xd8\xff", "image (JPEG)"), (0, b"GIF8", "image (GIF)"),
    (8, b"WEBP", "image (WebP)"), (4, b"ftyp", "video (MP4 or MOV)"), (0, b"\x1a\x45\xdf\xa3", "video (MKV or WebM)"),
    (8, b"AVI ", "video (AVI)"), (0, b"GGUF", "quantised weights (GGUF)"), (0, b"\x89HDF", "HDF5 file"),
    (0, b"PK", "zip archive"),
)  # fmt: skip
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".ts")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".avif", ".heic")
MAX_FPS = 240


def write_video(
    path: str | Path,
    frames: np.ndarray | _ArrivingFrames,
    fps: float,
    lossless: bool = False,
    threads: int = 1,
    encoded: Callable[[], None] = lambda: None,
) -> None:
    """Write frames as H.264 in mp4, atomically; equal frames give equal bytes.

    Lossy files are yuv420p tagged bt709, which every player shows. Lossless ones are RGB: `read_video` gives
    exactly the same frames back, but many players and browsers show nothing.

    Args:
        path: target, ending in .mp4; its folder is created.
        frames: uint8 T x H x W x 3, full-range sRGB; H and W even unless lossless.
        fps: frames per second, in (0, 240].
        lossless: whether to keep every bit.
        threads: see `encode_h264`.
        encoded: see `encode_h264`.

    Raises:
        ValueError: unsuitable frames, rates or file names.
    """
    path = Path(path)
    if path.suffix != ".mp4":
        raise ValueError(f"video files are written as .mp4, got {path}")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(
            f"{path}: expected uint8 frames T x H x W x 3, got {frames.dtype} {' x '.join(map(str, frames.shape))}"
        )
    height, width = frames.shape[1:3]
    if not lossless and (height % 2 or width % 2):
        raise ValueError(f"{path}: frames of {height}x{width}: expected even sides, or lossless=True")
    if not (math.isfinite(fps) and 0 < fps <= MAX_FPS):
        raise ValueError(f"{path}: fps: expected a number in (0, {MAX_FPS}], got {fps}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # 30000/1001 and its like are within 1e-6 of their decimals.
    rate = Fraction(fps).limit_denominator(1001)
    encode_h264(path, frames, rate, None if lossless else CRF, threads, encoded)


class _GivenUp(Exception):  # no error: whoever gave up knows
    """Ends the thread of a video that nobody wants any more."""


class _ArrivingFrames:
    """Frames that are still being made, uint8 T x H x W x 3; iterating waits for each.

    Args:
        frames: the array that is being filled.
    """

    def __init__(self, frames: np.ndarray) -> None:
        self.frames, self.shape, self.dtype, self.ndim = frames, frames.shape, frames.dtype, frames.ndim
        self._there, self._wanted, self._given_up = 0, False, False
        self._changed = Condition()

    def tell(self, there: int | None = None, wanted: bool = False, given_up: bool = False) -> None:
        """The first `there` frames are made; the video is to be put in place; or nobody wants it any more."""
        with self._changed:
            self._there = self._there if there is None else there
            self._wanted, self._given_up = self._wanted or wanted, self._given_up or given_up
            self._changed.notify_all()

    def __iter__(self) -> Iterator[np.ndarray]:
        for number in range(len(self.frames)):
            self._wait(partial(self._is_there, number))
            yield self.frames[number]

    def _is_there(self, number: int) -> bool:
        return number < self._there

    def wait_until_wanted(self) -> None:
        """Return when the video is to be put in place."""
        self._wait(lambda: self._wanted)

    def _wait(self, until: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._given_up or until())
            if self._given_up:
                raise _GivenUp


class VideoInProgress:
    """A video file that is written while its frames are made: the bytes that `write_video` would write afterwards.

    A thread encodes the frames that are there; `finish` puts the file in place. Leaving the context without it leaves
    whatever was there before.

    Args:
        path: target as of `write_video`. A picture is left to whoever has its frame.
        fps: frames per second.
        lossless: whether to keep every bit.
        threads: threads of the encoder.
    """

    def __init__(self, path: Path, fps: float, lossless: bool = False, threads: int = 1) -> None:
        self.path, self._how = path, (fps, lossless, threads)
        self._frames: _ArrivingFrames | None = None
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> VideoInProgress:
        return self

    def __exit__(self, *raised: object) -> None:
        self._give_up()

    def arrived(self, frames: np.ndarray, there: int) -> None:
        """Take note of frames; with another array the video begins anew.

        Args:
            frames: all frames, uint8 T x H x W x 3, some of which are yet to be made.
            there: number of those that are made, the first ones.
        """
        if self.path.suffix != ".mp4":
            return
        if self._frames is None or self._frames.frames is not frames:
            self._give_up()
            self._frames = _ArrivingFrames(frames)
            self._thread = Thread(target=self._write, args=(self._frames,), daemon=True)
            self._thread.start()
        self._frames.tell(there)

    def finish(self) -> bool:
        """Put the file in place, when it is encoded; False where no frames arrived, and there is none.

        Raises:
            ValueError: see `write_video`.
            OSError: likewise.
        """
        frames, thread = self._frames, self._thread
        if frames is None or thread is None:
            return False
        frames.tell(wanted=True)
        thread.join()
        self._frames = self._thread = None
        if self._error is not None:
            raise self._error
        return True

    def _write(self, frames: _ArrivingFrames) -> None:
        fps, lossless, threads = self._how
        try:
            write_video(self.path, frames, fps, lossless, threads, frames.wait_until_wanted)
        except _GivenUp:
            pass
        except BaseException as error:
            self._error = error

    def _give_up(self) -> None:
        if self._frames is not None and self._thread is not None:
            self._frames.tell(given_up=True)
            self._thread.join()
        self._frames = self._thread = self._error = None


def write_picture(path: Path, frame: np.ndarray) -> None:
    """Write a frame as PNG, atomically and without loss; equal frames give equal bytes.

    Args:
        path: target, ending in .png; its folder is created.
        frame: uint8 H x W x 3, sRGB.

    Raises:
        ValueError: unsuitable frames or file names.
    """
    if path.suffix != ".png":
        raise ValueError(f"pictures are written as .png, got {path}")
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3 or 0 in frame.shape:
        raise ValueError(f"{path}: expected uint8 H x W x 3, got {frame.dtype} {' x '.join(map(str, frame.shape))}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        Image.fromarray(np.ascontiguousarray(frame)).save(temporary, format="PNG")


def read_video(path: str | Path) -> tuple[Frames, float]:
    """Every frame of a video file.

    Uses PyAV, which notices damage inside a frame; decord fills it in silently.

    Args:
        path: any container and codec that `data/clips.py` reads.

    Returns:
        uint8 T x H x W x 3, full-range sRGB as a player shows them, and the frames per second (0 when the file
        does not say).

    Raises:
        ClipError: the file is missing, empty, corrupt, cut short, holds no video, or is shown in a way that cannot
            be reproduced; its text is one line.
    """
    info = probe_clip(path)
    return read_clip(path, 0, info.frames, backend="pyav"), info.fps


def find_videos(folder: str | Path, pictures: bool = False) -> list[Path]:
    """The video files of a folder by name, without those of subfolders and hidden ones.

    Args:
        folder: the folder.
        pictures: take pictures, too. Beside videos these are only those that `luve generate` or `luve upsample`
            made: with a JSON file of the same name.

    Raises:
        FileNotFoundError: when there is no such folder, or no video in it.
        ValueError: when a name is not UTF-8, or two files differ only in their suffix or in how an accent is
            written: a video is identified by its name without suffix.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of videos")
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    found = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    if pictures:
        found = sorted([*found, *_pictures(files, beside={path.stem for path in found})])
    if not found:
        known = VIDEO_SUFFIXES + (PICTURE_SUFFIXES if pictures else ())
        raise FileNotFoundError(f"{folder}: no videos there{', nor pictures' if pictures else ''} ({', '.join(known)})")
    stems: dict[str, Path] = {}
    for path in found:
        if any("\ud800" <= sign <= "\udfff" for sign in path.name):
            raise ValueError(f"{folder}: {path.name!a}: expected file names in UTF-8; rename it")
        first = stems.setdefault(video_name(path), path)
        if first != path:
            raise ValueError(f"{folder}: {first.name} and {path.name} have the same name")
    return found


def _pictures(files: list[Path], beside: set[str]) -> list[Path]:
    """Those of some files that stand for themselves; `beside` are the stems of the videos among them."""
    made = {path.stem for path in files if path.suffix == ".json"} - beside if beside else None
    found = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES and (made is None or path.stem in made)]
    # A JPEG beside a PNG of the same name is its contact sheet.
    stored = {path.stem for path in found if path.suffix == ".png"}
    return [path for path in found if path.suffix != ".jpg" or path.stem not in stored]


NAME_BYTES = 255  # limit of a file name, on nearly every file system
_LONGEST_SUFFIX = 16  # for what is appended to a user's name: -differences.csv


def check_name(name: str, what: str, signs: str = " _.+-") -> None:
    """Refuse a user's name that cannot become a file or folder inside its parent.

    Args:
        name: letters, digits and marks of any script, and some signs.
        what: option or place, for the message.
        signs: allowed signs; a name begins with none of space, "." and "-".

    Raises:
        ValueError: says what would be right.
    """
    plain = all(unicodedata.category(sign)[0] in "LMN" or sign in signs for sign in name)
    if not name or not plain or name[0] in " .-" or unicodedata.category(name[0])[0] == "M":
        shown = " ".join(signs.replace(" ", ""))
        raise ValueError(f"{what} {name!r}: expected letters, digits, spaces and {shown}, a letter or digit first")
    size, most = len(name.encode()), NAME_BYTES - _LONGEST_SUFFIX
    if size > most:
        raise ValueError(
            f"{what} {name[:12]!r}...: {size} bytes are too long for a file name, at most {most} fit "
            "(a letter takes 1 to 4)"
        )


def video_name(path: str | Path) -> str:
    """The name by which a video is matched: its file name without suffix, accents composed (NFC).

    File systems differ in how they store accents; a copied name must stay the same.
    """
    return unicodedata.normalize("NFC", Path(path).stem)


def kind_of_file(path: Path) -> tuple[str, dict[str, str]]:
    """What a file that holds no weights is by its first bytes, in a few words, and its beginning.

    Raises:
        OSError: when it cannot be read.
    """
    with path.open("rb") as stream:
        start = stream.read(4096)
    for offset, magic, kind in _MAGIC:
        if start[offset:].startswith(magic):
            return kind, {}
    try:  # a character may be cut
        text = start.decode("utf-8", errors="strict" if len(start) < 4096 else "ignore")
    except UnicodeDecodeError:
        text = "\0"
    if text.startswith(_LFS_START):
        return GIT_LFS, {}
    if "\0" in text:
        return "unknown file", {"first bytes": start[:16].hex(" ")}
    lines = text.strip().splitlines()
    return "text file", {"first line": lines[0][:80] if lines else ""}
