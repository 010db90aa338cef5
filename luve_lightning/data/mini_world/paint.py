"""From a scene to frames: the photograph seen by the camera, sprites and their outlines over it, all frames at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from luve_lightning.data.mini_world.scene import (
    DIRECTIONS,
    EASINGS,
    SHAPES,
    SPEEDS,
    SPLITS,
    SPRITE_ACTIONS,
    SPRITE_SIZES,
    Camera,
    ColoredSprite,
    Grade,
    Photograph,
    Scene,
    Sprite,
    camera_path,
    load_photograph,
    photograph_named,
    photographs_of,
    sprite_path,
)
from luve_lightning.data.mini_world.stage import FlawedScene
from luve_lightning.functional import takes

RIM = 0.12  # width of a coloured sprite's rim, in radii
_GREY = torch.tensor([0.299, 0.587, 0.114])


def paint_scene(scene: Scene, first: int | None = None) -> Tensor:
    """Paints every frame of a clip, or only so many of the first, uint8 `T x H x W x 3`.

    Where the camera sees more photograph pixels than the clip has, frames are painted larger and reduced with an
    antialiasing filter, so detail stays sharp without flickering; sprites gain from it, too.
    """
    _, windows, _ = camera_path(scene.camera, scene.frames)
    factor = max(1, math.ceil(float(windows.max()) / scene.size - 0.15))
    canvas = _paint_background(scene, scene.size * factor, first)
    for sprite in scene.sprites:
        _paint_sprite(canvas, scene, sprite)
    if factor > 1:
        size = (scene.size, scene.size)
        canvas = F.interpolate(canvas, size, mode="bicubic", antialias=True, align_corners=False)
    return canvas.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def paint_take(scene: Scene) -> Tensor:
    """Paints a clip as it was taken: a flawed take with its flaw, any other as it is; uint8 `T x H x W x 3`.

    A flaw's amount is, blurred: standard deviation of a Gaussian in pixels of a clip of 192. noisy: standard deviation
    of normal noise, of 255. blocky: quality of a JPEG. dark: factor on every level. blown: the same, under a veil of
    light. shaky: standard deviation of a frame's place, in pixels of a clip of 192. frozen: share of the clip that
    stands still at its end. stuttering: number of frames for which each that is shown stands.
    """
    if not isinstance(scene, FlawedScene):
        return paint_scene(scene)
    rng = np.random.default_rng([scene.seed, scene.index, 6])
    scale = scene.size / REFERENCE_SIZE
    if scene.flaw == "shaky":
        margin = math.ceil(12 * scale)
        return takes.shaken(paint_scene(_widened(scene, margin)), margin, scene.amount * scale, rng)
    frames, amount = paint_scene(scene), scene.amount
    spoilt = {
        "blurred": lambda: takes.blurred(frames, amount * scale),
        "noisy": lambda: takes.noisy(frames, amount, rng),
        "blocky": lambda: takes.compressed(frames, round(amount)),
        "dark": lambda: takes.exposed(frames, amount),
        "blown": lambda: takes.exposed(frames, amount, veil=0.3),
        "frozen": lambda: takes.frozen_from(frames, amount),
        "stuttering": lambda: takes.stuttering(frames, round(amount)),
    }
    return spoilt[scene.flaw]()


def _widened(scene: Scene, margin: int) -> Scene:
    """The same scene with so many pixels more on each side; the borders of a photograph are repeated beyond it."""
    factor = 1 + 2 * margin / scene.size
    camera = replace(scene.camera, window=scene.camera.window * factor, distance=scene.camera.distance / factor)
    sprites = tuple(
        replace(
            sprite,
            start=(sprite.start[0] / factor, sprite.start[1] / factor),
            stop=(sprite.stop[0] / factor, sprite.stop[1] / factor),
            radius=sprite.radius / factor,
        )
        for sprite in scene.sprites
    )
    return replace(scene, size=scene.size + 2 * margin, camera=camera, sprites=sprites)


def _paint_background(scene: Scene, side: int, first: int | None) -> Tensor:
    """Returns what the camera sees, float32 `T x 3 x side x side`."""
    picture = apply_grade(load_photograph(photograph_named(scene.url)), scene.grade)
    centers, windows, angles = (path[:first] for path in camera_path(scene.camera, scene.frames))
    x, y = torch.meshgrid(_pixel_centers(side), _pixel_centers(side), indexing="xy")
    cos, sin = _per_frame(np.cos(angles) * windows / 2), _per_frame(np.sin(angles) * windows / 2)
    places = torch.stack(
        [_per_frame(centers[:, 0]) + cos * x - sin * y, _per_frame(centers[:, 1]) + sin * x + cos * y], dim=-1
    )
    return _sample(picture, places)


def _paint_sprite(canvas: Tensor, scene: Scene, sprite: Sprite) -> None:
    """Draws one sprite over the canvas `T x 3 x S x S`, in place, touching only the square around it."""
    side = canvas.shape[-1]
    positions, radii, angles = sprite_path(sprite, scene.frames)
    # Half a diagonal of the shape's square, plus a pixel for the soft edge; in half frames.
    reach = float(radii.max()) * 1.45 + 4 / side
    patch = min(side, math.ceil(reach * side))
    positions, radii, angles = (path[: len(canvas)] for path in (positions, radii, angles))
    corners = np.rint((positions + 1) / 2 * side - patch / 2).clip(0, side - patch).astype(np.int64)
    axis = (torch.arange(patch, dtype=torch.float32) + 0.5) * (2 / side) - 1
    left, top = _per_frame(corners[:, 0] * (2 / side)), _per_frame(corners[:, 1] * (2 / side))
    x = axis.view(1, 1, -1) + left - _per_frame(positions[:, 0])
    y = axis.view(1, -1, 1) + top - _per_frame(positions[:, 1])
    cos, sin = _per_frame(np.cos(angles) / radii), _per_frame(np.sin(angles) / radii)
    across, down = cos * x + sin * y, cos * y - sin * x
    cut_left, cut_top, cut_side = sprite.cut
    half = cut_side / 2
    # Graded like the whole picture, but never mirrored: the cut was chosen in the photograph itself.
    grade = replace(scene.grade, flip=False)
    picture = apply_grade(load_photograph(photograph_named(sprite.texture)), grade)
    texture = _sample(picture, torch.stack([cut_left + half + half * across, cut_top + half + half * down], dim=-1))
    # One pixel of the finished clip, in radii: the edge fades over that distance.
    pixel = _per_frame(2 / (scene.size * radii))
    distance = OUTLINES[sprite.shape](across, down)
    if isinstance(sprite, ColoredSprite):
        texture = _colored(texture, sprite.color, (0.5 - (distance + RIM) / pixel).clamp(0, 1).unsqueeze(1))
    alpha = (0.5 - distance / pixel).clamp(0, 1).unsqueeze(1)
    for frame, (column, row) in enumerate(corners.tolist()):
        region = canvas[frame, :, row : row + patch, column : column + patch]
        region.lerp_(texture[frame], alpha[frame].expand_as(region))


def _colored(texture: Tensor, color: tuple[int, int, int], inside: Tensor) -> Tensor:
    """Returns the colour, shaded by the texture `T x 3 x h x w`, within a dark rim; `inside` is 0 on the rim."""
    shade = 0.62 + 0.7 * texture.mean(dim=1, keepdim=True)
    paint = torch.tensor(color).view(1, 3, 1, 1) / 255
    return (paint * shade * inside + 0.06 * (1 - inside)).clamp(0, 1)


def apply_grade(picture: Tensor, grade: Grade) -> Tensor:
    """Applies a colour grade to a picture `3 x H x W` in [0, 1]; the neutral grade returns it unchanged."""
    if grade == Grade():
        return picture
    matrix = _hue_matrix(grade.hue)
    grey = _GREY.expand(3, 3)
    matrix = torch.diag(torch.tensor(grade.balance)) @ (grey + grade.saturation * (torch.eye(3) - grey)) @ matrix
    graded = torch.einsum("ij,jhw->ihw", matrix * (grade.contrast * grade.brightness), picture)
    graded = (graded + 0.45 * (1 - grade.contrast) * grade.brightness).clamp(0, 1)
    return graded.flip(-1) if grade.flip else graded


def _hue_matrix(degrees: float) -> Tensor:
    # Rotation about the grey axis (1, 1, 1): Rodrigues' formula.
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)) / math.sqrt(3)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    return cos * torch.eye(3) + (1 - cos) / 3 * torch.ones(3, 3) + sin * cross


def _sample(picture: Tensor, places: Tensor) -> Tensor:
    """Reads a picture `3 x H x W` at places `T x h x w x 2` (x, y in pixels), bicubic, as `T x 3 x h x w`."""
    frames, height, width, _ = places.shape
    scale = torch.tensor([2 / picture.shape[2], 2 / picture.shape[1]])
    # One tall image instead of a batch: the picture is not repeated for every frame.
    grid = (places * scale - 1).view(1, frames * height, width, 2)
    seen = F.grid_sample(picture[None], grid, mode="bicubic", padding_mode="border", align_corners=False)
    return seen.view(3, frames, height, width).transpose(0, 1).contiguous()


def _pixel_centers(side: int) -> Tensor:
    return (torch.arange(side, dtype=torch.float32) + 0.5) * (2 / side) - 1


def _per_frame(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).float().view(-1, 1, 1)


# The scene is laid out for this size; other sizes show the same scene in more or fewer pixels.
REFERENCE_SIZE = 192
WINDOW_RANGE = (150.0, 400.0)

# Kinds of camera work, and how often each is drawn, in percent.
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
    """Draws clip `index` of a split at random; independent of every other clip.

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
    # Something moves in every clip: with a still camera the first sprite must.
    sprites = tuple(_draw_sprite(rng, photograph, still and i == 0) for i in range(max(count, int(still))))
    return Scene(seed, split, index, frames, size, fps, photograph.url, grade, camera, sprites)


def _turn_of(seed: int, number: int, split: str, index: int) -> Photograph:
    # Photographs take turns, reshuffled each round, so that even few clips show many of them.
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


def _try_camera(rng: np.random.Generator, pixels: np.ndarray, kind: tuple[str, ...], speed: str) -> Camera | None:
    """Draws one camera over grey pixels `H x W`; None when the photograph is too small for its path."""
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
    # Take the place with most detail of three, instead of the empty sky again and again.
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
    # numpy, not torch: its sums do not depend on the number of threads, so neither do the choices below.
    return load_photograph(photograph).numpy().mean(axis=0)


def _detail(pixels: np.ndarray, corner: np.ndarray, side: float) -> float:
    left, top = (max(0, int(value)) for value in corner)
    patch = pixels[top : top + int(side), left : left + int(side)]
    return float(np.abs(np.diff(patch, axis=0)).mean() + np.abs(np.diff(patch, axis=1)).mean())


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    # Rounded, so that a scene's text form, from which the clip's id comes, stays short.
    return round(float(rng.uniform(low, high)), 4)


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


def _corners(count: int, *radii: float) -> list[tuple[float, float]]:
    """Corners from the top, clockwise (y points down), at these distances from the centre in turn."""
    angles = [2 * math.pi * step / count - math.pi / 2 for step in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(cycle(radii), angles, strict=False)]


# The distance of each point (x rightwards, y downwards) to a shape's outline, in radii of the shape, negative inside.
# Each outline lies within the square from -1 to 1.
OUTLINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda x, y: torch.hypot(x, y) - 1,
    "square": lambda x, y: _box(x, y, 0.85, 0.85),
    "triangle": lambda x, y: _polygon(x, y, _corners(3, 1.0)),
    "star": lambda x, y: _polygon(x, y, _corners(10, 1.0, 0.45)),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.76).abs() - 0.24,
    "hexagon": lambda x, y: _polygon(x, y, _corners(6, 1.0)),
    "cross": lambda x, y: torch.minimum(_box(x, y, 1.0, 0.36), _box(x, y, 0.36, 1.0)),
    "heart": _heart,
}
