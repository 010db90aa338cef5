"""The patches of a video that are measured, cutting them, and the Fréchet distance between sets of their features."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Placement = Literal["grid", "random", "both"]

# Variances below this share of the largest one are float64 rounding, not data. A covariance of fewer samples than
# dimensions has many.
_NOISE = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class PatchPlan:
    """Where FID_patch looks. LuVe (arXiv 2602.11564) gives 8 frames and 256x256 patches, not their places or number.

    Attributes:
        size: height and width of a patch in pixels.
        placement: "grid" (covers the frame, the same for every video), "random" (any position, drawn for each
            frame of each video) or "both".
        per_frame: number of random patches per frame.
        frames: number of frames per video, the middles of equal parts; a shorter video gives all its frames.
        seed: seed of the random positions.
        grid: rows and columns, evenly spaced from edge to edge, overlapping where necessary; None for as many as
            fit side by side (4 x 7 of 256 in 1080p).

    Example:
        >>> plan = PatchPlan(frames=2)
        >>> plan.frame_indices(49)
        (12, 36)
        >>> plan.places(49, 1080, 1920).shape  # 2 frames x 4 x 7 patches, each (frame, top, left)
        torch.Size([56, 3])
    """

    size: int = 256
    placement: Placement = "grid"
    per_frame: int = 8
    frames: int = 8
    seed: int = 0
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.placement not in get_args(Placement):
            raise ValueError(f"patches.placement {self.placement!r}: expected grid, random or both")
        for name in ("size", "per_frame", "frames"):
            if int(getattr(self, name)) != getattr(self, name) or getattr(self, name) < 1:
                raise ValueError(f"patches.{name} {getattr(self, name)}: expected an integer >= 1")
        if self.grid is not None:
            object.__setattr__(self, "grid", tuple(self.grid))  # configuration files give lists
            if len(self.grid) != 2 or min(self.grid) < 1:
                raise ValueError(f"patches.grid {self.grid}: expected rows and columns, each >= 1")

    def frame_indices(self, total: int) -> tuple[int, ...]:
        """The frame numbers for a video of `total` frames, ascending, each once.

        Raises:
            ValueError: when there is no frame.
        """
        if total < 1:
            raise ValueError("a video without frames has no patches")
        return tuple(dict.fromkeys((2 * i + 1) * total // (2 * self.frames) for i in range(self.frames)))

    def positions(self, height: int, width: int, key: str = "", frames: int = 1) -> Tensor:
        """Upper left corners of the patches.

        Args:
            height: height of the frames.
            width: width of the frames.
            key: what the random positions belong to, e.g. the video's name; another key gives other positions.
            frames: number of frames; random positions differ between them.

        Returns:
            int64, frames x patches x 2 (top, left); the grid's first.

        Raises:
            ValueError: when the frames are smaller than a patch.
        """
        if min(height, width) < self.size:
            raise ValueError(f"frames are {height}x{width}, smaller than a patch of {self.size} (patches.size)")
        parts = []
        if self.placement != "random":
            parts.append(self._grid_positions(height, width).expand(frames, -1, -1))
        if self.placement != "grid":
            parts.append(self._random_positions(height, width, key, frames))
        return torch.cat(parts, dim=1)

    def _grid_positions(self, height: int, width: int) -> Tensor:
        rows, columns = self.grid or (height // self.size, width // self.size)
        tops, lefts = _spread(rows, height - self.size), _spread(columns, width - self.size)
        return torch.cartesian_prod(tops, lefts).reshape(-1, 2)

    def _random_positions(self, height: int, width: int, key: str, frames: int) -> Tensor:
        # A generator of its own: independent of the training's randomness and of the order of videos.
        digest = hashlib.sha256(f"{self.seed}\0{key}".encode()).digest()
        random = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
        highest = [height - self.size, width - self.size]
        return torch.from_numpy(random.integers(highest, size=(frames, self.per_frame, 2), endpoint=True))

    def places(self, total: int, height: int, width: int, key: str = "") -> Tensor:
        """Every patch of a video.

        Args:
            total: number of frames of the video.
            height: height of its frames.
            width: width of its frames.
            key: see `positions`.

        Returns:
            int64, patches x 3 (frame, top, left), frame by frame.

        Raises:
            ValueError: no frame, or frames smaller than a patch.
        """
        indices = torch.tensor(self.frame_indices(total))
        corners = self.positions(height, width, key, len(indices))
        return torch.cat([indices[:, None, None].expand(-1, corners.shape[1], 1), corners], dim=2).flatten(0, 1)

    def cut(self, frames: Tensor, key: str = "") -> Tensor:
        """All patches of a video at once, see `places` and `cut_patches`; 190 MB for a 4K video.

        Args:
            frames: T x H x W x 3.
            key: see `positions`.
        """
        total, height, width, _ = frames.shape
        return cut_patches(frames, self.places(total, height, width, key), self.size)


def cut_patches(frames: Tensor, places: Tensor, size: int) -> Tensor:
    """Cut patches in one gather from a view of all windows.

    Args:
        frames: T x H x W x C, any type, any device.
        places: int64, N x 3 (frame, top, left), inside the frames.
        size: height and width of a patch.

    Returns:
        A copy, N x C x size x size.
    """
    windows = frames.unfold(1, size, 1).unfold(2, size, 1)
    frame, top, left = places.to(frames.device).unbind(1)
    return windows[frame, top, left]


def _spread(count: int, last: int) -> Tensor:
    """`count` integers evenly spaced from 0 to `last`; one of them lies in the middle."""
    if count == 1:
        return torch.tensor([last // 2])
    return torch.arange(count) * last // (count - 1)


@dataclass(frozen=True)
class FrechetTarget:
    """A Gaussian to compare many others with: its covariance is decomposed once.

    Attributes:
        mean: float64, shape (D,).
        factor: S of shape D x rank with S S^T the covariance, float64.
        trace: trace of the covariance.
    """

    mean: Tensor
    factor: Tensor
    trace: float

    @classmethod
    def of(cls, mean: Tensor, cov: Tensor) -> FrechetTarget:
        """Decompose a Gaussian.

        Args:
            mean: shape (D,).
            cov: D x D, symmetric and positive semi-definite up to rounding; may be singular.

        Raises:
            ValueError: other shapes, or values that are not finite.
        """
        mean, cov = _checked(mean, cov)
        values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
        kept = values > len(values) * _NOISE * values[-1].clamp(min=0)
        return cls(mean, vectors[:, kept] * values[kept].sqrt(), cov.trace().item())

    def distance(self, mean: Tensor, cov: Tensor) -> float:
        """Squared Fréchet distance to another Gaussian, see `frechet_distance`."""
        mean, cov = _checked(mean, cov)
        if mean.shape != self.mean.shape:
            raise ValueError(f"Gaussians of {len(mean)} and {len(self.mean)} dimensions cannot be compared")
        if mean.device != self.mean.device:
            raise ValueError(f"Gaussians lie on {mean.device} and {self.mean.device}; move one to the other")
        product = self.factor.T @ cov @ self.factor
        # Rounding leaves eigenvalues slightly below zero.
        overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
        squared = (mean - self.mean).square().sum() + cov.trace() + self.trace - 2 * overlap
        return max(0.0, squared.item())


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance between two Gaussians, as FID reports it.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Dowson and Landau 1982). With C1 = S S^T, the trace of the root is
    the sum of the square roots of the eigenvalues of the symmetric S^T C2 S. It is real and never negative, even
    for singular covariances; the general matrix root of other implementations is neither. Symmetric in the two
    Gaussians.

    Args:
        mean1: shape (D,).
        cov1: D x D.
        mean2: shape (D,).
        cov2: D x D.

    Returns:
        The distance, >= 0, computed in float64.

    Raises:
        ValueError: other shapes, or values that are not finite.

    Example:
        >>> frechet_distance(torch.zeros(2), torch.eye(2), torch.ones(2), 4 * torch.eye(2))
        4.0
    """
    return FrechetTarget.of(mean1, cov1).distance(mean2, cov2)


def _checked(mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise ValueError(
            f"expected a mean of D and a covariance of D x D, got {tuple(mean.shape)} and {tuple(cov.shape)}"
        )
    mean, cov = mean.detach().to(torch.float64), cov.detach().to(torch.float64)
    if not (mean.isfinite().all() and cov.isfinite().all()):
        raise ValueError("a mean or covariance of features holds values that are not finite")
    return mean, cov
