"""Folders as people have them: ten phone clips with captions, and one with all that goes wrong in such folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageCms

from luve_lightning.data.mini_world import captions
from luve_lightning.data.mini_world.paint import draw_scene, paint_scene
from luve_lightning.data.video_files import encode_h264
from luve_lightning.functional.pixels import frames_to_video, resize_video, video_to_frames
from tests.helpers.video_files import QUARTER_TURNS, set_matrix, write_sound

Pixels = NDArray[np.uint8]

CHINESE = "一只橘猫在窗台上慢慢地伸了个懒腰，阳光照在它的毛上。"
LONG = "a photograph of a coffee cup . the camera pans left slowly . " * 400
LETTERS_200 = "abcdefghij" * 20
PAINTED = 96  # pixels; larger clips are enlarged, because painting takes most of the time
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Nasty:
    """What lies in the folder of `write_nasty_folder`, by the files' paths relative to it.

    Attributes:
        folder: the folder.
        clips: usable clips, and how many frames each has.
        stills: usable stills.
        broken: files that look like media and hold none, or not all of it, or should not be there, and words of the
            reason.
        damaged: clips that open and say how many frames they have, but cannot be decoded, and words of the reason.
        captions: captions of the files that have one.
    """

    folder: Path
    clips: dict[str, int] = field(default_factory=dict)
    stills: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)

    @property
    def usable(self) -> list[str]:
        """The clips and the stills."""
        return [*self.clips, *self.stills]


def write_phone_clips(folder: Path, long: int = 384, frames: int = 34) -> list[Path]:
    """Ten clips as a phone names and turns them, each with a caption in a `.txt` beside it.

    Six are landscape, one of 60 frames a second among them, three portrait, one of them turned by the file's display
    matrix as phones do, and one is square.

    Args:
        folder: where to; made when missing.
        long: longer side in pixels; the shorter one is 9/16 of it.
        frames: frames of a clip of 30 frames a second; one of 60 has twice as many.

    Returns:
        The clips in the order of their names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    short = long * 9 // 16 // 2 * 2
    shapes = [(short, long)] * 6 + [(long, short)] * 3 + [(short, short)]
    paths = []
    for number, (height, width) in enumerate(shapes):
        fps, turned = (60 if number == 0 else 30), number == 8
        scene = draw_scene(0, "train", number, frames * fps // 30, PAINTED, fps)
        video = resize_video(frames_to_video(paint_scene(scene))[None], (max(height, width),) * 2)
        pixels = _middle(video_to_frames(video)[0].numpy(), height, width)
        path = folder / f"IMG_{4711 + number}.{'MOV' if turned else 'mp4'}"
        encode_h264(path, np.rot90(pixels, 1, axes=(1, 2)) if turned else pixels, fps, crf=14)
        if turned:
            set_matrix(path, *QUARTER_TURNS[270])
        path.with_suffix(".txt").write_text(captions(scene)["Summarized Description"] + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def write_nasty_folder(folder: Path) -> Nasty:
    """Clips and stills of every kind under names of every kind, and files that are none."""
    nasty = Nasty(folder)
    _write_clips(nasty)
    _write_stills(nasty)
    _write_broken(nasty)
    texts = {
        "landscape.mp4": "a photograph of a cat .",
        "portrait 25.mp4": "",
        f"{LETTERS_200}.mp4": LONG,
        "夕焼け 🎬 猫.mp4": CHINESE,
        'it\'s a "clip", 100% & more; $HOME.mp4': 'it\'s "quoted", with {braces}, [brackets] and a \\ .',
        "holiday/day 1/IMG_0001.mp4": "\ufeffa caption with a byte order mark .",
        "phone photo.jpg": "a photograph of a rocket .",
        "wide gamut.png": CHINESE,
        "holiday/day 2/scan 16 bit.tiff": " \n\t ",
    }
    for name, text in texts.items():
        nasty.folder.joinpath(name).with_suffix(".txt").write_text(text, encoding="utf-8")
        if told := text.removeprefix("\ufeff").strip():
            # A text is every file's of its name: a still and the clip beside it share one.
            of = [other for other in nasty.usable if Path(other).with_suffix("") == Path(name).with_suffix("")]
            nasty.captions.update(dict.fromkeys(of, told))
    return nasty


def _write_clips(nasty: Nasty) -> None:
    """Height, width, frame rate and length of every kind; the names are what people, phones and cameras give."""
    uneven = np.cumsum([0, *([1, 1, 3, 1, 2] * 8)])[:36].tolist()
    kinds: list[tuple[str, int, int, int, int, Sequence[int] | None]] = [
        ("landscape.mp4", 216, 384, 24, 30, None),
        ("portrait 25.mp4", 384, 216, 25, 40, None),
        ("square.mkv", 240, 240, 30, 44, None),
        ("sixty.mov", 216, 384, 60, 90, None),
        ("variable.mp4", 240, 240, 30, 36, uneven),
        ("two frames.mp4", 216, 384, 30, 2, None),
        ("three hundred.MP4", 208, 208, 30, 300, None),
        (f"{LETTERS_200}.mp4", 240, 240, 24, 25, None),
        ("夕焼け 🎬 猫.mp4", 384, 216, 30, 48, None),
        ('it\'s a "clip", 100% & more; $HOME.mp4', 240, 240, 25, 30, None),
        ("holiday/day 1/IMG_0001.mp4", 216, 384, 30, 33, None),
        ("holiday/day 2/IMG_0001.mp4", 216, 384, 30, 34, None),
        ("phone photo.mov", 216, 384, 30, 45, None),  # beside a still of its name, as "live" photographs are kept
    ]
    for seed, (name, height, width, fps, frames, times) in enumerate(kinds):
        write_clip(nasty.folder / name, seed, height, width, fps, frames, times)
        nasty.clips[name] = frames


def _write_stills(nasty: Nasty) -> None:
    folder, pictures = nasty.folder, [texture(seed, 216, 288) for seed in range(20, 26)]
    turned = Image.Exif()
    turned[EXIF_ORIENTATION] = 6
    Image.fromarray(pictures[0]).save(folder / "phone photo.jpg", quality=92, exif=turned)
    Image.fromarray(pictures[1]).save(folder / "wide gamut.png", icc_profile=swapped_profile())
    Image.fromarray(pictures[2]).save(folder / "from the web.webp", quality=90)
    tifffile.imwrite(folder / "holiday/day 2/scan 16 bit.tiff", pictures[3].astype(np.uint16) * 257, photometric="rgb")
    Image.fromarray(pictures[4][..., 0]).save(folder / "grey.png")
    nasty.stills.extend(
        ["phone photo.jpg", "wide gamut.png", "from the web.webp", "holiday/day 2/scan 16 bit.tiff", "grey.png"]
    )
    alpha = np.dstack([pictures[5], np.linspace(0, 255, 216 * 288).reshape(216, 288).astype(np.uint8)])
    Image.fromarray(alpha).save(folder / "cut out.png")
    nasty.broken["cut out.png"] = "transparent"


def _write_broken(nasty: Nasty) -> None:
    folder = nasty.folder
    whole = (folder / "landscape.mp4").read_bytes()
    (folder / "cut off.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").touch()
    (folder / "notes.mp4").write_text("Things to film:\n- the harbour at night\n- the market\n" * 20)
    (folder / "cut off.jpg").write_bytes((folder / "phone photo.jpg").read_bytes()[:2000])
    (folder / "empty.png").touch()
    write_sound(folder / "only sound.mp4")
    garbled = bytearray((folder / "sixty.mov").read_bytes())
    media, index = garbled.find(b"mdat") + 4, garbled.find(b"moov")
    third = media + (index - media) // 3
    garbled[third : third + 600] = bytes(byte ^ 0xA5 for byte in garbled[third : third + 600])
    (folder / "garbled.mov").write_bytes(garbled)
    nasty.damaged["garbled.mov"] = "is damaged near second 0.40"
    # What file managers leave behind, and a caption of nothing.
    (folder / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1" + bytes(64))
    (folder / "._landscape.mp4").write_bytes(b"\x00\x05\x16\x07" + bytes(4092))
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" + bytes(508))
    (folder / "shopping list.txt").write_text("milk, bread\n")
    nasty.broken.update(
        {
            "cut off.mp4": "cut short",
            "empty.mp4": "is empty",
            "notes.mp4": "it is text",
            "cut off.jpg": "truncated",
            "empty.png": "is empty",
            "only sound.mp4": "has no video stream",
            ".DS_Store": "hidden",
            "._landscape.mp4": "hidden",
            "Thumbs.db": "no clip or still by its name",
            "shopping list.txt": "text without a clip",
        }
    )


def write_clip(
    path: Path, seed: int, height: int, width: int, fps: int, frames: int, times: Sequence[int] | None = None
) -> Path:
    """A drifting texture as H.264; `times` are the frames' times in units of 1/fps, by default one after another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wide = texture(seed, height, width + 2 * min(frames, 64))
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "crf": "20", "x264-params": "mbtree=0:threads=1:keyint=24"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.time_base = Fraction(1, fps)
        stream.codec_context.thread_count = 1
        for number in range(frames):
            left = 2 * (number % 64)
            shown = np.ascontiguousarray(wide[:, left : left + width])
            frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def texture(seed: int, height: int, width: int) -> Pixels:
    """Coarse coloured squares, uint8 height x width x 3."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    return coarse.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]


def swapped_profile() -> bytes:
    """An ICC profile by which red means green and green red: pixels that ignore it are visibly wrong."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tags = 132 + 12 * int.from_bytes(data[128:132], "big")
    table = data[:tags].replace(b"rXYZ", b"tmp.").replace(b"gXYZ", b"rXYZ").replace(b"tmp.", b"gXYZ")
    return bytes(table + data[tags:])


def _middle(pixels: Pixels, height: int, width: int) -> Pixels:
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    return np.ascontiguousarray(pixels[:, top : top + height, left : left + width])
