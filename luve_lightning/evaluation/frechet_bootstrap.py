"""How sure a Fréchet distance is: bootstrap over videos, with the shift that resampling itself causes taken out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luve_lightning.evaluation.bootstrap import Interval, draw_counts, percentiles
from luve_lightning.functional.frechet import FrechetTarget
from luve_lightning.metrics.feature_moments import FeatureMoments, GroupedMoments

Counts = NDArray[np.int64]
Distance = Callable[[FeatureMoments, Counts | None], float]
"""From the moments of a resample, and how often it has each video (None: the sample itself), to the reference."""


class Originals:
    """A reference that is drawn along: a resample has a video's original as often as the video.

    Methods are asked to make the very videos of the reference, so which videos these happen to be moves both. The
    originals of other names stay as they are.

    Args:
        features: of each original by name, N x D.
        names: of the videos that are resampled, in the order of the counts.
    """

    def __init__(self, features: Mapping[str, Tensor], names: Sequence[str]) -> None:
        self.names = sorted(features)
        self.moments = GroupedMoments([features[name] for name in self.names])
        places = {name: place for place, name in enumerate(names)}
        self.places = [places.get(name) for name in self.names]
        self.whole = self._target(None)

    def _target(self, counts: Counts | None) -> FrechetTarget:
        drawn = [1 if counts is None or place is None else int(counts[place]) for place in self.places]
        moments = self.moments.weighted(drawn)
        return FrechetTarget.of(moments.mean(), moments.cov())

    def distance(self, moments: FeatureMoments, counts: Counts | None) -> float:
        """See `Distance`."""
        target = self.whole if counts is None else self._target(counts)
        return target.distance(moments.mean(), moments.cov())


class FrechetBootstrap:
    """The distance of one method's videos from a reference, and of resamples of them.

    A resample holds fewer different videos than the sample, and the distance of fewer videos is larger (its bias falls
    like 1/N, Chong and Forsyth 2020): the resampled distances lie above the sample's. Their percentiles are therefore
    shifted by the difference of the sample's distance and the resamples' mean. That leaves the bias of the sample
    itself, which is the same for methods of equally many patches.

    Args:
        features: of each video, N x D float32.
        distance: to the reference.
        seed: of the resampling.
        replicates: how often the videos are drawn anew.
        advance: told of every distance computed.
    """

    def __init__(
        self,
        features: Sequence[Tensor],
        distance: Distance,
        seed: int,
        replicates: int,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        moments = GroupedMoments(features)
        self.videos = len(features)
        self.value = distance(moments.weighted([1] * self.videos), None)
        draws = []
        for counts in draw_counts(self.videos, seed, replicates) if self.videos > 1 else ():
            draws.append(distance(moments.weighted(torch.from_numpy(counts)), counts))
            advance()
        self.draws: NDArray[np.float64] = np.array(draws)

    def interval(self) -> Interval:
        """The distance with its shifted 95 % interval, never below 0."""
        low, high = _shifted(self.value, self.draws, self.videos)
        return Interval(self.value, max(low, 0.0) if low == low else low, high, self.videos)

    def difference(self, other: FrechetBootstrap) -> Interval:
        """This distance minus the other's with its shifted 95 % interval.

        Args:
            other: of the same videos by name, in the same order, with the same seed and replicates.

        Raises:
            ValueError: other numbers of videos or replicates.
        """
        if (self.videos, len(self.draws)) != (other.videos, len(other.draws)):
            raise ValueError(f"a pair needs the same videos, got {self.videos} and {other.videos}")
        value = self.value - other.value
        return Interval(value, *_shifted(value, self.draws - other.draws, self.videos), self.videos)


def _shifted(value: float, draws: NDArray[np.float64], videos: int) -> tuple[float, float]:
    if videos < 2:
        return float("nan"), float("nan")
    low, high = percentiles(draws, videos)
    shift = value - float(draws.mean())
    return low + shift, high + shift
