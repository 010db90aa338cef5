"""The scorers of clips: their interface, a local one, and HPS v3."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luve_lightning.data.clip_container import Frames
from luve_lightning.files import file_digest


class Scorer(ABC):
    """Rates pictures, one number each; higher is better.

    Scores by different scorers, or by versions of one, are never mixed or compared. Constructing one is cheap: a
    model is loaded when the first picture is scored.
    """

    name: str
    """Which measure it is."""

    @property
    @abstractmethod
    def version(self) -> str:
        """Everything besides pictures and captions that decides the scores, such as a digest of the weights."""

    @abstractmethod
    def score(self, frames: Frames, captions: Sequence[str]) -> list[float]:
        """Rate frames against captions.

        Args:
            frames: uint8 N x H x W x 3, red first.
            captions: N texts, one for each frame.

        Returns:
            N finite numbers.
        """


_MARGIN = 0.02  # luminance this near to black or white shows nothing: five of 256 levels


class SharpnessExposure(Scorer):
    """Sharpness times exposure, in [0, 1]. It ignores captions, and is no substitute for HPS v3.

    Sharpness is 1 - `skimage.measure.blur_effect` (Crete et al. 2007: how little a blur changes the frame);
    exposure is the share of pixels that are neither black nor white.
    """

    name = "sharpness-exposure"

    @property
    def version(self) -> str:
        """The version of the formula above; the photographs' library is pinned by minor version."""
        return "1"

    def score(self, frames: Frames, captions: Sequence[str]) -> list[float]:
        """N x H x W x 3 uint8 to N numbers in [0, 1]; frames are at least 2 pixels high and wide."""
        from skimage.color import rgb2gray

        return [_sharpness(gray) * _exposure(gray) for gray in map(rgb2gray, frames)]


def _sharpness(gray: NDArray[np.float64]) -> float:
    from skimage.measure import blur_effect

    if gray.std() < 1e-6:  # nothing to see; blur_effect would divide zero by zero
        return 0.0
    return float(np.clip(1 - blur_effect(gray), 0, 1))


def _exposure(gray: NDArray[np.float64]) -> float:
    return float(np.mean((gray > _MARGIN) & (gray < 1 - _MARGIN)))


_REPOSITORY, _FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"  # where the package itself looks


class HPSv3Scorer(Scorer):
    """Human preference for a picture given its caption, by a vision-language model of 7 B parameters.

    Args:
        checkpoint: local file of the weights; default the published ones from the Hugging Face hub (17 GB, and the
            Qwen2-VL-7B that they are built on).
        device: device of the model. "cuda" under torchrun is the process's GPU.
        batch_size: pictures per forward pass.
    """

    name = "hpsv3"

    def __init__(self, checkpoint: Path | None = None, device: str = "cuda", batch_size: int = 8) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        try:
            self._package = metadata.version("hpsv3")
        except metadata.PackageNotFoundError:
            raise ValueError(
                "hpsv3 is not installed in this environment; run `make setup-hpsv3`, then use .venv-hpsv3/bin/luve"
            ) from None
        if checkpoint is not None and not checkpoint.is_file():
            raise FileNotFoundError(f"checkpoint: no such file: {checkpoint}")
        self.checkpoint, self.batch_size = checkpoint, batch_size
        self.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device

    @cached_property
    def _weights(self) -> Path:
        if self.checkpoint is not None:
            return self.checkpoint
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(_REPOSITORY, _FILE))
        except OSError as error:
            raise FileNotFoundError(
                f"checkpoint: {_FILE} of {_REPOSITORY} is not in the Hugging Face cache and cannot be downloaded "
                f"({type(error).__name__}); download it, or give a local file"
            ) from error

    @cached_property
    def version(self) -> str:
        """The package's version and the first digits of the weights' sha256."""
        return f"{self._package}, weights {weights_digest(self._weights)[:12]}"

    @cached_property
    def _model(self) -> Any:
        from hpsv3 import HPSv3RewardInferencer

        return HPSv3RewardInferencer(checkpoint_path=str(self._weights), device=self.device)

    def score(self, frames: Frames, captions: Sequence[str]) -> list[float]:
        """N x H x W x 3 uint8 and N captions to N scores; the paper's threshold is 6.5."""
        import torch
        from PIL import Image

        scores: list[float] = []
        for start in range(0, len(frames), self.batch_size):
            part = slice(start, start + self.batch_size)
            # The package takes pictures where it says paths, and keeps gradients unless told otherwise.
            pictures = [Image.fromarray(frame) for frame in frames[part]]
            with torch.inference_mode():
                rewards = self._model.reward(pictures, list(captions[part]))
            scores += rewards[:, 0].float().tolist()  # column 1 is the score's uncertainty
        return scores


def weights_digest(file: Path) -> str:
    """sha256 of a file; the Hugging Face cache names a large file by it, which saves reading 17 GB."""
    content = file.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", content):
        return content
    return file_digest(file)
