"""Drawing a clip's scene at random, from (seed, split, index) alone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from luve_lightning.datasets.mini_world.photographs import (
    SPLITS,
    Photograph,
    load_photograph,
    photographs_of,
)
from luve_lightning.datasets.mini_world.scene import (
    DIRECTIONS,
    EASINGS,
    SHAPES,
    SPEEDS,
    SPRITE_ACTIONS,
    SPRITE_SIZES,
    Camera,
    Grade,
    Scene,
    Sprite,
    camera_path,
)

# The scene is laid out for this size; other sizes show the same scene in more or fewer pixels.
REFERENCE_SIZE = 192
WINDOW_RANGE = (150.0, 400.0)

# Kinds of camera work and how often each is drawn, in percent.
CAMERA_WORK: dict[tuple[str, ...], int] = {
    (): 7,
    ("pan",): 36,
    ("zoom",): 18,
    ("turn",): 10,
    ("pan", "zoom"): 15,
    ("pan", "turn"): 7,
    ("zoom", "turn"): 7,
}


def draw_scene(seed: int, split: str, index: int, frames: int, size: int, fps: int) -> Scene:
    """Draws clip `index` of a split; it does not depend on any other clip.

    Args:
        seed: Seed of the world, >= 0.
        split: "train", "val" or "test".
        index: Number of the clip within its split.
        frames: Length of the clip.
        size: Side of the square frame in pixels.
        fps: Frames per second.

    Returns:
        The scene.
    """
    number = SPLITS.index(split)
    photograph = _turn_of(seed, number, split, index)
    rng = np.random.default_rng([seed, number, index])
    grade = _draw_grade(rng, photograph) if split == "train" else Grade()
    camera = _draw_camera(rng, photograph, grade.flip)
    count = int(rng.choice(3, p=(0.12, 0.53, 0.35)))
    still = not (camera.pan or camera.zoom or camera.turn)
    # Something moves in every clip: before a still camera the first sprite has to.
    sprites = tuple(_draw_sprite(rng, photograph, still and i == 0) for i in range(max(count, int(still))))
    return Scene(seed, split, index, frames, size, fps, photograph.url, grade, camera, sprites)


def _turn_of(seed: int, number: int, split: str, index: int) -> Photograph:
    # Photographs take turns, in an order shuffled anew each round, so that even few clips show many of them.
    turns = [photograph for photograph in photographs_of(split) for _ in range(photograph.weight)]
    order = np.random.default_rng([seed, number, index // len(turns), 1]).permutation(len(turns))
    return turns[int(order[index % len(turns)])]


def _draw_grade(rng: np.random.Generator, photograph: Photograph) -> Grade:
    spread = 0.06 if photograph.color else float(rng.choice([0.0, 0.15]))
    red, green, blue = (round(float(rng.uniform(1 - spread, 1 + spread)), 4) for _ in range(3))
    return Grade(
        flip=bool(rng.random() < 0.5) and photograph.flip,
        brightness=_uniform(rng, 0.85, 1.15),
        contrast=_uniform(rng, 0.85, 1.15),
        saturation=_uniform(rng, 0.75, 1.3),
        hue=_uniform(rng, -22.0, 22.0) if photograph.color else 0.0,
        balance=(red, green, blue),
    )


def _draw_camera(rng: np.random.Generator, photograph: Photograph, flip: bool) -> Camera:
    pixels = _grey(photograph)[:, ::-1] if flip else _grey(photograph)
    kinds, weights = list(CAMERA_WORK), np.array(list(CAMERA_WORK.values()), dtype=np.float64)
    while True:
        kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
        speed = str(rng.choice(list(SPEEDS), p=(0.25, 0.45, 0.3))) if kind else ""
        for _ in range(60):
            camera = _try_camera(rng, pixels, kind, speed)
            if camera is not None:
                return camera


def _try_camera(
    rng: np.random.Generator, pixels: np.ndarray, kind: tuple[str, ...], speed: str
) -> Camera | None:
    """Draws one camera over grey pixels `H x W`; None when the photograph is too small for its way."""
    height, width = pixels.shape
    short = min(height, width)
    window = math.exp(rng.uniform(math.log(min(195.0, 0.8 * short)), math.log(min(380.0, 0.92 * short))))
    amounts = {work: _uniform(rng, *SPEEDS[speed][work]) for work in ("pan", "zoom", "turn")}
    camera = Camera(
        pan=str(rng.choice(list(DIRECTIONS))) if "pan" in kind else "",
        zoom=str(rng.choice(["in", "out"])) if "zoom" in kind else "",
        turn=str(rng.choice(["clockwise", "counterclockwise"])) if "turn" in kind else "",
        speed=speed,
        easing=str(rng.choice(EASINGS)),
        center=(0.0, 0.0),
        window=round(window, 3),
        distance=amounts["pan"] if "pan" in kind else 0.0,
        ratio=amounts["zoom"] if "zoom" in kind else 1.0,
        degrees=amounts["turn"] if "turn" in kind else 0.0,
        tilt=_uniform(rng, -6.0, 6.0) if "turn" in kind else 0.0,
    )
    way, windows, angles = camera_path(camera, 33)
    low, high = min(WINDOW_RANGE[0], 0.75 * short), WINDOW_RANGE[1]
    if windows.min() < low or windows.max() > high:
        return None
    reach = windows * (np.abs(np.cos(angles)) + np.abs(np.sin(angles))) / 2
    first = (reach[:, None] - way).max(axis=0)
    last = np.array([width, height]) - (reach[:, None] + way).max(axis=0)
    if np.any(first > last):
        return None
    # Of three places the one with most detail: not the empty sky again and again.
    places = [rng.uniform(first, last) for _ in range(3)]
    center = max(places, key=lambda place: _detail(pixels, place - camera.window / 2, camera.window))
    return replace(camera, center=(round(float(center[0]), 3), round(float(center[1]), 3)))


def _draw_sprite(rng: np.random.Generator, background: Photograph, must_move: bool) -> Sprite:
    others = [p for p in photographs_of(background.split) if p.texture != background.texture]
    texture = others[int(rng.integers(len(others)))]
    size = str(rng.choice(list(SPRITE_SIZES)))
    radius = _uniform(rng, *SPRITE_SIZES[size])
    weights = np.array(list(SPRITE_ACTIONS.values()), dtype=np.float64)
    action = "moves" if must_move else str(rng.choice(list(SPRITE_ACTIONS), p=weights / weights.sum()))
    direction = str(rng.choice(list(DIRECTIONS))) if action == "moves" else ""
    middle = rng.uniform(-0.3, 0.3, 2) if action == "moves" else rng.uniform(-0.5, 0.5, 2)
    step = np.array(DIRECTIONS.get(direction, (0, 0))) * rng.uniform(0.25, 0.6)
    start, stop = middle - step, middle + step
    spins = action in ("moves", "waits") and rng.random() < 0.35
    return Sprite(
        shape=str(rng.choice(SHAPES)),
        size=size,
        action=action,
        direction=direction,
        easing=str(rng.choice(EASINGS)),
        start=(round(float(start[0]), 4), round(float(start[1]), 4)),
        stop=(round(float(stop[0]), 4), round(float(stop[1]), 4)),
        radius=radius,
        angle=_uniform(rng, -12.0, 12.0),
        spin=_uniform(rng, 60.0, 200.0) * float(rng.choice([-1, 1])) if spins else 0.0,
        texture=texture.url,
        cut=_draw_cut(rng, texture, radius),
    )


def _draw_cut(rng: np.random.Generator, texture: Photograph, radius: float) -> tuple[float, float, float]:
    pixels = _grey(texture)
    height, width = pixels.shape
    side = min(radius * REFERENCE_SIZE * _uniform(rng, 1.1, 1.8), 0.9 * min(height, width))
    places = [rng.uniform((0, 0), (width - side, height - side)) for _ in range(4)]
    corner = max(places, key=lambda place: _detail(pixels, place, side))
    return round(float(corner[0]), 3), round(float(corner[1]), 3), round(side, 3)


def _grey(photograph: Photograph) -> np.ndarray:
    # numpy, not torch: its sums do not depend on the number of threads, so the choices below do not either.
    return load_photograph(photograph).numpy().mean(axis=0)


def _detail(pixels: np.ndarray, corner: np.ndarray, side: float) -> float:
    left, top = (max(0, int(value)) for value in corner)
    patch = pixels[top : top + int(side), left : left + int(side)]
    return float(np.abs(np.diff(patch, axis=0)).mean() + np.abs(np.diff(patch, axis=1)).mean())


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    # Rounded, so that a scene's text form, and with it the clip's id, stays short.
    return round(float(rng.uniform(low, high)), 4)
