"""Edges of pictures."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

_LUMA = (0.299, 0.587, 0.114)
_TAN_22_5 = 2**0.5 - 1


def canny_edges(frames: Tensor, low: float, high: float) -> Tensor:
    """Canny's edges of pictures, as OpenCV finds them: without smoothing, from Sobel's gradients and their L1 norm.

    A pixel is on an edge where the norm is above `low` and largest across the edge, and a path of such pixels leads to
    one whose norm is above `high` (J. Canny, "A Computational Approach to Edge Detection", 1986).

    Args:
        frames: RGB levels from 0 to 255, T x 3 x H x W.
        low: threshold of the norm, which is 1020 at a step from black to white.
        high: threshold, >= low.

    Returns:
        bool, T x H x W.
    """
    grey = sum(weight * frames[:, number].float().round() for number, weight in enumerate(_LUMA))
    assert isinstance(grey, Tensor)
    grey = F.pad(grey.round()[:, None], (1, 1, 1, 1), mode="replicate")
    slope = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=grey.device)
    dx, dy = F.conv2d(grey, torch.stack([slope, slope.T])[:, None]).unbind(1)
    norm = dx.abs() + dy.abs()
    found = _ridges(norm, dx, dy) & (norm > low)
    strong = (norm > high).cpu().numpy()
    kept = [_reached(ridge, seeds) for ridge, seeds in zip(found.cpu().numpy(), strong, strict=True)]
    return torch.from_numpy(np.stack(kept)).to(frames.device)


def _ridges(norm: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Where the norm is largest among the two neighbours along the gradient, of equals the first; outside it is 0."""
    around = F.pad(norm, (1, 1, 1, 1))
    height, width = norm.shape[1:]

    def at(rows: int, columns: int) -> Tensor:
        return around[:, 1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    x, y = dx.abs(), dy.abs()
    along_x = (norm > at(0, -1)) & (norm >= at(0, 1))
    along_y = (norm > at(-1, 0)) & (norm >= at(1, 0))
    falling = (norm > at(-1, -1)) & (norm > at(1, 1))
    rising = (norm > at(-1, 1)) & (norm > at(1, -1))
    # OpenCV takes the sign of an integer's exclusive or, where 0 is positive.
    diagonal = torch.where((dx < 0) == (dy < 0), falling, rising)
    return torch.where(y < x * _TAN_22_5, along_x, torch.where(y > x * (_TAN_22_5 + 2), along_y, diagonal))


def _reached(ridge: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """The connected parts of ridges that hold a strong pixel; neighbours touch at a side or a corner."""
    labels, _ = ndimage.label(ridge, structure=np.ones((3, 3), int))
    kept: np.ndarray = ridge & np.isin(labels, np.unique(labels[ridge & strong]))
    return kept
