"""What is a still, and what is refused by name."""

from __future__ import annotations

import struct
import sys
import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageFile

from luve_lightning.data.clip_container import ClipError, RefusedClip
from luve_lightning.data.clips import probe_clip, read_clip
from luve_lightning.data.hashes import ClipHashes, look
from luve_lightning.data.still_files import still_kind
from luve_lightning.data.video_files import write_video
from luve_lightning.files import file_digest

PICTURE = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)


def saved(path, **options):
    Image.fromarray(PICTURE).save(path, **options)
    return path


def test_kinds_by_content(tmp_path):
    kinds = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "tif": "TIFF", "avif": "AVIF"}
    for suffix, kind in kinds.items():
        named_otherwise = saved(tmp_path / f"a.{suffix}").rename(tmp_path / f"{suffix}.bin")
        assert still_kind(named_otherwise) == kind
    write_video(tmp_path / "a.mp4", PICTURE[None], 24)
    (tmp_path / "empty.png").touch()
    for other in ("a.mp4", "empty.png", "missing.png", "."):
        assert still_kind(tmp_path / other) is None
    assert probe_clip(tmp_path / "a.mp4").frames == 1
    with pytest.raises(ClipError, match=r"is empty \(0 bytes\)"):
        read_clip(tmp_path / "empty.png", 0, 1)
    with pytest.raises(ClipError, match="is missing"):
        read_clip(tmp_path / "missing.png", 0, 1)


@pytest.mark.parametrize(("suffix", "called"), [("gif", "GIF"), ("webp", "WebP"), ("png", "PNG"), ("avif", "AVIF")])
def test_animations_are_refused(tmp_path, suffix, called):
    frames = [Image.fromarray(np.roll(PICTURE, n, axis=1)) for n in range(3)]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(RefusedClip, match=rf"is an animation \({called}, 3 frames\); convert it to a video \(ffmpeg"):
        read_clip(path, 0, 1)
    assert look(path).refused.startswith("is an animation")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "gif", "avif"])
def test_a_truncated_file_is_an_error_and_no_refusal(tmp_path, suffix):
    path = saved(tmp_path / f"a.{suffix}")
    content = path.read_bytes()
    for part in (0.3, 0.6, 0.9):
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(ClipError) as found:
            read_clip(path, 0, 1)
        assert not isinstance(found.value, RefusedClip)
        assert "\n" not in str(found.value)


def test_a_changed_byte_of_a_png_is_noticed(tmp_path):
    path = saved(tmp_path / "a.png", compress_level=0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ClipError, match="cannot be read"):
        read_clip(path, 0, 1)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
def test_damage_anywhere_gives_a_clip_error_or_a_picture(tmp_path):
    rng = np.random.default_rng(1)
    for suffix in ("png", "jpg", "webp", "tif", "gif"):
        path = saved(tmp_path / f"a.{suffix}")
        content = path.read_bytes()
        for _ in range(40):
            damaged = bytearray(content)
            for place in rng.integers(8, min(len(content), 400), 3):
                damaged[place] = int(rng.integers(256))
            path.write_bytes(damaged)
            with suppress(ClipError):  # any other exception would end a run
                assert read_clip(path, 0, 1).dtype == np.uint8


def test_bombs_and_wide_pictures_are_refused_before_they_are_decoded(tmp_path):
    def claiming(width, height):
        path = saved(tmp_path / "a.png")
        content = bytearray(path.read_bytes())
        content[16:24] = struct.pack(">II", width, height)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        path.write_bytes(content)
        return path

    with pytest.raises(RefusedClip, match="is 16385x10, at most 16384 pixels a side are read"):
        probe_clip(claiming(16385, 10))
    with pytest.raises(RefusedClip, match="is 16384x16384, more than Pillow's limit of 179 million pixels"):
        read_clip(claiming(16384, 16384), 0, 1)


def test_pictures_of_a_hundred_million_pixels_are_read_without_a_warning(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PICTURE.shape[0] * PICTURE.shape[1] - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_clip(path, 0, 1).shape == (1, 32, 48, 3)


def test_raw_files_and_pages(tmp_path):
    tifffile.imwrite(tmp_path / "a.nef", PICTURE)
    tifffile.imwrite(tmp_path / "thumbnail.tif", PICTURE, subfiletype=1)
    for name in ("a.nef", "thumbnail.tif"):
        with pytest.raises(RefusedClip, match="is a camera's raw file"):
            probe_clip(tmp_path / name)
    with tifffile.TiffWriter(tmp_path / "pages.tif") as file:
        file.write(PICTURE)
        file.write(PICTURE[::-1])
    with pytest.raises(RefusedClip, match="has 2 pages"):
        read_clip(tmp_path / "pages.tif", 0, 1)
    with tifffile.TiffWriter(tmp_path / "small_copy.tif") as file:
        file.write(PICTURE)
        file.write(PICTURE[::4, ::4], subfiletype=1)
    assert np.array_equal(read_clip(tmp_path / "small_copy.tif", 0, 1)[0], PICTURE)


@pytest.mark.parametrize(
    ("name", "array", "options", "reason"),
    [
        ("float", PICTURE.astype(np.float32), {"photometric": "rgb"}, "cannot be read|kind that is not read"),
        ("long", PICTURE[..., 0].astype(np.int32), {}, "has 32 bits a channel; save it with 8 or 16"),
        ("planar", PICTURE.transpose(2, 0, 1).astype(np.uint16), {"photometric": "rgb", "planarconfig": "separate"},
         "planar"),
    ],
)  # fmt: skip
def test_other_tiffs_are_refused(tmp_path, name, array, options, reason):
    tifffile.imwrite(tmp_path / f"{name}.tif", array, **options)
    with pytest.raises(ClipError, match=reason):
        read_clip(tmp_path / f"{name}.tif", 0, 1)


def test_heic_is_named(tmp_path, monkeypatch):
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic") + bytes(100))
    assert still_kind(path) == "HEIF"
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(RefusedClip, match=r"Pillow does not read here; pip install 'luve-lightning\[heic\]', or save"):
        read_clip(path, 0, 1)


def test_hdr_avif_is_refused(tmp_path):
    path = saved(tmp_path / "a.avif")
    content = path.read_bytes()
    at = content.index(b"colrnclx") + 8
    path.write_bytes(content[:at] + struct.pack(">HH", 9, 16) + content[at + 4 :])
    with pytest.raises(RefusedClip, match="HDR or wide colours"):
        read_clip(path, 0, 1)


def test_pictures_that_only_ffmpeg_knows_are_refused_by_name(tmp_path):
    path = tmp_path / "a.jp2"
    Image.fromarray(PICTURE).save(path)
    with pytest.raises(RefusedClip, match=r"is a picture of a kind that is not read \(j2k\)|jpeg2000"):
        read_clip(path, 0, 1)


def test_a_phone_picture_with_a_second_one_behind_it_is_the_first(tmp_path):
    """MPO, as phones write gain maps and depth: viewers show the first."""
    path = tmp_path / "a.jpg"
    pictures = [Image.fromarray(PICTURE), Image.fromarray(PICTURE[:16, :16])]
    pictures[0].save(path, format="MPO", save_all=True, append_images=pictures[1:])
    assert still_kind(path) == "JPEG"
    with Image.open(path) as plain:
        assert plain.n_frames == 2
        assert np.array_equal(read_clip(path, 0, 1)[0], np.asarray(plain))


def test_damaged_stills_keep_the_hash_of_their_bytes(tmp_path):
    """Whoever reads one finds out, and sets it aside."""
    path = saved(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes()[:300])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert ClipHashes(tmp_path / "hashes").digest(path) == file_digest(path)
