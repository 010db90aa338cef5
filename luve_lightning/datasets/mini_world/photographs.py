"""The photographs the mini world is filmed from: files that scikit-image ships inside its wheel.

A photograph is a "source video": its name goes into the CSV's `url` column, and whole photographs belong to
one split. Both motorcycle pictures show one scene, so they stand in one split. The test photographs are
natural ones in colour; train keeps the most varied ones.
"""

from __future__ import annotations

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
    """One picture and the words for it.

    Attributes:
        url: Name of the "source video", without spaces.
        file: File name below `skimage/data`.
        subject: What is seen, with its article: "a photograph of <subject>".
        texture: One word for a sprite cut from it: "a small <texture> star".
        split: "train", "val" or "test".
        weight: How many turns it gets while the others get one (colourful, detailed pictures get more).
        color: Whether it is a colour picture.
        flip: Whether it may be mirrored (not text).
        shrink: Integer factor by which the file is reduced first, for pictures with few details a pixel.
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
    """Reads one photograph; it is kept in memory, so treat the result as read-only.

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
    # The files are read in place: skimage.data's functions may go to the network for some of them.
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("scikit-image is not installed; it ships the photographs of the mini world")
    return Path(spec.origin).parent / "data"
