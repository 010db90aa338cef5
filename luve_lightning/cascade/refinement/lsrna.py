"""LSRNA: super-resolved latents with noise where the picture has edges, refined from a middle noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from luve_lightning.cascade.refinement import ContentRefinement
from luve_lightning.cascade.run import RefinementRun
from luve_lightning.cascade.stages import decode
from luve_lightning.functional.interpolation import Size3d, interpolate_latents

_LUMA = (0.299, 0.587, 0.114)
_TAN_22_5 = 2**0.5 - 1


@dataclass(frozen=True)
class EdgeNoiseRefinement(ContentRefinement):
    """Region-wise noise addition of LSRNA (arXiv 2503.18446), before LuVe's own noising and denoising.

    Canny's edges of the decoded first stage, averaged to the size of the latents and scaled to run from 0 to 1 in each
    video, give each place a standard deviation between `min_std` and `max_std`; noise of that strength is added to the
    super-resolved latents. Their detail there is then the denoiser's to make anew.

    The super-resolver is the VLUer instead of the paper's SwinIR with an implicit function: keep `upsampling: vluer`.
    For video, edges are found frame by frame and averaged over the frames of a latent frame. The paper denoises the
    last 30 of 50 steps (`skip_steps: 20`) by DemoFusion's patches; here the transformer sees the whole latents, which
    a diffusion transformer can take.

    Attributes:
        min_std: standard deviation of the noise where there are no edges, in units of the normalised latents.
        max_std: standard deviation where there are most.
        low: Canny's lower threshold, on grey levels 0 to 255: edges go on above it.
        high: Canny's upper threshold: edges begin above it.
    """

    min_std: float = 0.0
    max_std: float = 1.2
    low: float = 0.0
    high: float = 255.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_std <= self.max_std < math.inf:
            raise ValueError(f"min_std {self.min_std}, max_std {self.max_std}: expected 0 <= min_std <= max_std")
        if not 0 <= self.low <= self.high < math.inf:
            raise ValueError(f"low {self.low}, high {self.high}: expected 0 <= low <= high")

    def refined(self, given: RefinementRun) -> Tensor:
        """See Refinement.

        Raises:
            ValueError: without the first stage's latents.
        """
        latents, motion = given.latents.to(given.device, torch.float32), given.known_motion
        video = decode(given.pipeline, motion, "pt").to(given.device)
        edges = torch.stack([canny_edges(clip * 255, self.low, self.high) for clip in video])
        strength = latent_strength(edges, (latents.shape[2], latents.shape[3], latents.shape[4]), motion.shape[2])
        std = self.min_std + strength * (self.max_std - self.min_std)
        return super().refined(replace(given, latents=latents + std * given.noise()))


def latent_strength(edges: Tensor, size: Size3d, latent_frames: int) -> Tensor:
    """Edges at the places of latents, from 0 to 1 in each video: B x 1 x size.

    Args:
        edges: 0 or 1, B x T x H x W.
        size: latent frames, height and width.
        latent_frames: latent frames of the T frames, of which the first holds one and the others equal numbers.
    """
    pooled = F.adaptive_avg_pool2d(edges.float(), size[1:])
    parts = [pooled[:, :1].mean(1)]
    if latent_frames > 1:
        parts += [part.mean(1) for part in pooled[:, 1:].chunk(latent_frames - 1, dim=1)]
    found = torch.stack(parts, dim=1)[:, None]
    if found.shape[2] != size[0]:
        found = interpolate_latents(found, size, "nearest")
    low, high = found.amin((1, 2, 3, 4), keepdim=True), found.amax((1, 2, 3, 4), keepdim=True)
    return torch.where(high > low, (found - low) / (high - low).clamp_min(torch.finfo(found.dtype).tiny), 0.0)


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


METHODS = {"lsrna": EdgeNoiseRefinement}
