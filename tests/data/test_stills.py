"""Stills are read as viewers show them: compared with Pillow done plainly, and with values known beforehand."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from luve_lightning.data.clip_container import ClipError, RefusedClip
from luve_lightning.data.clips import probe_clip, read_clip
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.stills import matte_colour, read_still, still_label
from luve_lightning.files import file_digest

HEIGHT, WIDTH = 24, 40


def pixels(channels=3, dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, np.iinfo(dtype).max, (HEIGHT, WIDTH, channels), dtype=dtype, endpoint=True)


def smooth():
    """A picture that lossy formats keep nearly."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 255 // (WIDTH - 1), y * 255 // (HEIGHT - 1), (x + y) * 2], axis=-1).astype(np.uint8)


def srgb():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def wide_gamut():
    """sRGB's profile with red and green exchanged: any gamut will do, and this one's conversion is known."""
    data = bytearray(srgb())
    tags = {bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * int.from_bytes(data[128:132], "big"), 12)}
    red, green = (tags[name] for name in (b"rXYZ", b"gXYZ"))
    data[red + 4 : red + 12], data[green + 4 : green + 12] = data[green + 4 : green + 12], data[red + 4 : red + 12]
    return bytes(data)


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "gif"])
def test_lossless_formats_give_the_stored_pixels(tmp_path, suffix):
    wanted = pixels(seed=1) if suffix != "gif" else np.repeat(pixels(1), 3, axis=-1) // 4 * 4
    path = tmp_path / f"a picture.{suffix}"
    Image.fromarray(wanted).save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(read_clip(path, 0, 1), wanted[None])
    info = probe_clip(path)
    assert (info.frames, info.fps, info.width, info.height) == (1, 0.0, WIDTH, HEIGHT)
    assert still_label(path) == ""
    assert ClipHashes(tmp_path / "hashes").digest(path) == file_digest(path)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "avif"])
def test_lossy_formats_are_decoded_as_by_pillow(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(smooth()).save(path, quality=90)
    read = read_clip(path, 0, 1)[0]
    with Image.open(path) as plain:
        assert np.array_equal(read, np.asarray(plain.convert("RGB")))
    assert np.abs(read.astype(int) - smooth()).mean() < 6


def test_a_still_has_one_frame_and_the_bytes_decide_not_the_name(tmp_path):
    path = tmp_path / "picture.mp4"
    Image.fromarray(pixels()).save(path, format="PNG")
    assert read_clip(path, 0, 1).shape == (1, HEIGHT, WIDTH, 3)
    with pytest.raises(ClipError, match="too short: frames 0 to 1 asked for, a still has 1"):
        read_clip(path, 0, 2)
    with pytest.raises(ClipError, match="too short"):
        read_clip(path, 1, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_orientation_is_applied(tmp_path, suffix, orientation):
    path, picture = tmp_path / f"a.{suffix}", Image.fromarray(smooth())
    exif = picture.getexif()
    exif[274] = orientation
    picture.save(path, exif=exif)
    with Image.open(path) as plain:
        wanted = np.asarray(ImageOps.exif_transpose(plain).convert("RGB"))
    read = read_still(path)[0]
    assert np.array_equal(read, wanted)
    assert (probe_clip(path).height, probe_clip(path).width) == read.shape[:2]
    assert (read.shape[0] == WIDTH) == (orientation >= 5)


DEEP = {"grey": 1, "rgb": 3}


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"compression": "zlib", "predictor": True},
                                     {"byteorder": ">"}, {"tile": (16, 16)}, {"rowsperstrip": 5}])  # fmt: skip
@pytest.mark.parametrize("kind", DEEP)
def test_16_bits_of_a_tiff_are_rounded(tmp_path, kind, options):
    deep = pixels(DEEP[kind], np.uint16)
    path = tmp_path / "a.tif"
    photometric = "minisblack" if kind == "grey" else "rgb"
    tifffile.imwrite(path, deep[..., 0] if kind == "grey" else deep, photometric=photometric, **options)
    wanted = np.round(deep / 257).astype(np.uint8)
    assert np.array_equal(read_still(path)[0], np.broadcast_to(wanted, (HEIGHT, WIDTH, 3)))
    assert still_label(path) == "rounded from 16 bits 1"
    assert ClipHashes(tmp_path / "hashes").digest(path) != file_digest(path)


def test_16_bits_with_white_as_zero(tmp_path):
    deep = pixels(1, np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", deep[..., 0], photometric="miniswhite")
    wanted = np.round((65535 - deep) / 257)
    assert np.array_equal(read_still(tmp_path / "a.tif")[0], np.repeat(wanted, 3, axis=-1))


def png16(path, deep, **chunks):
    """A PNG of 16 bits a channel, written by hand: Pillow writes grey ones only."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[deep.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", deep.shape[1], deep.shape[0], 16, kind, 0, 0, 0))]
    parts += [(name.encode(), data) for name, data in chunks.items()]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    whole = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + whole)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_of_a_png_are_rounded(tmp_path, channels):
    deep = pixels(channels, np.uint16)
    if channels in (2, 4):
        deep[..., -1] = 65535
    path = tmp_path / "a.png"
    png16(path, deep)
    colours = deep[..., : 1 if channels < 3 else 3]
    wanted = np.broadcast_to(np.round(colours / 257), (HEIGHT, WIDTH, 3))
    assert np.array_equal(read_still(path)[0], wanted)


def test_the_transparent_colour_of_16_bits_is_that_colour_alone(tmp_path):
    deep = pixels(3, np.uint16)
    deep[0, 0], deep[0, 1] = (1000, 2000, 3000), (1000, 2000, 3001)  # equal in 8 bits
    path = tmp_path / "a.png"
    png16(path, deep, tRNS=np.array([1000, 2000, 3000], ">u2").tobytes())
    with pytest.raises(RefusedClip, match="transparent"):
        read_still(path)
    read = read_still(path, matte="#ff0000")[0]
    assert read[0, 0].tolist() == [255, 0, 0]
    assert read[0, 1].tolist() == [4, 8, 12]


def test_an_icc_profile_is_converted_to_srgb(tmp_path):
    picture, path = Image.fromarray(pixels()), tmp_path / "a.png"
    picture.save(path, icc_profile=wide_gamut())
    plain = ImageCms.profileToProfile(
        picture, ImageCms.ImageCmsProfile(io.BytesIO(wide_gamut())), ImageCms.createProfile("sRGB"), 1, flags=0x2000
    )
    read = read_still(path)[0]
    assert np.array_equal(read, np.asarray(plain))
    # Red and green change places: the conversion is no identity.
    assert np.abs(read.astype(int) - pixels()[..., [1, 0, 2]]).max() <= 2
    assert "icc to srgb" in still_label(path)


def test_srgb_said_by_a_profile_stays(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(pixels()).save(path, icc_profile=srgb())
    assert np.abs(read_still(path)[0].astype(int) - pixels()).max() <= 1


def test_grey_and_palette_with_a_profile(tmp_path):
    grey = pixels(1)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png", icc_profile=srgb())
    read = read_still(tmp_path / "grey.png")[0]
    assert np.abs(read.astype(int) - grey[..., None]).max() <= 1
    picture = Image.fromarray(smooth()).quantize(16)
    picture.save(tmp_path / "palette.png", icc_profile=wide_gamut())
    wanted = np.asarray(picture.convert("RGB"))[..., [1, 0, 2]]
    assert np.abs(read_still(tmp_path / "palette.png")[0].astype(int) - wanted).max() <= 2


def test_lab_is_converted(tmp_path):
    """Greens are left out: a and b of 8 bits hold them coarsely."""
    wanted = np.repeat(np.repeat(np.linspace(0, 255, WIDTH).astype(np.uint8)[None, :, None], HEIGHT, 0), 3, -1)
    lab = ImageCms.profileToProfile(
        Image.fromarray(wanted), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    lab.save(tmp_path / "a.tif")
    assert np.abs(read_still(tmp_path / "a.tif")[0].astype(int) - wanted).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_few_levels(tmp_path, mode):
    picture = Image.fromarray(smooth()).convert(mode)
    picture.save(tmp_path / "a.png")
    assert np.array_equal(read_still(tmp_path / "a.png")[0], np.asarray(picture.convert("RGB")))


def test_transparency_is_refused_unless_a_colour_is_named(tmp_path):
    rgba = pixels(4)
    rgba[0, 0, 3], rgba[0, 1, 3], rgba[0, 2, 3] = 0, 255, 128
    path = tmp_path / "a.png"
    Image.fromarray(rgba).save(path)
    with pytest.raises(
        RefusedClip,
        match=r"transparent parts; name a colour behind them \(luve index --matte white\), or save it without",
    ):
        read_still(path)
    read = read_still(path, matte="white")[0].astype(int)
    behind = Image.new("RGBA", (WIDTH, HEIGHT), "white")
    behind.alpha_composite(Image.fromarray(rgba))
    assert np.abs(read - np.asarray(behind.convert("RGB"))).max() <= 1
    assert read[0, 0].tolist() == [255, 255, 255]
    assert read[0, 1].tolist() == rgba[0, 1, :3].tolist()


def test_the_colour_behind_is_part_of_the_identity(tmp_path, monkeypatch):
    monkeypatch.setattr("luve_lightning.data.hashes._SETTLED_NS", -1)
    path, hashes = tmp_path / "a.webp", ClipHashes(tmp_path / "hashes")
    Image.fromarray(pixels(4)).save(path, lossless=True)
    assert still_label(path, "white") == still_label(path, "#ffffff") == "transparent on #ffffff 1"
    with pytest.raises(RefusedClip):
        hashes.digest(path)
    assert hashes.known(path) is None
    found = {hashes.digest(path, matte) for matte in ("white", "#ffffff", "black")}
    assert len(found) == 2
    assert hashes.known(path, "white") in found
    assert hashes.known(path, "blue") is None
    assert ClipHashes(tmp_path / "hashes").known(path, "black") in found


def test_an_opaque_alpha_channel_says_nothing(tmp_path):
    rgba = pixels(4)
    rgba[..., 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert np.array_equal(read_still(tmp_path / "a.png")[0], rgba[..., :3])
    assert still_label(tmp_path / "a.png") == ""
    assert still_label(tmp_path / "a.png", "red") == ""


def test_palette_with_a_transparent_colour(tmp_path):
    picture = Image.fromarray(smooth()).quantize(16)
    picture.save(tmp_path / "a.png", transparency=3)
    read = read_still(tmp_path / "a.png", matte="#102030")[0]
    clear = np.asarray(picture) == 3
    assert (read[clear] == [0x10, 0x20, 0x30]).all()
    assert np.array_equal(read[~clear], np.asarray(picture.convert("RGB"))[~clear])


def test_colours_behind_by_name_and_number():
    assert matte_colour("grey") == (128, 128, 128)
    assert matte_colour("#20a0ff") == (32, 160, 255)
    with pytest.raises(ValueError, match="matte: expected a colour such as white, grey or #20a0ff, got 'whit'"):
        matte_colour("whit")


def test_an_unknown_colour_is_no_fault_of_the_file(tmp_path):
    Image.fromarray(pixels(4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="matte"):
        read_still(tmp_path / "a.png", matte="whit")


def test_cmyk_is_read_by_its_profile_or_refused(tmp_path):
    picture = Image.fromarray(smooth()).convert("CMYK")
    picture.save(tmp_path / "a.jpg")
    with pytest.raises(RefusedClip, match="CMYK without an ICC profile"):
        read_still(tmp_path / "a.jpg")
    picture.save(tmp_path / "b.jpg", icc_profile=srgb())
    with pytest.raises(RefusedClip, match="ICC profile for RGB and pixels of CMYK"):
        probe_clip(tmp_path / "b.jpg")


def test_a_profile_that_is_none_is_refused(tmp_path):
    Image.fromarray(pixels()).save(tmp_path / "a.jpg", icc_profile=b"nothing of the sort" * 10)
    with pytest.raises(RefusedClip, match="ICC profile that cannot be read"):
        read_still(tmp_path / "a.jpg")


def test_gamma_and_chromaticities_without_a_profile(tmp_path):
    def saved(name, **chunks):
        about = PngImagePlugin.PngInfo()
        for kind, data in chunks.items():
            about.add(kind.encode(), data)
        Image.fromarray(pixels()).save(tmp_path / name, pnginfo=about)
        return tmp_path / name

    linear = (100000).to_bytes(4, "big")
    with pytest.raises(RefusedClip, match="gamma of 1 and no ICC profile"):
        read_still(saved("linear.png", gAMA=linear))
    assert read_still(saved("usual.png", gAMA=(45455).to_bytes(4, "big"))).shape == (1, HEIGHT, WIDTH, 3)
    assert read_still(saved("said.png", sRGB=b"\0", gAMA=linear)).shape == (1, HEIGHT, WIDTH, 3)
    with pytest.raises(RefusedClip, match=r"HDR or wide colours without an ICC profile \(primaries 9, transfer 16\)"):
        read_still(saved("hdr.png", cICP=bytes([9, 16, 0, 1])))
    assert read_still(saved("bt709.png", cICP=bytes([1, 13, 0, 1]))).shape == (1, HEIGHT, WIDTH, 3)
