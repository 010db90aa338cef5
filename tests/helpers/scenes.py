"""Small videos of real photographs, made so that what they repeat, keep or lack is known."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor

from luve_lightning.functional.pixels import frames_to_video, resize_video, video_to_frames


def photograph(name: str, side: int = 192, frames: int = 1) -> Tensor:
    """The upper left square of one of scikit-image's photographs, still, uint8 T x side x side x 3."""
    picture = torch.from_numpy(getattr(data, name)().copy())
    if picture.ndim == 2:
        picture = picture[..., None].expand(-1, -1, 3)
    shorter = min(picture.shape[:2])
    return resized(picture[None, :shorter, :shorter], side).expand(frames, -1, -1, -1)


def resized(frames: Tensor, side: int) -> Tensor:
    """Square frames at another size, antialiased."""
    return video_to_frames(resize_video(frames_to_video(frames)[None], (side, side)))[0]


def enlarged(frames: Tensor, side: int, mode: str = "bicubic") -> Tensor:
    """Square frames enlarged by one of torch's filters."""
    video = frames_to_video(frames).movedim(1, 0)
    larger = F.interpolate(video, size=(side, side), mode=mode, align_corners=False).clamp(-1, 1)
    return video_to_frames(larger.movedim(0, 1))


def noisy(frames: Tensor, deviation: float, frozen: bool = False, seed: int = 0) -> Tensor:
    """Frames with grey noise in levels of 255, new in each frame, or the same in all."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1 if frozen else len(frames), *frames.shape[1:3], 1, generator=generator)
    return (frames + deviation * noise).round().clamp(0, 255).to(torch.uint8)


def panned(name: str, move: tuple[float, float], frames: int = 5, side: int = 128) -> Tensor:
    """A camera that moves over a photograph by so many pixels right and down per frame, uint8 T x side x side x 3."""
    picture = frames_to_video(photograph(name, side=side + 64))[:, 0]
    whole = picture.shape[-1]
    seen = []
    for frame in range(frames):
        x, y = (2 * (torch.arange(float(side)) + 16 + step * frame + 0.5) / whole - 1 for step in move)
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
        seen.append(F.grid_sample(picture[None], grid[None], mode="bicubic", align_corners=False)[0])
    return video_to_frames(torch.stack(seen, 1))
