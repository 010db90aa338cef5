"""The base of every video metric: a mean over videos that says what its networks were shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from luve_lightning.functional.pixels import described


class Unavailable(RuntimeError):
    """Raised for a measurement that cannot run here.

    Its message is one line: which file or package is missing, its size, and where to put it or how to install it.
    """


class VideoMetric(Metric):
    """The mean of a score over videos.

    Constructors take configuration values or a given network and load nothing; `prepare`, or else the first
    `score`, does. Never make a metric an attribute of a LightningModule: optimizer, checkpoint and precision would
    take hold of its networks. States are float64, whatever precision the module is cast to, and are summed over
    processes, so uneven or empty shares of the videos change nothing.

    A subclass sets the class attributes and defines `measure`, or `measure_prompted` when the score depends on the
    prompt, and `load` when it needs a network.

    Attributes:
        name: column of a table.
        higher_is_better: direction.
        resolution: size at which frames are measured, in words, for networks that see less than the video has.
        full_reference: whether `score` compares with an original's frames.
        prompted: whether `score` depends on the video's prompt.
        least_frames: fewest frames for which the measure is defined.
    """

    name: str
    resolution: str
    higher_is_better: bool | None = True
    full_reference: bool = False
    prompted: bool = False
    least_frames: int = 1
    is_differentiable: bool | None = False
    full_state_update: bool | None = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.training = False

    def prepare(self, device: torch.device | str) -> None:
        """Load what the metric needs, once, and move everything to a device.

        Raises:
            Unavailable: a file or a package is missing.
        """
        self.load()
        self.to(device)

    def load(self) -> None:
        """Load what the metric needs unless it is loaded; nothing by default."""

    def score(self, frames: Tensor, reference: Tensor | None = None, prompt: str | None = None) -> float:
        """Measure one video.

        Args:
            frames: uint8 T x H x W x 3, full-range sRGB, on any device.
            reference: the original's frames, same shape; ignored unless `full_reference`.
            prompt: the video's prompt; ignored unless `prompted`.

        Returns:
            The video's score, in the unit given by the class.

        Raises:
            ValueError: frames that cannot be measured.
            Unavailable: a file or a package is missing.
        """
        check_frames(frames, self.name, self.least_frames)
        if self.full_reference:
            if reference is None:
                raise ValueError(f"{self.name}: compares with the original's frames, and none were given")
            if reference.shape != frames.shape or reference.dtype != torch.uint8:
                raise ValueError(
                    f"{self.name}: the original must be uint8 {' x '.join(map(str, frames.shape))} as the video is, "
                    f"got {described(reference)}"
                )
        if self.prompted and prompt is None:
            raise ValueError(f"{self.name}: depends on the video's prompt, and none was given")
        self.load()
        # A network's score must not depend on the precision of the training around it.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self.prompted and prompt is not None:
                return float(self.measure_prompted(frames, prompt))
            return float(self.measure(frames, reference))

    def measure(self, frames: Tensor, reference: Tensor | None) -> Tensor | float:
        """`score` for checked frames: without gradients and autocast, with everything loaded."""
        raise NotImplementedError

    def measure_prompted(self, frames: Tensor, prompt: str) -> Tensor | float:
        """Instead of `measure`, for a metric that is `prompted`."""
        raise NotImplementedError

    def weight(self, frames: Tensor) -> float:
        """The video's weight in the mean: 1, unless the measure averages over frames."""
        return 1.0

    def update(self, frames: Tensor, reference: Tensor | None = None, prompt: str | None = None) -> None:
        """Measure one video and add it to the mean, see `score`."""
        weight = self.weight(frames)
        self.total += weight * self.score(frames, reference, prompt)
        self.count += weight

    def compute(self) -> Tensor:
        """The mean over all videos, float64.

        Raises:
            ValueError: no video was measured.
        """
        if not self.count:
            raise ValueError(f"{self.name}: no video was measured")
        return self.total / self.count

    def train(self, mode: bool = True) -> VideoMetric:
        """Stay in evaluation mode: networks that measure are never trained."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> nn.Module:
        # Moves, but never casts: torchmetrics guards its states against .half() and the like but not against
        # .to(dtype), and the networks inside would be cast in any case.
        device = fn(torch.zeros(1, device=self.device)).device
        return super()._apply(lambda tensor: tensor.to(device), exclude_state)


def frozen(network: nn.Module) -> nn.Module:
    """The network itself, frozen for measuring: evaluation mode, no gradients."""
    return network.eval().requires_grad_(False)


def check_frames(frames: Tensor, name: str, least: int = 1) -> None:
    """Refuse what is not a video.

    Args:
        frames: expected to be uint8 T x H x W x 3.
        name: name of the metric, for the message.
        least: fewest frames for which the metric is defined.

    Raises:
        ValueError: another type or shape, or too few frames.
    """
    if not isinstance(frames, Tensor):
        raise ValueError(f"{name}: frames must be a uint8 tensor T x H x W x 3, got {type(frames).__name__}")
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"{name}: frames must be uint8 T x H x W x 3, got {described(frames)}")
    if frames.shape[0] < least or min(frames.shape[1:3]) < 1:
        raise ValueError(
            f"{name}: needs at least {least} frame{'s' if least > 1 else ''} of a video, got "
            f"{frames.shape[0]} of {frames.shape[1]}x{frames.shape[2]}"
        )
