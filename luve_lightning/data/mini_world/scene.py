"""What a clip of the mini world is made of: a photograph, a camera that travels over it, and sprites in front.

In a varied world a photograph stands for a source video: its name goes into the CSV's `url` column, and whole
photographs belong to one split. Both motorcycle pictures show one scene, so they are in one split. The test photographs
are natural ones in colour; train has the most varied ones.

In the other worlds a clip shows a combination (`luve_lightning.data.mini_world.stage`), and that is the source video.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Photograph:
    """One picture with its words.

    Attributes:
        url: Name of the "source video", without spaces.
        file: File name in its source's folder.
        subject: What it shows, with an article: "a photograph of <subject>".
        texture: One word for a sprite cut from it: "a small <texture> star".
        split: "train", "val" or "test".
        weight: Its number of turns per turn of the others (colourful, detailed pictures get more).
        color: Whether it is a colour picture.
        flip: Whether it may be mirrored (text may not).
        shrink: Integer factor by which to reduce the file first, for pictures with little detail per pixel.
        source: A key of `SOURCES`.
        short: Length of its shorter side once it is read, in pixels; 0 keeps its own.
    """

    url: str
    file: str
    subject: str
    texture: str
    split: str
    weight: int = 1
    color: bool = False
    flip: bool = True
    shrink: int = 1
    source: str = "skimage"
    short: int = 0


PHOTOGRAPHS: tuple[Photograph, ...] = (
    Photograph("skimage-astronaut", "astronaut.png", "an astronaut", "astronaut", "train", 3, color=True),
    Photograph("skimage-motorcycle-left", "motorcycle_left.png", "a motorcycle", "motorcycle", "train", 2, color=True),
    Photograph(
        "skimage-motorcycle-right", "motorcycle_right.png", "a motorcycle", "motorcycle", "train", 2, color=True
    ),
    Photograph("skimage-ihc", "ihc.png", "colored tissue", "tissue", "train", 2, color=True),
    Photograph("skimage-hubble", "hubble_deep_field.jpg", "distant galaxies", "galaxy", "train", 2, color=True),
    Photograph("skimage-color", "color.png", "a color wheel", "rainbow", "train", color=True),
    Photograph("skimage-camera", "camera.png", "a man with a camera", "camera", "train", 2),
    Photograph("skimage-coins", "coins.png", "old coins", "coin", "train", 2),
    Photograph("skimage-grass", "grass.png", "dry grass", "grass", "train"),
    Photograph("skimage-gravel", "gravel.png", "gravel", "gravel", "train"),
    Photograph("skimage-moon", "moon.png", "the moon", "moon", "train"),
    Photograph("skimage-text", "text.png", "handwriting", "handwriting", "train", flip=False),
    Photograph("skimage-page", "page.png", "a printed page", "page", "train", flip=False),
    Photograph("skimage-retina", "retina.jpg", "an eye", "eye", "val", color=True, shrink=3),
    Photograph("skimage-brick", "brick.png", "a brick wall", "brick", "val"),
    Photograph("skimage-chelsea", "chelsea.png", "a cat", "cat", "test", color=True),
    Photograph("skimage-coffee", "coffee.png", "a coffee cup", "coffee", "test", color=True),
    Photograph("skimage-rocket", "rocket.jpg", "a rocket", "rocket", "test", color=True),
)


def photographs_of(split: str) -> tuple[Photograph, ...]:
    """Returns the photographs of one split, in a fixed order."""
    return tuple(photograph for photograph in PHOTOGRAPHS if photograph.split == split)


def _staged(
    key: str, file: str, subject: str, source: str = "skimage", split: str = "train", color: bool = True
) -> Photograph:
    return Photograph(key, file, subject, key, split, color=color, source=source, short=288)


# Those of combinations. A place in this list is part of the rule that splits them: add new ones at the end.
STAGE: tuple[Photograph, ...] = (
    _staged("astronaut", "astronaut.png", "an astronaut"),
    _staged("motorcycle", "motorcycle_left.png", "a motorcycle"),
    _staged("tissue", "ihc.png", "colored tissue"),
    _staged("galaxies", "hubble_deep_field.jpg", "distant galaxies"),
    _staged("rainbow", "color.png", "a color wheel"),
    _staged("cameraman", "camera.png", "a man with a camera", color=False),
    _staged("coins", "coins.png", "old coins", color=False),
    _staged("gravel", "gravel.png", "gravel", color=False),
    _staged("horse", "horse.png", "a horse", color=False),
    _staged("officer", "grace_hopper.jpg", "an officer", "matplotlib"),
    _staged("raccoon", "raccoon.jpg", "a raccoon", "repository"),
    _staged("stairs", "stairs.jpg", "stairs", "repository", color=False),
    _staged("temple", "temple.jpg", "a temple", "repository"),
    _staged("flower", "flower.jpg", "a flower", "repository"),
    _staged("earth", "earth.jpg", "the earth", "repository"),
    _staged("hurricane", "hurricane.jpg", "a hurricane", "repository"),
    _staged("eye", "retina.jpg", "an eye", split="val"),
    _staged("brick", "brick.png", "a brick wall", split="val", color=False),
    _staged("cat", "chelsea.png", "a cat", split="test"),
    _staged("coffee", "coffee.png", "a coffee cup", split="test"),
    _staged("rocket", "rocket.jpg", "a rocket", split="test"),
)


def photograph_named(url: str) -> Photograph:
    """Returns the photograph with this `url`.

    Raises:
        KeyError: There is none.
    """
    for photograph in (*PHOTOGRAPHS, *STAGE):
        if photograph.url == url:
            return photograph
    raise KeyError(f"no photograph is called {url!r}")


@lru_cache(maxsize=len(PHOTOGRAPHS) + len(STAGE))
def load_photograph(photograph: Photograph) -> Tensor:
    """Reads one photograph; it is cached, so treat the result as read-only.

    Returns:
        Float32 `3 x H x W` in [0, 1]; a grey picture has three equal channels.

    Raises:
        FileNotFoundError: The file is not where its source should have it.
    """
    path = _folder_of(photograph.source) / photograph.file
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {SOURCES[photograph.source][1]}")
    with Image.open(path) as image:
        picture = image.convert("RGB")
        if photograph.shrink > 1:
            picture = picture.reduce(photograph.shrink)
        if photograph.short:
            scale = photograph.short / min(picture.size)
            size = round(picture.width * scale), round(picture.height * scale)
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        pixels = np.asarray(picture)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div_(255).contiguous()


# Folders of photographs below a package's, and what to do where a file is not there.
SOURCES = {
    "skimage": ("data", "scikit-image's wheel should hold this photograph; reinstall scikit-image"),
    "matplotlib": ("mpl-data/sample_data", "Matplotlib's wheel should hold this photograph; reinstall matplotlib"),
    "repository": ("", "the repository holds this photograph, an installed package does not; run in a checkout"),
}


def _folder_of(source: str) -> Path:
    # The files are read directly: skimage.data's functions may use the network for some of them.
    if source == "repository":
        return Path(__file__).parents[3] / "data" / "mini" / "photographs"
    spec = find_spec(source)
    if spec is None or spec.origin is None:
        name = {"skimage": "scikit-image"}.get(source, source)
        raise FileNotFoundError(f"{name} is not installed; it ships photographs of the mini world")
    return Path(spec.origin).parent / SOURCES[source][0]


# Part of every clip's id: raise it whenever the same arguments would give other pixels.
RENDERER = 1
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up and left": (-1, -1),
    "up and right": (1, -1),
    "down and left": (-1, 1),
    "down and right": (1, 1),
}
# Over the whole clip: pan in windows, zoom as a ratio, turn in degrees.
SPEEDS: dict[str, dict[str, tuple[float, float]]] = {
    "slowly": {"pan": (0.18, 0.32), "zoom": (1.15, 1.3), "turn": (8.0, 16.0)},
    "": {"pan": (0.32, 0.6), "zoom": (1.3, 1.6), "turn": (16.0, 35.0)},
    "quickly": {"pan": (0.6, 1.0), "zoom": (1.6, 2.0), "turn": (35.0, 60.0)},
}
EASINGS = ("steady", "smooth", "starting", "stopping")
SHAPES = ("circle", "square", "triangle", "star", "ring", "hexagon", "cross", "heart")
# Radius of a sprite in half frames.
SPRITE_SIZES = {"small": (0.2, 0.28), "": (0.28, 0.38), "large": (0.38, 0.5)}
SPRITE_ACTIONS = {"moves": 60, "circles": 10, "sways": 10, "grows": 7, "shrinks": 7, "waits": 6}


@dataclass(frozen=True)
class Camera:
    """A square window that travels over a photograph.

    Attributes:
        pan: A key of `DIRECTIONS`, or "" for none.
        zoom: "in", "out" or "".
        turn: "clockwise", "counterclockwise" or "" (the camera's; the picture turns the other way).
        speed: A key of `SPEEDS`; "slowly", "" or "quickly".
        easing: Course of the movement over the clip, one of `EASINGS`.
        center: Window centre halfway, in pixels of the photograph, x then y.
        window: Window side halfway, in pixels of the photograph (geometric mean of both ends).
        distance: Length of the pan on each of its axes, in windows.
        ratio: Larger over smaller window side.
        degrees: Whole turn.
        tilt: Angle halfway, degrees, clockwise.
    """

    pan: str
    zoom: str
    turn: str
    speed: str
    easing: str
    center: tuple[float, float]
    window: float
    distance: float
    ratio: float
    degrees: float
    tilt: float


@dataclass(frozen=True)
class Sprite:
    """A shape cut from another photograph, moving in front. Positions are in half frames, (0, 0) the centre.

    Attributes:
        shape: One of `SHAPES`.
        size: A key of `SPRITE_SIZES`.
        action: A key of `SPRITE_ACTIONS`.
        direction: A key of `DIRECTIONS` when it moves, else "".
        easing: One of `EASINGS`.
        start: Position in the first frame (the middle of a circle or sway), x then y.
        stop: Position in the last frame; equals `start` unless it moves.
        radius: Radius in half frames.
        angle: Angle in the first frame, degrees, clockwise.
        spin: Degrees of spin over the clip; 0 for none.
        texture: `url` of the photograph of its texture.
        cut: Left, top and side of the cut, in pixels of that photograph.
    """

    shape: str
    size: str
    action: str
    direction: str
    easing: str
    start: tuple[float, float]
    stop: tuple[float, float]
    radius: float
    angle: float
    spin: float
    texture: str
    cut: tuple[float, float, float]


@dataclass(frozen=True)
class ColoredSprite(Sprite):
    """A sprite of one colour with a rim; its texture shades it.

    Attributes:
        color: Red, green and blue, 0 to 255.
    """

    color: tuple[int, int, int] = (255, 255, 255)


@dataclass(frozen=True)
class Grade:
    """A mild colour grade to widen the few photographs, for train clips only; held-out ones stay unchanged.

    Attributes:
        flip: Whether the photograph is mirrored.
        brightness: Factor on every channel.
        contrast: Factor on the distance from medium grey.
        saturation: Factor on the distance from the pixel's own grey.
        hue: Rotation about the grey axis, degrees.
        balance: Factors on red, green and blue.
    """

    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    balance: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Scene:
    """Everything a clip is made of; the same scene always gives the same pixels."""

    seed: int
    split: str
    index: int
    frames: int
    size: int
    fps: int
    url: str
    grade: Grade
    camera: Camera
    sprites: tuple[Sprite, ...]
    renderer: int = RENDERER

    @property
    def source(self) -> str:
        """The source video that the clip is from: its photograph."""
        return self.url

    @property
    def clip_id(self) -> str:
        """40 hexadecimal digits: the SHA-1 of this description, seed included."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def progress(easing: str, frames: int) -> np.ndarray:
    """Returns the progress of a movement in each frame, float64 `T`, from 0 to 1."""
    time = np.linspace(0.0, 1.0, frames)
    if easing == "smooth":
        return time * time * (3 - 2 * time)
    if easing == "starting":
        return time**1.6
    if easing == "stopping":
        return 1 - (1 - time) ** 1.6
    return time


def camera_path(camera: Camera, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns where the camera looks in each frame.

    Returns:
        Window centres `T x 2` (x, y) and window sides `T`, both in pixels of the photograph, and angles `T`
        in radians, clockwise.
    """
    way = progress(camera.easing, frames) - 0.5
    direction = np.array(DIRECTIONS.get(camera.pan, (0, 0)), dtype=np.float64)
    centers = np.asarray(camera.center) + way[:, None] * direction * camera.distance * camera.window
    zoom = {"in": -1, "out": 1}.get(camera.zoom, 0)
    windows = camera.window * camera.ratio ** (zoom * way)
    turn = {"clockwise": 1, "counterclockwise": -1}.get(camera.turn, 0)
    angles = np.radians(camera.tilt + turn * camera.degrees * way)
    return centers, windows, angles


def sprite_path(sprite: Sprite, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns where a sprite is in each frame.

    Returns:
        Positions `T x 2` (x, y) and radii `T` in half frames, angles `T` in radians, clockwise.
    """
    way = progress(sprite.easing, frames)
    start, stop = np.asarray(sprite.start), np.asarray(sprite.stop)
    positions = start + way[:, None] * (stop - start)
    if sprite.action == "circles":
        positions = positions + 0.3 * np.stack([np.cos(2 * np.pi * way), np.sin(2 * np.pi * way)], axis=1)
    elif sprite.action == "sways":
        positions = positions + np.stack([0.35 * np.sin(2 * np.pi * way), np.zeros_like(way)], axis=1)
    grown = {"grows": 0.5 + 0.6 * way, "shrinks": 1.1 - 0.6 * way}.get(sprite.action, np.ones_like(way))
    return positions, sprite.radius * grown, np.radians(sprite.angle + sprite.spin * way)


def motion_per_frame(scene: Scene) -> float:
    """Returns the background's average motion per frame, in pixels of the clip."""
    centers, windows, angles = camera_path(scene.camera, scene.frames)
    points = np.array([[0, 0], [-1, -1], [1, -1], [-1, 1], [1, 1]]) / 2
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    turned = np.stack([cos * points[:, 0] - sin * points[:, 1], sin * points[:, 0] + cos * points[:, 1]], axis=-1)
    places = centers[:, None] + windows[:, None, None] * turned
    steps = np.linalg.norm(np.diff(places, axis=0), axis=-1) / windows[:-1, None] * scene.size
    return float(steps.mean()) if scene.frames > 1 else 0.0


def source_pixels(scene: Scene) -> float:
    """Returns the number of photograph pixels behind one pixel of the clip, per axis, on average."""
    _, windows, _ = camera_path(scene.camera, scene.frames)
    return float(windows.mean()) / scene.size
