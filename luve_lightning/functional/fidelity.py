"""How close a video is to another: PSNR, SSIM and the frame-difference error, one value per clip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# SSIM keeps a dozen maps of its input. Processing a few frames at a time bounds them for 4K clips.
_SSIM_VALUES = 2**22


def _check_pair(video: Tensor, target: Tensor) -> None:
    if video.shape != target.shape or video.ndim != 5:
        raise ValueError(
            f"expected two B x C x T x H x W videos of one shape, got {tuple(video.shape)} and {tuple(target.shape)}"
        )


def psnr(video: Tensor, target: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio over all pixels of a clip: 10 log10(range^2 / MSE).

    Args:
        video: B x C x T x H x W.
        target: the same shape.
        data_range: difference between the largest and the smallest possible value; 2 for pixels in [-1, 1].

    Returns:
        dB, shape (B,); infinite for identical clips.

    Example:
        >>> psnr(torch.zeros(1, 3, 2, 4, 4), torch.full((1, 3, 2, 4, 4), 0.2))
        tensor([20.])
    """
    _check_pair(video, target)
    mse = (video.float() - target.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / mse)


def ssim(
    video: Tensor, target: Tensor, black: float = -1.0, white: float = 1.0, window: int = 11, sigma: float = 1.5
) -> Tensor:
    """Structural similarity (Wang et al. 2004), per frame and channel with a Gaussian window, averaged over a clip.

    SSIM compares local means by their ratio, so it is defined for pixels whose black is 0; pixels are shifted to
    that.

    Args:
        video: B x C x T x H x W; H and W at least `window`.
        target: the same shape.
        black: the smallest possible value.
        white: the largest possible value.
        window: number of taps of the Gaussian, odd.
        sigma: standard deviation of the Gaussian in pixels.

    Returns:
        shape (B,), at most 1.
    """
    _check_pair(video, target)
    if min(video.shape[-2:]) < window:
        raise ValueError(f"frames of {tuple(video.shape[-2:])} are smaller than the {window}-tap SSIM window")
    channels, frames = video.shape[1:3]
    frames_at_once = max(1, _SSIM_VALUES // video[:, :, :1].numel())
    total = torch.zeros(video.shape[0], device=video.device)
    for x, y in zip(video.split(frames_at_once, dim=2), target.split(frames_at_once, dim=2), strict=True):
        x, y = (part.float().flatten(1, 2) - black for part in (x, y))
        score = _ssim_map(x, y, white - black, window, sigma)
        total = total + score.flatten(2).mean(2).sum(1)
    return total / (channels * frames)


def _ssim_map(x: Tensor, y: Tensor, data_range: float, window: int, sigma: float) -> Tensor:
    """SSIM of every window position; B x N x H x W images to B x N x H-window+1 x W-window+1."""
    # Every image is a group of its own. On a CPU this is many times faster than one channel and a large batch; on
    # a GPU it avoids TF32, which the differences of squares below do not survive.
    images = x.shape[1]
    taps = torch.arange(window, dtype=torch.float32, device=x.device) - (window - 1) / 2
    g = torch.exp(-0.5 * (taps / sigma) ** 2)
    g = (g / g.sum()).expand(images, 1, 1, window)

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(z, g, groups=images), g.transpose(2, 3), groups=images)

    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))


def frame_difference_error(video: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference between the two clips' frame-to-frame changes (the measure behind the paper's L_frame).

    Args:
        video: B x C x T x H x W.
        target: the same shape.

    Returns:
        shape (B,), in the units of the pixels; 0 for clips of one frame.
    """
    _check_pair(video, target)
    if video.shape[2] < 2:
        return video.new_zeros(video.shape[0], dtype=torch.float32)
    change = video.float().diff(dim=2) - target.float().diff(dim=2)
    return change.abs().flatten(1).mean(1)


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
