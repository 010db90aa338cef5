"""The Fréchet distance between Gaussians, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Variances below this share of the largest one are float64 rounding, not data. A covariance of fewer samples than
# dimensions has many.
_NOISE = torch.finfo(torch.float64).eps


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
