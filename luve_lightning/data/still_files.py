"""Which files are stills, and opening them: what is no still or not shown as it is stored is refused by name."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from luve_lightning.data.clip_container import ClipError, RefusedClip, file_facts
from luve_lightning.data.video_index import MAX_SIDE

_MAGIC = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG"), (0, b"\xff\xd8\xff", "JPEG"), (8, b"WEBPVP8", "WEBP"), (0, b"GIF8", "GIF"),
    (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (0, b"II+\0", "TIFF"), (0, b"MM\0+", "TIFF"),
)  # fmt: skip
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIF", b"heix": "HEIF", b"heim": "HEIF", b"heis": "HEIF"}
_BRANDS |= {b"hevc": "HEIF", b"hevx": "HEIF", b"mif1": "HEIF", b"msf1": "HEIF"}
_MOTION_JPEG = (".mjpeg", ".mjpg")  # a stream of JPEGs: a video
_BEGINNING = 1 << 20  # bytes in which a HEIF file says its colours
_KINDS = {"WEBP": "WebP", "HEIF": "HEIC"}  # names as people write them

ORIENTATION, _SUBFILE, _BITS, PHOTOMETRIC, _PLANAR, _DNG = 274, 254, 258, 262, 284, 50706  # tags of TIFF
_RAW_FILES = (".3fr", ".arw", ".cr2", ".dng", ".erf", ".iiq", ".nef", ".nrw", ".pef", ".rw2", ".sr2", ".srw")
_SRGB_CHROMATICITIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_SRGB_GAMMA = 0.45455
_NEAR = 0.01
# Numbers of ITU-T H.273: what viewers show as sRGB.
_PRIMARIES, _TRANSFERS = {1, 2, 5, 6, 7}, {1, 2, 6, 13, 14, 15}
_EIGHT_BITS = {"1", "L", "P", "PA", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"}


def still_kind(path: Path) -> str | None:
    """Pillow's name of a picture's format, by its first bytes; None for other and unreadable files."""
    try:
        if not path.is_file():  # a named pipe would wait for ever
            return None
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return None
    for offset, magic, kind in _MAGIC:
        if start[offset:].startswith(magic):
            return None if kind == "JPEG" and path.suffix.lower() in _MOTION_JPEG else kind
    if start[4:8] == b"ftyp":
        brands = [start[8:12], *(start[at : at + 4] for at in range(16, len(start) - 3, 4))]
        if brands[0] in _BRANDS:  # of an image's general brands the others say which
            return "AVIF" if {b"avif", b"avis"} & set(brands) else _BRANDS[brands[0]]
    return None


@contextmanager
def opened_still(path: Path) -> Iterator[Image.Image]:
    """A picture whose header was checked; every error inside becomes a ClipError."""
    file_facts(path)
    kind = still_kind(path)
    if kind is None:
        raise ClipError(path, "is no picture of a kind that is read")
    _load_formats(kind)
    if kind not in Image.OPEN:
        called = _KINDS.get(kind, kind)
        more = "pip install 'luve-lightning[heic]'" if kind == "HEIF" else "install a Pillow with it"
        raise RefusedClip(path, f"is {called}, which Pillow does not read here; {more}, or save it as PNG")
    try:
        with path.open("rb") as file:
            # Not `Image.open`, which warns of pictures of 89 million pixels and refuses by a limit that is global.
            picture: Any = Image.OPEN[kind][0](file, str(path))
            _check(path, picture, kind)
            yield picture
    except (ClipError, MemoryError):
        raise
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        # Pillow's own errors have no number: the file's fault, not the disk's.
        raise ClipError(path, reason) from (None if error.errno is None else error)
    # Pillow's plugins raise nearly anything on damaged files: SyntaxError, struct.error, KeyError, zlib.error, ...
    except Exception as error:
        raise ClipError(
            path, f"cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None


def _load_formats(kind: str) -> None:
    Image.init()
    if kind == "HEIF" and kind not in Image.OPEN:
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            return
        register_heif_opener()


def _check(path: Path, picture: Any, kind: str) -> None:
    """Refuse by name what is too large, no still, or not shown as it is stored."""
    width, height = picture.size
    if max(width, height) > MAX_SIDE:
        raise RefusedClip(path, f"is {width}x{height}, at most {MAX_SIDE} pixels a side are read")
    if Image.MAX_IMAGE_PIXELS is not None and width * height > 2 * Image.MAX_IMAGE_PIXELS:
        most = f"{2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million"
        raise RefusedClip(path, f"is {width}x{height}, more than Pillow's limit of {most} pixels")
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and kind in ("GIF", "WEBP", "PNG", "AVIF"):
        called = _KINDS.get(kind, kind)
        raise RefusedClip(
            path,
            f"is an animation ({called}, {frames} frames); convert it to a video (ffmpeg -i in.{kind.lower()} out.mp4)",
        )
    if kind == "TIFF":
        _check_tiff(path, picture, frames)
    elif kind == "PNG":
        _check_png(path, picture)
    elif kind in ("AVIF", "HEIF"):
        with path.open("rb") as file:
            _, found, colours = file.read(_BEGINNING).partition(b"colrnclx")
        if found and len(colours) >= 4 and not picture.info.get("icc_profile"):
            _check_colours(path, *struct.unpack(">HH", colours[:4]))
    if picture.mode not in _EIGHT_BITS and not picture.mode.startswith("I;16"):
        raise RefusedClip(
            path, f"has pixels of a kind that is not read (Pillow's mode {picture.mode}); save it with 8 or 16 bits"
        )


def _check_tiff(path: Path, picture: Any, frames: int) -> None:
    tags = picture.tag_v2
    if path.suffix.lower() in _RAW_FILES or _DNG in tags or tags.get(_SUBFILE, 0) & 1:
        raise RefusedClip(path, "is a camera's raw file, whose picture for viewers is a thumbnail; develop it first")
    if frames > 1:
        others = []
        for number in range(1, frames):
            picture.seek(number)
            others.append(picture.tag_v2.get(_SUBFILE, 0))
        picture.seek(0)
        if not all(kind & 1 for kind in others):  # thumbnails beside the picture
            raise RefusedClip(path, f"has {frames} pages; save each as a file")
    bits = set(np.atleast_1d(tags.get(_BITS, 1)).tolist())
    if max(bits) > 8 and bits != {16}:
        raise RefusedClip(path, f"has {max(bits)} bits a channel; save it with 8 or 16")
    if bits == {16} and tags.get(_PLANAR, 1) == 2:
        raise RefusedClip(path, "has 16 bits and its channels one after the other (planar); save it interleaved")


def _check_png(path: Path, picture: Any) -> None:
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
            size = int.from_bytes(head[:4], "big")
            if head[4:] == b"cICP":
                _check_colours(path, *file.read(2))
                return
            file.seek(size + 4, 1)
    if picture.info.get("icc_profile") or "srgb" in picture.info:
        return
    gamma, corners = picture.info.get("gamma", _SRGB_GAMMA), picture.info.get("chromaticity", _SRGB_CHROMATICITIES)
    if abs(gamma - _SRGB_GAMMA) > _NEAR:
        raise RefusedClip(path, f"has a gamma of {gamma:g} and no ICC profile, which is not converted; save it as sRGB")
    if max(abs(a - b) for a, b in zip(corners, _SRGB_CHROMATICITIES, strict=True)) > _NEAR:
        raise RefusedClip(path, "has other primaries than sRGB's and no ICC profile; save it as sRGB")


def _check_colours(path: Path, primaries: int, transfer: int) -> None:
    if primaries not in _PRIMARIES or transfer not in _TRANSFERS:
        raise RefusedClip(
            path,
            f"has HDR or wide colours without an ICC profile (primaries {primaries}, transfer {transfer}); "
            "save it as sRGB",
        )
