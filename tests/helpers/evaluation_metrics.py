"""Metrics of videos for tests. Imports little: each process of a test imports it anew."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from luve_lightning.metrics.base import Unavailable, VideoMetric
from luve_lightning.metrics.feature_moments import FeatureExtractor


class Redness(VideoMetric):
    """The mean of red; writes a line into a file for every video.

    Args:
        log: the file; None writes nothing. Text, since a file that is configured as a path is part of the identity.
        gain: what the mean is multiplied by.
        refuse: refuse videos of more than this many frames.
    """

    name = "redness"
    resolution = "native"

    def __init__(self, log: str | None = None, gain: float = 1.0, refuse: int = 10**6) -> None:
        super().__init__()
        self.log, self.gain, self.refuse = log, gain, refuse

    def measure(self, frames: Tensor, reference: Tensor | None) -> float:
        if len(frames) > self.refuse:
            raise ValueError(f"redness: {len(frames)} frames, at most {self.refuse}")
        value = frames[..., 0].double().mean().item() * self.gain
        if self.log is not None:
            with Path(self.log).open("a") as stream:
                stream.write(f"{value!r}\n")
        return value


class Nearness(VideoMetric):
    """Minus the mean distance to the original."""

    name = "nearness"
    resolution = "native"
    full_reference = True

    def measure(self, frames: Tensor, reference: Tensor | None) -> Tensor:
        assert reference is not None
        return -(frames.double() - reference.double()).abs().mean()


class Fitness(VideoMetric):
    """The mean of red plus the number that the prompt ends with."""

    name = "fitness"
    resolution = "native"
    prompted = True

    def measure_prompted(self, frames: Tensor, prompt: str) -> Tensor:
        return frames[..., 0].double().mean() + int(prompt.split()[-1])


class Absent(VideoMetric):
    """Needs a file that nobody has."""

    name = "absent"
    resolution = "native"

    def load(self) -> None:
        raise Unavailable("absent needs nothing.pt (1 GB): put it into /nowhere")


class FailsLater(Redness):
    """Finds out with the first video that something is missing."""

    name = "fails_later"

    def measure(self, frames: Tensor, reference: Tensor | None) -> float:
        raise Unavailable("fails_later needs more memory")


class Means(FeatureExtractor):
    """The mean of each channel."""

    kind = "means"
    resolution = "its own size"
    name = "means-1"
    dim = 3

    def forward(self, patches: Tensor) -> Tensor:
        return patches.float().mean((2, 3)).to(torch.float32)
