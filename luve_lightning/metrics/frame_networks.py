"""Metrics that show frames, tiles of frames or whole clips to one network, and networks that give features."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luve_lightning.files import file_digest
from luve_lightning.functional.patches import PatchPlan, cut_patches
from luve_lightning.functional.pixels import frames_to_video
from luve_lightning.metrics.base import Unavailable, VideoMetric, frozen
from luve_lightning.metrics.feature_moments import FeatureExtractor, LoadedFeatures
from luve_lightning.metrics.pretrained import WeightFile
from luve_lightning.models.recogniser import FRAMES, SIDE, Recogniser, load_recogniser

if TYPE_CHECKING:
    from luve_lightning.models.backbones import LatentSpace

# Distances between the mini backbone's features are some ten-thousandths; with a hundred times the features,
# tables show 1 to 50. The order stays.
_VAE_SCALE = 100.0


class FrameNetworkMetric(VideoMetric):
    """A metric computed from one network's output for each frame.

    A subclass defines `build` (the network, unless one is given), `view` (its input) and `measure`.

    Args:
        backbone: replaces the published network; set to evaluation mode, without gradients.
        batch_size: images per forward pass.
    """

    backbone: nn.Module | None

    def __init__(self, backbone: nn.Module | None = None, batch_size: int = 32, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if batch_size < 1:
            raise ValueError(f"{type(self).__name__}.batch_size: expected at least 1, got {batch_size}")
        self.backbone = None if backbone is None else frozen(backbone)
        self.batch_size = batch_size

    def build(self) -> nn.Module:
        """Load the published network from a local file.

        Raises:
            Unavailable: it is not there.
        """
        raise NotImplementedError

    def load(self) -> None:
        """Load the network onto the metric's device."""
        if self.backbone is None:
            self.backbone = frozen(self.build()).to(self.device)

    def images_per_frame(self, height: int, width: int) -> int:
        """How many images `view` makes of a frame of this size."""
        return 1

    def view(self, frames: Tensor) -> Tensor:
        """The network's input for uint8 T x H x W x 3: float32 N x 3 x h x w, N = T * images_per_frame."""
        raise NotImplementedError

    def batches(self, frames: Tensor) -> Iterator[Tensor]:
        """A video's views on the metric's device, at most `batch_size` images at a time, frame by frame."""
        frames_at_once = max(1, self.batch_size // self.images_per_frame(*frames.shape[1:3]))
        for part in frames.split(frames_at_once):
            yield from self.view(part.to(self.device)).split(self.batch_size)

    def outputs(self, frames: Tensor) -> Tensor:
        """The network's output for each image, float32, T * images_per_frame x ... ."""
        assert self.backbone is not None
        # pyiqa's NIQE returns a bare number for one image.
        return torch.cat([torch.atleast_1d(self.backbone(images).float()) for images in self.batches(frames)])


class Tiled(FrameNetworkMetric):
    """The same metric on tiles of the full-size frame instead of the shrunken frame.

    As many tiles as fit side by side, spread evenly from edge to edge: 9 x 17 of 224 pixels at 3840x2160. List it
    before the metric among the bases.
    """

    tile: ClassVar[int]

    def images_per_frame(self, height: int, width: int) -> int:
        """Tiles of a frame."""
        return self._corners(height, width).shape[0]

    def tiles(self, frames: Tensor) -> Tensor:
        """Cut tiles.

        Args:
            frames: uint8 T x H x W x 3.

        Returns:
            float32 N x 3 x tile x tile in [0, 1], all tiles of the first frame first.
        """
        corners = self._corners(*frames.shape[1:3]).to(frames.device)
        time = torch.arange(len(frames), device=frames.device).repeat_interleave(len(corners))
        places = torch.cat([time[:, None], corners.repeat(len(frames), 1)], dim=1)
        return cut_patches(frames, places, self.tile).float() / 255

    def _corners(self, height: int, width: int) -> Tensor:
        if min(height, width) < self.tile:
            raise ValueError(f"{self.name}: frames are {height}x{width}, smaller than a tile of {self.tile}")
        return PatchPlan(size=self.tile).positions(height, width)[0]


class TiledSample(Tiled):
    """Tiles of some frames of a video, chosen by `plan`; their order in time does not matter."""

    plan: PatchPlan

    def outputs(self, frames: Tensor) -> Tensor:
        """The network's output for each tile of those frames."""
        return super().outputs(frames[list(self.plan.frame_indices(len(frames)))])


INCEPTION = WeightFile(
    name="clean-fid's TorchScript Inception",
    file_name="inception-2015-12-05.pt",
    size_bytes=95_607_719,
    url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    purpose="fid_patch",
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    caches=("/tmp",),  # clean-fid's own place
)
_SIZE = 299


def resize_clean(patches: Tensor, size: int = _SIZE) -> Tensor:
    """clean-fid's "clean" resize: bicubic with an antialiasing filter on floats, not rounded, clamped to the range.

    Within 0.02 of 255 levels of Pillow's: PyTorch computes the filter's positions in float32.

    Args:
        patches: N x C x S x S with values in [0, 255], uint8 or floating point.
        size: output height and width, at least 2 (PyTorch 2.12's filter is wrong on a CPU for outputs one column
            wide).

    Returns:
        float32 N x C x size x size in [0, 255].
    """
    pixels = patches.to(torch.float32, memory_format=torch.contiguous_format)
    return F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).clamp_(0, 255)


class InceptionFeatures(FeatureExtractor):
    """The 2048 features of FID (Heusel et al. 2017), computed as clean-fid (Parmar et al. 2022) computes them.

    The network is the TorchScript translation of the 2015 TensorFlow model that clean-fid loads. It is never
    downloaded; `WeightFile.find` says where it is looked for.

    Args:
        weights: the file, or its folder; None for the usual places.
    """

    kind = "inception"
    name = "inception-clean"
    dim = 2048
    resolution = f"{_SIZE}x{_SIZE}"
    file: ClassVar[WeightFile] = INCEPTION

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        self.weights = weights
        self.network: nn.Module | None = None

    def prepare(self, device: torch.device | str) -> None:
        """Load the network onto a device.

        Raises:
            Unavailable: its file is missing, or is not the published one.
        """
        if self.network is None:
            # Checked to the byte: whoever reads "fid_patch" in a table expects this network.
            path = self.file.find_exactly(self.weights)
            network = torch.jit.load(str(path), map_location="cpu").layers.eval()
            for parameter in network.parameters():  # a TorchScript module has no requires_grad_
                parameter.requires_grad = False
            self.network = network
        self.to(device)

    def forward(self, patches: Tensor) -> Tensor:
        """uint8 N x 3 x S x S to float32 N x 2048."""
        if self.network is None:
            raise RuntimeError("InceptionFeatures: call prepare(device) before it is used")
        pixels = resize_clean(patches)
        return self.network((pixels - 128) / 128).flatten(1)

    def __getstate__(self) -> dict[str, Any]:
        # TorchScript does not pickle: a copy in another process loads the network itself.
        modules = {name: module for name, module in self._modules.items() if name != "network"}
        return {**self.__dict__, "_modules": modules, "network": None}


class RecogniserPatches(LoadedFeatures[Recogniser]):
    """What the mini world's recogniser sees in a patch: which photograph, and how it is spoilt.

    Its numbers have nothing to do with FID's. `tests/metrics/test_frechet_patch_faults.py` tries what they rank.

    Args:
        weights: the file that training wrote, see `luve_lightning.models.recogniser`.
    """

    kind, family = "world", "recogniser"
    resolution = "its own size"

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        self.weights = Path(weights)

    def load(self) -> tuple[Recogniser, str]:
        """The network, and its file's SHA-256.

        Raises:
            Unavailable: its file is missing.
        """
        return _recogniser(self.weights), file_digest(self.weights)

    @property
    def dim(self) -> int:
        """Length of a feature vector; known after `prepare`."""
        return self.network.patch_dim

    def forward(self, patches: Tensor) -> Tensor:
        """uint8 N x 3 x S x S to float32 N x D."""
        return self.network.patch_features(patches)


class RecogniserClips(RecogniserPatches):
    """What the mini world's recogniser sees in a clip: photograph, motion, sprite and faults, those in time too.

    Args:
        weights: see `RecogniserPatches`.
    """

    resolution = f"{FRAMES} frames of {SIDE}x{SIDE}"
    least_frames = FRAMES

    @property
    def dim(self) -> int:
        """Length of a feature vector; known after `prepare`."""
        return self.network.clip_dim

    def forward(self, patches: Tensor) -> Tensor:
        """uint8 B x T x H x W x 3, whole clips, to float32 B x D."""
        return self.network.clip_features(patches)


def _recogniser(weights: Path) -> Recogniser:
    try:
        return load_recogniser(weights)
    except FileNotFoundError as error:
        raise Unavailable(f"{error}; luve fit --config experiments/mini/recogniser.yaml makes it") from error


class Recognised(VideoMetric):
    """The share of videos in which the mini world's recogniser sees what their prompts ask for.

    A subclass says which sentence of the prompt. Of all answers that the network knows, "none of these" among them,
    the likeliest counts. Chance is one in about ten.

    Args:
        weights: see `RecogniserPatches`.
    """

    prompted = True
    resolution = RecogniserClips.resolution
    least_frames = FRAMES
    asked: ClassVar[str]  # a name in `RecognisedLabels`

    def __init__(self, weights: str | Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weights = Path(weights)
        self.network: Recogniser | None = None

    def load(self) -> None:
        """Load the network onto the metric's device."""
        if self.network is None:
            self.network = _recogniser(self.weights).to(self.device)

    def measure_prompted(self, frames: Tensor, prompt: str) -> float:
        """1 where the likeliest answer is in the prompt, otherwise 0."""
        assert self.network is not None
        answers = getattr(self.network.labels, self.asked)
        sentences = {sentence.strip() for sentence in prompt.split(" .")}
        wanted = [number for number, answer in enumerate(answers) if answer and answer in sentences]
        if len(wanted) != 1:
            raise ValueError(
                f"{self.name}: the prompt must have one of the sentences that the recogniser knows, such as "
                f"{answers[1]!r}, got {prompt[:100]!r}"
            )
        logits = self.network.answers(frames[None].to(self.device))
        return float(logits[self.asked].argmax(1).item() == wanted[0])


class PhotographRecognised(Recognised):
    """The share of videos that show the prompt's photograph, see `Recognised`."""

    name = "photograph_recognised"
    asked = "photographs"


class MotionRecognised(Recognised):
    """The share of videos whose camera moves as the prompt says, see `Recognised`."""

    name = "motion_recognised"
    asked = "motions"


class SpriteRecognised(Recognised):
    """The share of videos with the prompt's sprite in front, see `Recognised`."""

    name = "sprite_recognised"
    asked = "sprites"


class VAEFeatures(LoadedFeatures["LatentSpace"]):
    """The VAE encoder's view of a patch, before it is squeezed into latents.

    `LatentSpace.features` averaged over space, times 100; each patch is a clip of one frame, at its own
    resolution. The network was not trained to recognise things: distances say how far apart the statistics of
    textures and edges are, and have nothing to do with FID's numbers.

    Args:
        backbone: a diffusers pipeline folder or a hub id.
    """

    kind, family = "vae", "vae"
    resolution = "its own size"

    def __init__(self, backbone: str | Path) -> None:
        super().__init__()
        self.backbone = backbone

    def load(self) -> tuple[LatentSpace, str]:
        """The VAE without its decoder, and its fingerprint.

        Raises:
            FileNotFoundError: there is no such backbone.
        """
        from luve_lightning.models.backbones import load_backbone  # with all of a family's models

        codec = load_backbone(self.backbone).latent_space()
        fingerprint = codec.fingerprint()
        codec.forget_decoder()  # unused here
        return codec, fingerprint

    @property
    def dim(self) -> int:
        """Channels of `LatentSpace.features`; known after `prepare`."""
        return self.network.feature_channels

    def forward(self, patches: Tensor) -> Tensor:
        """uint8 N x 3 x S x S, S a multiple of the VAE's spatial ratio, to float32 N x D."""
        codec, size = self.network, patches.shape[-1]
        if size % codec.spatial_ratio:
            raise ValueError(
                f"patches of {size} (patches.size) for a VAE: expected a multiple of {codec.spatial_ratio}"
            )
        clips = frames_to_video(patches[:, None].movedim(2, -1))  # N x 3 x 1 x S x S
        return codec.features(clips).float().mean((2, 3, 4)) * _VAE_SCALE
