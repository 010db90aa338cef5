"""DOVER, the video quality measure of LuVe's Table 3 (arXiv 2602.11564)."""

from __future__ import annotations

from torch import Tensor, nn

from luve_lightning.metrics.base import Unavailable, VideoMetric, frozen


class Dover(VideoMetric):
    """DOVER's fused score (Wu et al. 2023, arXiv 2211.04894), 0 to 1, from a given network.

    pyiqa, which has the other measures, has no DOVER (0.1.16), and PyPI's project `dover` is something else. The
    network comes from its authors' repository, wrapped into a module that makes DOVER's two views and fuses them.
    The technical view is 7 x 7 random pieces of 32x32 pixels from three runs of 32 frames, the aesthetic view 32
    frames shrunk to 224x224: even in 4K it sees 224x224 pixels per frame.

    Args:
        backbone: takes uint8 T x H x W x 3, returns the fused score, one number.
    """

    name = "dover"
    resolution = "7 x 7 pieces of 32x32 at native resolution, and the frame shrunk to 224x224"

    def __init__(self, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = None if backbone is None else frozen(backbone)

    def load(self) -> None:
        """Nothing to load: the network is given or missing."""
        if self.backbone is None:
            raise Unavailable(
                "dover needs a network: pyiqa has none; install github.com/VQAssessment/DOVER with its DOVER.pth "
                "(about 230 MB) and give a module that scores frames with it as `backbone`"
            )

    def measure(self, frames: Tensor, reference: Tensor | None) -> Tensor:
        """The video's fused score."""
        assert self.backbone is not None
        score: Tensor = self.backbone(frames.to(self.device))
        if score.numel() != 1:
            raise ValueError(f"dover: backbone must give one number, got shape {tuple(score.shape)}")
        return score.reshape(())
