"""Outlines of shapes, as signed distances."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor


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
