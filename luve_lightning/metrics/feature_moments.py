"""The interface of a network that gives features for a Fréchet distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class FeatureExtractor(nn.Module):
    """Patches to feature vectors, frozen.

    Constructors take configuration values and load nothing; `prepare` does. A subclass defines the methods that
    raise NotImplementedError here.

    Attributes:
        kind: suffix of the column `fd_patch_<kind>`, e.g. "vae"; "inception" is FID's own network.
        resolution: size at which the network sees a patch, in words.
    """

    kind: str
    resolution: str

    @property
    def name(self) -> str:
        """Identifies the network and its weights, e.g. "inception-clean"; equal names mean comparable features."""
        raise NotImplementedError

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        raise NotImplementedError

    def prepare(self, device: torch.device | str) -> None:
        """Load what is needed, once, and move it to a device.

        Raises:
            Unavailable: a file or a package is missing.
        """
        self.to(device)

    def forward(self, patches: Tensor) -> Tensor:
        """Features of patches; the extractor resizes and normalises them itself.

        Args:
            patches: uint8 N x 3 x S x S, full-range sRGB, on the device given to `prepare`.

        Returns:
            float32 N x D.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stay in evaluation mode: features must not depend on the rest of the batch."""
        del mode
        return super().train(False)


# Outer products of all videos are kept up to this size; above it, they are summed anew from the features.
_KEPT_BYTES = 2**28


@dataclass(frozen=True)
class FeatureMoments:
    """Moments of a set of feature vectors; adding two gives the moments of both sets.

    Attributes:
        count: number of vectors.
        sum: float64, shape (D,).
        outer: sum of f f^T, float64, D x D.
    """

    count: int
    sum: Tensor
    outer: Tensor

    @classmethod
    def zeros(cls, dim: int) -> FeatureMoments:
        """Moments of no vectors of `dim` dimensions."""
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def from_features(cls, features: Tensor) -> FeatureMoments:
        """Moments of N vectors, N x D of any precision.

        Raises:
            ValueError: another shape, or values that are not finite.
        """
        checked_features(features)
        exact = features.detach().to(torch.float64)
        return cls(len(exact), exact.sum(0), exact.T @ exact)

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        return len(self.sum)

    def __add__(self, other: FeatureMoments) -> FeatureMoments:
        if self.dim != other.dim:
            raise ValueError(f"features of {self.dim} and {other.dim} dimensions cannot be put together")
        return FeatureMoments(self.count + other.count, self.sum + other.sum, self.outer + other.outer)

    def mean(self) -> Tensor:
        """The mean, float64, shape (D,).

        Raises:
            ValueError: fewer than 2 vectors.
        """
        self._require_two()
        return self.sum / self.count

    def cov(self) -> Tensor:
        """The covariance with N - 1 in the denominator (like `numpy.cov`), float64, D x D.

        Raises:
            ValueError: fewer than 2 vectors.
        """
        self._require_two()
        return (self.outer - torch.outer(self.sum, self.sum / self.count)) / (self.count - 1)

    def _require_two(self) -> None:
        if self.count < 2:
            raise ValueError(f"{self.count} patches have no covariance: at least 2 are needed")


class GroupedMoments:
    """Features of several videos, for moments under many different weights.

    For the bootstrap over videos: a resample is how often each video was drawn. The Fréchet distance of few
    samples is too large: its bias falls like 1/N (Chong and Forsyth 2020), and below N = D rank is missing. A
    resample holds fewer different videos than the sample, so resampled distances lie above the sample's: their
    spread is that of the distance, their mean is not. Compare only distances of equally many patches.

    Args:
        features: features of each video, N x D; N may differ.

    Raises:
        ValueError: no video, unequal D, or values that are not finite.
    """

    def __init__(self, features: Sequence[Tensor]) -> None:
        if not features:
            raise ValueError("no video to take features from")
        for group in features:
            checked_features(group)
        if len({group.shape[1] for group in features}) > 1:
            raise ValueError("features of videos differ in their number of dimensions")
        self.dim = features[0].shape[1]
        self._lengths = torch.tensor([len(group) for group in features])
        self._rows: Tensor | None = torch.cat([group.detach() for group in features])
        self._sums = torch.stack([group.detach().double().sum(0) for group in features])
        self._outers: Tensor | None = None
        if len(features) * self.dim**2 * 8 <= _KEPT_BYTES:
            self._outers = torch.stack([(group.double().T @ group.double()).flatten() for group in features])
            self._rows = None

    def __len__(self) -> int:
        return len(self._lengths)

    def weighted(self, counts: Sequence[int] | Tensor) -> FeatureMoments:
        """Moments of all videos, the i-th taken `counts[i]` times.

        Args:
            counts: an integer >= 0 for each video.

        Raises:
            ValueError: a wrong number of counts, or other numbers.
        """
        weights = torch.as_tensor(counts)
        if weights.shape != self._lengths.shape or weights.is_floating_point() or (weights < 0).any():
            raise ValueError(f"expected {len(self)} counts, each an integer >= 0")
        exact = weights.double()
        count = int((weights * self._lengths).sum())
        return FeatureMoments(count, exact @ self._sums, self._outer(weights, exact))

    def _outer(self, weights: Tensor, exact: Tensor) -> Tensor:
        if self._outers is not None:
            return (exact @ self._outers).reshape(self.dim, self.dim)
        assert self._rows is not None  # one of the two is kept
        drawn = weights.repeat_interleave(self._lengths)
        total = torch.zeros(self.dim, self.dim, dtype=torch.float64)
        taken = drawn.nonzero().squeeze(1)
        for part in taken.split(4096):  # float64 copies of all features would double their size
            rows = self._rows[part].double() * drawn[part].double().sqrt()[:, None]
            total.addmm_(rows.T, rows)
        return total


def checked_features(features: Tensor) -> Tensor:
    """The features themselves, checked.

    Raises:
        ValueError: not N x D of floating point, or values that are not finite.
    """
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(
            f"features must be floating point N x D, got {features.dtype} {tuple(features.shape)}"
        )
    if not features.isfinite().all():
        raise ValueError("features hold values that are not finite: the extractor or its input is broken")
    return features
