"""Image quality without a reference: MUSIQ, MANIQA and NIQE (Table 3 of arXiv 2602.11564; pyiqa's), and DOVER."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from luve_lightning.functional.patches import PatchPlan
from luve_lightning.functional.pixels import longer_side_view, unit_images
from luve_lightning.metrics.base import Unavailable, VideoMetric, frozen
from luve_lightning.metrics.frame_networks import TiledSample
from luve_lightning.metrics.pretrained import WeightFile, weights_folder

_URL = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights"
_CACHES = ("${TORCH_HOME}/hub/pyiqa", "~/.cache/torch/hub/pyiqa")

MUSIQ_SPAQ = WeightFile(
    name="MUSIQ trained on SPAQ",
    file_name="musiq_spaq_ckpt-358bb6af.pth",
    size_bytes=108_600_000,
    url=_URL,
    purpose="imaging quality",
    caches=(*_CACHES, "~/.cache/vbench/pyiqa_model"),
)
MUSIQ_KONIQ = WeightFile(
    name="MUSIQ trained on KonIQ-10k",
    file_name="musiq_koniq_ckpt-e95806b9.pth",
    size_bytes=108_600_000,
    url=_URL,
    purpose="MUSIQ",
    caches=_CACHES,
)
MANIQA_KONIQ = WeightFile(
    name="MANIQA trained on KonIQ-10k",
    file_name="ckpt_koniq10k.pt",
    size_bytes=543_000_000,
    url=_URL,
    purpose="MANIQA",
    caches=_CACHES,
)
NIQE_PARAMETERS = WeightFile(
    name="the statistics of NIQE's pristine images",
    file_name="niqe_modelparameters.mat",
    size_bytes=8_150,
    url=_URL,
    purpose="NIQE",
    caches=_CACHES,
)


def load_pyiqa(measure: str, file: WeightFile, given: str | Path | None, purpose: str) -> nn.Module:
    """A pyiqa network: N x 3 x h x w in [0, 1] to N x 1 scores.

    Args:
        measure: pyiqa's name for it.
        file: its weights.
        given: where the weights are, or None to look in the usual places.
        purpose: name of the metric, for the message.

    Raises:
        Unavailable: pyiqa or the file is missing, or they do not fit each other.
    """
    try:
        import pyiqa
    except ImportError as error:
        raise Unavailable(
            f"{purpose} needs pyiqa (pip install 'luve-lightning[iqa]': {error}) and {file.file_name} "
            f"({file.readable_size}, {file.url}) in {weights_folder()}"
        ) from error
    path = str(file.find(given))
    try:
        if measure.startswith("niqe"):
            network: nn.Module = pyiqa.create_metric(measure, device="cpu", pretrained_model_path=path)
            return network
        with _no_download():
            network = pyiqa.create_metric(measure, device="cpu", pretrained=False)
        network.load_weights(path, weight_keys=None)  # type: ignore[operator]
    except Exception as error:  # a broken file may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Unavailable(f"{purpose}: pyiqa cannot load {path} as {file.name} ({_URL}): {reason}") from error
    return network


@contextmanager
def _no_download() -> Iterator[None]:
    """Keeps MANIQA from fetching the ViT that its own weight file replaces (346 MB)."""
    from pyiqa.archs.maniqa_arch import timm

    create = timm.create_model

    def without_weights(*args: Any, pretrained: bool = False, **kwargs: Any) -> Any:
        return create(*args, pretrained=False, **kwargs)

    timm.create_model = without_weights
    try:
        yield
    finally:
        timm.create_model = create


class _ImageQuality(TiledSample):
    """An image measure, averaged over some frames and their tiles.

    With `resized` it sees frames as VBench's imaging quality does, at most 512 pixels on the longer side, and is
    named `..._resized`; otherwise it sees their pixels unchanged.

    Args:
        resized: use VBench's view instead of native resolution.
        backbone: replaces pyiqa's; takes N x 3 x h x w in [0, 1], returns N or N x 1 scores.
        weights: the measure's file or its folder; None to look in the usual places.
        frames: frames per video, the middles of equal parts.
        batch_size: images per forward pass of the network.
    """

    tile = 512
    native: ClassVar[str] = "native, tiles of 512x512"
    measures: ClassVar[str]
    file: ClassVar[WeightFile]

    def __init__(
        self,
        resized: bool = False,
        backbone: nn.Module | None = None,
        weights: str | Path | None = None,
        frames: int = 8,
        batch_size: int = 16,
    ) -> None:
        super().__init__(backbone, batch_size)
        self.name = f"{self.measures}_resized" if resized else self.measures
        self.resolution = "512 on the longer side, without antialiasing" if resized else self.native
        self.resized = resized
        self.weights = weights
        self.plan = PatchPlan(size=self.tile, frames=frames)

    def build(self) -> nn.Module:
        """The network from pyiqa."""
        return load_pyiqa(self.measures, self.file, self.weights, self.name)

    def images_per_frame(self, height: int, width: int) -> int:
        """Tiles of a frame, or 1."""
        return 1 if self.resized else super().images_per_frame(height, width)

    def view(self, frames: Tensor) -> Tensor:
        """VBench's view, or tiles."""
        return longer_side_view(frames) if self.resized else self.tiles(frames)

    def measure(self, frames: Tensor, reference: Tensor | None) -> Tensor:
        """The video's mean score."""
        return self.outputs(frames).double().mean()


class Musiq(_ImageQuality):
    """MUSIQ trained on KonIQ-10k, 0 to 100, higher is better."""

    measures = "musiq"
    file = MUSIQ_KONIQ


class Maniqa(_ImageQuality):
    """MANIQA trained on KonIQ-10k, 0 to 1, higher is better.

    pyiqa takes crops of 224x224 from each image, so tiles only give it more of them.
    """

    measures = "maniqa"
    file = MANIQA_KONIQ


class Niqe(_ImageQuality):
    """NIQE (Mittal et al. 2013): distance to the statistics of pristine photographs, lower is better.

    Compares the statistics of a frame's blocks of 96x96 pixels: whole frames at native resolution, no tiles.
    """

    measures = "niqe"
    file = NIQE_PARAMETERS
    higher_is_better = False
    native = "native, whole frames"

    def batches(self, frames: Tensor) -> Iterator[Tensor]:
        """One frame at a time: the network keeps many maps of it, and a 4K frame alone takes 100 MB."""
        for frame in frames.split(1):
            yield self.view(frame.to(self.device))

    def view(self, frames: Tensor) -> Tensor:
        """VBench's view, or whole frames."""
        return super().view(frames) if self.resized else unit_images(frames)


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
