"""From a scene to frames: the photograph seen by the camera, sprites over it, all frames at once."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from luve_lightning.datasets.mini_world.photographs import load_photograph, photograph_named
from luve_lightning.datasets.mini_world.scene import Grade, Scene, Sprite, camera_path, sprite_path
from luve_lightning.datasets.mini_world.shapes import signed_distance

_GREY = torch.tensor([0.299, 0.587, 0.114])


def paint_scene(scene: Scene) -> Tensor:
    """Paints every frame of a clip.

    Where the camera looks at more photograph pixels than the clip has, frames are painted larger and reduced
    with an antialiasing filter, so detail stays sharp without flickering; sprites gain from the same.

    Args:
        scene: What happens.

    Returns:
        Frames, uint8 `T x H x W x 3`.
    """
    _, windows, _ = camera_path(scene.camera, scene.frames)
    factor = max(1, math.ceil(float(windows.max()) / scene.size - 0.15))
    canvas = _paint_background(scene, scene.size * factor)
    for sprite in scene.sprites:
        _paint_sprite(canvas, scene, sprite)
    if factor > 1:
        size = (scene.size, scene.size)
        canvas = F.interpolate(canvas, size, mode="bicubic", antialias=True, align_corners=False)
    return canvas.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _paint_background(scene: Scene, side: int) -> Tensor:
    """Returns what the camera sees, float32 `T x 3 x side x side`."""
    picture = apply_grade(load_photograph(photograph_named(scene.url)), scene.grade)
    centers, windows, angles = camera_path(scene.camera, scene.frames)
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
    # Half a diagonal of the shape's square, and a pixel for the soft edge; in half frames.
    reach = float(radii.max()) * 1.45 + 4 / side
    patch = min(side, math.ceil(reach * side))
    corners = np.rint((positions + 1) / 2 * side - patch / 2).clip(0, side - patch).astype(np.int64)
    axis = (torch.arange(patch, dtype=torch.float32) + 0.5) * (2 / side) - 1
    left, top = _per_frame(corners[:, 0] * (2 / side)), _per_frame(corners[:, 1] * (2 / side))
    x = axis.view(1, 1, -1) + left - _per_frame(positions[:, 0])
    y = axis.view(1, -1, 1) + top - _per_frame(positions[:, 1])
    cos, sin = _per_frame(np.cos(angles) / radii), _per_frame(np.sin(angles) / radii)
    across, down = cos * x + sin * y, cos * y - sin * x
    cut_left, cut_top, cut_side = sprite.cut
    half = cut_side / 2
    # Graded as the whole picture is, but never mirrored: the cut was chosen in the photograph as it is.
    grade = replace(scene.grade, flip=False)
    picture = apply_grade(load_photograph(photograph_named(sprite.texture)), grade)
    texture = _sample(
        picture, torch.stack([cut_left + half + half * across, cut_top + half + half * down], dim=-1)
    )
    # One pixel of the finished clip, in radii: the edge fades over that distance.
    pixel = _per_frame(2 / (scene.size * radii))
    alpha = (0.5 - signed_distance(sprite.shape, across, down) / pixel).clamp(0, 1).unsqueeze(1)
    for frame, (column, row) in enumerate(corners.tolist()):
        region = canvas[frame, :, row : row + patch, column : column + patch]
        region.lerp_(texture[frame], alpha[frame].expand_as(region))


def apply_grade(picture: Tensor, grade: Grade) -> Tensor:
    """Applies a colour grade to a picture `3 x H x W` in [0, 1]; the neutral grade returns it as it is."""
    if grade == Grade():
        return picture
    matrix = _hue_matrix(grade.hue)
    grey = _GREY.expand(3, 3)
    matrix = (
        torch.diag(torch.tensor(grade.balance)) @ (grey + grade.saturation * (torch.eye(3) - grey)) @ matrix
    )
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
