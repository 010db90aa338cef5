"""The photographs from which the mini world is filmed: files that scikit-image ships in its wheel.

A photograph stands for a source video: its name goes into the CSV's `url` column, and whole photographs belong to
one split. Both motorcycle pictures show one scene, so they are in one split. The test photographs are natural ones
in colour; train has the most varied ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
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
        file: File name below `skimage/data`.
        subject: What it shows, with an article: "a photograph of <subject>".
        texture: One word for a sprite cut from it: "a small <texture> star".
        split: "train", "val" or "test".
        weight: Its number of turns per turn of the others (colourful, detailed pictures get more).
        color: Whether it is a colour picture.
        flip: Whether it may be mirrored (text may not).
        shrink: Integer factor by which to reduce the file first, for pictures with little detail per pixel.
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


PHOTOGRAPHS: tuple[Photograph, ...] = (
    Photograph("skimage-astronaut", "astronaut.png", "an astronaut", "astronaut", "train", 3, color=True),
    Photograph(
        "skimage-motorcycle-left", "motorcycle_left.png", "a motorcycle", "motorcycle", "train", 2, color=True
    ),
    Photograph(
        "skimage-motorcycle-right",
        "motorcycle_right.png",
        "a motorcycle",
        "motorcycle",
        "train",
        2,
        color=True,
    ),
    Photograph("skimage-ihc", "ihc.png", "colored tissue", "tissue", "train", 2, color=True),
    Photograph(
        "skimage-hubble", "hubble_deep_field.jpg", "distant galaxies", "galaxy", "train", 2, color=True
    ),
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


def photograph_named(url: str) -> Photograph:
    """Returns the photograph with this `url`.

    Raises:
        KeyError: There is none.
    """
    for photograph in PHOTOGRAPHS:
        if photograph.url == url:
            return photograph
    raise KeyError(f"no photograph is called {url!r}")


@lru_cache(maxsize=len(PHOTOGRAPHS))
def load_photograph(photograph: Photograph) -> Tensor:
    """Reads one photograph; it is cached, so treat the result as read-only.

    Returns:
        Float32 `3 x H x W` in [0, 1]; a grey picture has three equal channels.

    Raises:
        FileNotFoundError: scikit-image is not installed or its wheel lacks the file.
    """
    path = _data_folder() / photograph.file
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: scikit-image's wheel should hold this photograph; reinstall scikit-image"
        )
    with Image.open(path) as image:
        picture = image.convert("RGB")
        if photograph.shrink > 1:
            picture = picture.reduce(photograph.shrink)
        pixels = np.asarray(picture)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div_(255).contiguous()


def _data_folder() -> Path:
    # The files are read directly: skimage.data's functions may use the network for some of them.
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("scikit-image is not installed; it ships the photographs of the mini world")
    return Path(spec.origin).parent / "data"


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Returns the distance of each point to a shape's outline, in radii of the shape, negative inside.

    Args:
        shape: A key of `OUTLINES`.
        x: Horizontal coordinates in radii, rightwards, any shape.
        y: Vertical coordinates in radii, downwards, the same shape.

    Returns:
        Distances, the same shape. Each outline lies within the square from -1 to 1.
    """
    return OUTLINES[shape](x, y)


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.76).abs() - 0.24


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.85, 0.85)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 1.0, 0.36), _box(x, y, 0.36, 1.0))


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return _polygon(x, y, [(math.cos(a), math.sin(a)) for a in _turns(3)])


def _hexagon(x: Tensor, y: Tensor) -> Tensor:
    return _polygon(x, y, [(math.cos(a), math.sin(a)) for a in _turns(6)])


def _star(x: Tensor, y: Tensor) -> Tensor:
    radii = [1.0, 0.45] * 5
    return _polygon(
        x, y, [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, _turns(10), strict=True)]
    )


def _heart(x: Tensor, y: Tensor) -> Tensor:
    # Quilez's heart stands on (0, 0) and is 1.1 high with y upwards; move it into the unit square.
    u, v = x.abs() * 0.6, 0.56 - y * 0.6
    lobe = torch.hypot(u - 0.25, v - 0.75) - math.sqrt(2) / 4
    along = (u + v).clamp(min=0) / 2
    body = torch.minimum(torch.hypot(u, v - 1), torch.hypot(u - along, v - along)) * torch.sign(u - v)
    return torch.where(u + v > 1, lobe, body) / 0.6


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    across, down = x.abs() - half_width, y.abs() - half_height
    outside = torch.hypot(across.clamp(min=0), down.clamp(min=0))
    return outside + torch.maximum(across, down).clamp(max=0)


def _polygon(x: Tensor, y: Tensor, corners: list[tuple[float, float]]) -> Tensor:
    distance = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        distance = torch.minimum(distance, torch.hypot(x - ax - along * ex, y - ay - along * ey))
        # Even-odd rule: a ray to the right crosses this edge.
        crosses = (y < ay) != (y < by)
        inside ^= crosses & (x < ax + (y - ay) * (ex / ey if ey else 0.0))
    return torch.where(inside, -distance, distance)


def _turns(count: int) -> list[float]:
    # From the top, clockwise (y points down).
    return [2 * math.pi * step / count - math.pi / 2 for step in range(count)]


OUTLINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "hexagon": _hexagon,
    "cross": _cross,
    "heart": _heart,
}
