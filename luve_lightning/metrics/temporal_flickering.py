"""VBench's temporal flickering: how little each frame differs from the next."""

from __future__ import annotations

import torch
from torch import Tensor

from luve_lightning.metrics.base import VideoMetric

# Pairs of frames at a time: what fits into a cache is several times faster than a whole clip.
_CHUNK_VALUES = 2**23


class TemporalFlickering(VideoMetric):
    """VBench's TF (arXiv 2311.17982): (255 - mean |frame(t+1) - frame(t)|) / 255, over pixels, channels and frames.

    1 for a still video. It needs no network and rewards stillness: VBench means it for static scenes, which it
    filters for; LuVe's Table 1 (arXiv 2602.11564) gives it for all videos. The mean over videos is VBench's.

    Equal to VBench's number on the same decoded frames to 1e-7. VBench decodes with OpenCV. From 4.13, its pixels
    are those of our readers, bit for bit, for 8-bit files; up to 4.12 it ignored the file's colour matrix and
    assumed BT.601, which moves the number of a BT.709 file by about 1e-3. Beyond 8 bits, FFmpeg's conversions to
    BGR (OpenCV) and RGB (the readers) dither differently, which also moves it by about 1e-3.
    """

    name = "temporal_flickering"
    resolution = "native"
    least_frames = 2

    def measure(self, frames: Tensor, reference: Tensor | None) -> float:
        """The video's TF in [0, 1]."""
        frames = frames.to(self.device)
        at_once = max(1, _CHUNK_VALUES // frames[0].numel())
        pairs = zip(frames[:-1].split(at_once), frames[1:].split(at_once), strict=True)
        total = sum(int(_row_sums(earlier, later).sum(dtype=torch.int64)) for earlier, later in pairs)
        return 1 - total / (255 * frames[1:].numel())


def _row_sums(earlier: Tensor, later: Tensor) -> Tensor:
    """Sum of |later - earlier| over each row of pixels, exact: float32 counts to 2^24, a row of 16K reaches 2^23.6."""
    distance = torch.maximum(earlier, later).sub_(torch.minimum(earlier, later))
    return distance.flatten(2).float().sum(2).to(torch.int64)
