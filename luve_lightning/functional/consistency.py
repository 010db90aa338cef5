"""How much each frame resembles the first frame and the previous one, by their features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def frame_consistency(features: Tensor) -> Tensor:
    """Mean cosine similarity of each frame with the first and the previous one, as in VBench (arXiv 2311.17982).

    The mean over frames 1 .. T-1 of (max(0, cos(f_t, f_(t-1))) + max(0, cos(f_t, f_0))) / 2. VBench clamps each
    similarity by itself, before any mean.

    Args:
        features: ... x T x D, one vector per frame, T at least 2; any length, they are normalised.

    Returns:
        float64 in [0, 1], shape (...).

    Raises:
        ValueError: fewer than two frames.
    """
    if features.ndim < 2 or features.shape[-2] < 2:
        raise ValueError(f"features must be ... x T x D with T at least 2, got shape {tuple(features.shape)}")
    unit = F.normalize(features.double(), dim=-1)
    later = unit[..., 1:, :]
    previous = (later * unit[..., :-1, :]).sum(-1)
    first = (later * unit[..., :1, :]).sum(-1)
    return (previous.clamp(0, 1) + first.clamp(0, 1)).mean(-1) / 2
