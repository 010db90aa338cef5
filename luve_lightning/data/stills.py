"""Reading stills: a picture as a clip of one frame, as a viewer shows it, or a ClipError that says why not.

Pillow decodes it; then, in this order, what has 16 bits a channel is rounded to 8, the picture is turned as its EXIF
orientation says, its ICC profile is converted to sRGB (relative colorimetric with black point compensation), and what
is transparent is laid on a colour, where one is named. What cannot be shown exactly is refused by name
(`luve_lightning.data.still_files`).
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageColor, ImageOps

from luve_lightning.data.clip_container import Frames, RefusedClip
from luve_lightning.data.still_files import ORIENTATION, PHOTOMETRIC, opened_still

TRANSPARENT = "has transparent parts; name a colour behind them (luve index --matte white), or save it without"
"""Why a still is refused where no colour is named."""

_LOW_BYTES = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B" if np.little_endian else ";16L"}


@dataclass(frozen=True)
class StillInfo:
    """How a still is shown.

    Attributes:
        kind: Pillow's name of the format.
        width: width as shown, pixels.
        height: height as shown, pixels.
    """

    kind: str
    width: int
    height: int


def probe_still(path: Path) -> StillInfo:
    """How a still is shown, from its header.

    Raises:
        ClipError: it cannot be read; RefusedClip when it is shown in a way that is not reproduced.
    """
    with opened_still(path) as picture:
        width, height = picture.size
        # Pillow gives the size of a turned TIFF as it is shown.
        if picture.format != "TIFF" and picture.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8):
            width, height = height, width
        _profile(path, picture)
        return StillInfo(str(picture.format), width, height)


def check_still(path: Path) -> tuple[int, int, bool]:
    """Height and width of a still as it is shown, and whether parts of it are transparent, from decoding it.

    Raises:
        ClipError: as `read_still`, except that transparent parts are no reason.
    """
    with opened_still(path) as picture:
        profile = _profile(path, picture)
        shown, alpha = _decoded(path, picture)
        height, width, _ = _to_srgb(path, shown, profile).shape
        return height, width, _cover(alpha) is not None


def still_label(path: Path, matte: str | None = None) -> str:
    """What is done to a still besides decoding and turning it, in words; empty for ordinary pictures.

    Latents and scores of stills are stored under it (`luve_lightning.data.hashes`): doing any of this differently
    needs other words.

    Raises:
        ClipError: as `read_still`.
        ValueError: for an unknown colour.
    """
    colour = None if matte is None else matte_colour(matte)
    with opened_still(path) as picture:
        profile = _profile(path, picture)
        parts = ["rounded from 16 bits 1"] if _is_deep(picture) else []
        parts += ["icc to srgb relative with black point 1"] if profile is not None else []
        if picture.has_transparency_data and _cover(_decoded(path, picture)[1]) is not None:
            red, green, blue = _behind(path, colour)
            parts.append(f"transparent on #{red:02x}{green:02x}{blue:02x} 1")
    return ", ".join(parts)


def read_still(path: Path, matte: str | None = None) -> Frames:
    """A still as a clip of one frame, as a viewer shows it.

    Args:
        path: the file.
        matte: colour behind what is transparent: a name or "#rrggbb". None refuses pictures in which anything is.

    Returns:
        uint8, 1 x height x width x 3, sRGB.

    Raises:
        ClipError: it is missing, empty, damaged or cut short; RefusedClip when it is shown in a way that is not
            reproduced, or is transparent.
        ValueError: for an unknown colour.
    """
    colour = None if matte is None else matte_colour(matte)
    with opened_still(path) as picture:
        profile = _profile(path, picture)
        shown, alpha = _decoded(path, picture)
        rgb = _to_srgb(path, shown, profile)
        if (cover := _cover(alpha)) is not None:
            rgb = (rgb * cover + np.array(_behind(path, colour)) * (1 - cover) + 0.5).astype(np.uint8)
    return np.array(rgb)[None]  # a copy: Pillow's memory may not be written


def _cover(alpha: NDArray[np.uint8] | None) -> NDArray[np.float32] | None:
    """How much of each pixel covers what is behind, H x W x 1 in [0, 1]; None where all do wholly."""
    if alpha is None or alpha.min() == 255:
        return None
    return alpha[..., None].astype(np.float32) / np.float32(255)


def _behind(path: Path, colour: tuple[int, ...] | None) -> tuple[int, ...]:
    if colour is None:
        raise RefusedClip(path, TRANSPARENT)
    return colour


def matte_colour(name: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour's name or "#rrggbb".

    Raises:
        ValueError: no such colour.
    """
    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError:
        raise ValueError(f"matte: expected a colour such as white, grey or #20a0ff, got {name!r}") from None


def _profile(path: Path, picture: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The ICC profile to convert from, None for sRGB by default."""
    found = picture.info.get("icc_profile")
    if not found:
        if picture.mode == "CMYK":
            raise RefusedClip(
                path, "is CMYK without an ICC profile: viewers do not agree on its colours; save it as RGB"
            )
        return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")) if picture.mode == "LAB" else None
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(found))
    except (OSError, ImageCms.PyCMSError):
        raise RefusedClip(path, "has an ICC profile that cannot be read; save it as sRGB") from None
    space, mode = profile.profile.xcolor_space.strip(), picture.mode
    fits = {"CMYK": mode == "CMYK", "Lab": mode == "LAB", "GRAY": _is_grey(mode), "RGB": mode not in ("CMYK", "LAB")}
    if not fits.get(space, False):
        raise RefusedClip(path, f"has an ICC profile for {space} and pixels of {mode}; save it as sRGB")
    return profile


def _is_grey(mode: str) -> bool:
    return mode in ("1", "L", "LA") or mode.startswith("I;16")


def _is_deep(picture: Image.Image) -> bool:
    return any(";16" in _raw_mode(tile) for tile in getattr(picture, "tile", ())) or picture.mode.startswith("I;16")


def _raw_mode(tile: Any) -> str:
    args = tile[3]
    return args if isinstance(args, str) else str(args[0]) if isinstance(args, tuple) and args else ""


def _decoded(path: Path, picture: Any) -> tuple[Image.Image, NDArray[np.uint8] | None]:
    """The picture turned, of 8 bits a channel and without transparency, and its alpha where it has some."""
    if picture.format == "PNG":
        _verify(path)
    if _is_deep(picture):
        picture = _rounded(path, picture)
    elif picture.has_transparency_data:
        picture = picture.convert("LA" if picture.mode in ("1", "L", "LA") else "RGBA")
    else:
        picture.load()
        if picture.mode in ("P", "PA", "YCbCr"):
            picture = picture.convert("RGB")
        elif picture.mode == "1":
            picture = picture.convert("L")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("LA", "RGBA"):
        return picture.convert(picture.mode[:-1]), np.asarray(picture.getchannel("A"))
    return picture, None


def _verify(path: Path) -> None:
    """Compare a PNG's checksums, which Pillow does not when it decodes."""
    with path.open("rb") as file:
        Image.OPEN["PNG"][0](file, str(path)).verify()


def _rounded(path: Path, picture: Any) -> Image.Image:
    """A picture of 16 bits a channel with 8, rounded: Pillow alone drops the lower byte."""
    info, grey = dict(picture.info), picture.mode.startswith("I;16")
    inverted = grey and picture.format == "TIFF" and picture.tag_v2.get(PHOTOMETRIC) == 0
    raw = {_raw_mode(tile) for tile in picture.tile}
    deep: NDArray[Any]
    if grey:
        deep = np.asarray(picture).astype(np.uint16)[..., None]
    elif raw == {"LA;16B"}:  # PNG's: as four bytes
        picture.tile = [tile._replace(args="RGBA") for tile in picture.tile]
        four = np.asarray(picture).astype(np.uint16)
        deep = four[..., 0::2] << 8 | four[..., 1::2]
    elif any(mode.startswith("RGBa") for mode in raw):
        raise RefusedClip(path, "has 16 bits and colours multiplied by their alpha; save it with straight alpha")
    else:
        # Bytes as if in the other order: what Pillow then keeps of each is the lower one.
        with path.open("rb") as file:
            low: Any = Image.OPEN[picture.format][0](file, str(path))
            low.tile = [_other_order(tile) for tile in low.tile]
            lower = np.asarray(low)
        deep = np.asarray(picture).astype(np.uint16) << 8 | lower
    if inverted:
        deep = np.uint16(65535) - deep
    if (clear := info.get("transparency")) is not None:  # PNG's one transparent colour
        alpha = np.where((deep == np.asarray(clear, np.uint16)).all(axis=-1, keepdims=True), 0, 65535)
        deep = np.concatenate([deep, alpha.astype(np.uint16)], axis=-1)
    eight = ((deep.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    mode = "CMYK" if picture.mode == "CMYK" else {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[eight.shape[-1]]
    made = Image.fromarray(eight[..., 0] if mode == "L" else eight, mode)
    if picture.format != "TIFF":  # Pillow has turned a TIFF when it is loaded
        made.getexif()[ORIENTATION] = picture.getexif().get(ORIENTATION, 1)
    return made


def _other_order(tile: Any) -> Any:
    """A tile of a picture of 16 bits, whose bytes are taken in the other order."""
    raw, args = _raw_mode(tile), tile[3]
    other = raw[:-4] + _LOW_BYTES[raw[-4:]]
    return tile._replace(args=other if isinstance(args, str) else (other, *args[1:]))


def _to_srgb(path: Path, picture: Image.Image, profile: ImageCms.ImageCmsProfile | None) -> NDArray[np.uint8]:
    if profile is not None:
        if profile.profile.xcolor_space.strip() == "RGB" and picture.mode == "L":
            picture = picture.convert("RGB")
        try:
            converted = ImageCms.profileToProfile(
                picture,
                profile,
                ImageCms.createProfile("sRGB"),
                ImageCms.Intent.RELATIVE_COLORIMETRIC,
                "RGB",
                flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
            )
        except ImageCms.PyCMSError as error:
            raise RefusedClip(path, f"has an ICC profile that cannot be converted ({error}); save it as sRGB") from None
        assert converted is not None
        return np.asarray(converted)
    return np.asarray(picture.convert("RGB"))
