"""A small network that recognises what a clip of the mini world shows, and how it was spoilt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from luve_lightning.files import replacing
from luve_lightning.functional.pixels import described

_KEY = "luve_recogniser"
SIDE = 192
"""Clips are resized to this; patches are seen as they are."""
FRAMES = 9
"""Frames of a clip that the network sees, from the first to the last."""
LEFT_OUT = -100
"""A label of which a view says nothing; the losses leave it out."""
TAUGHT: dict[str, tuple[float, float]] = {
    "blur": (0.5, 3.0),
    "noise": (3.0, 30.0),
    "shrink": (0.0, 1.0),
    "colours": (0.0, 180.0),
    "flicker": (0.03, 0.3),
    "frozen": (0.0, 1.0),
    "shuffled": (0.0, 9.0),
}
"""Faults that the network is taught, with the amount where each begins to be seen, and the strongest."""
_APART = 4  # frames between those looked at: the network looks at every fourth, and compares neighbours
_REACH = 3  # displacements compared, in cells of 8 pixels
_GRAIN = 3  # numbers of `grain`


@dataclass(frozen=True)
class RecognisedLabels:
    """What the network tells apart, as captions say it; "" is none of these.

    Attributes:
        photographs: what a clip shows; it has one.
        motions: what its camera does; it has one.
        sprites: what is in front; it has one.
        faults: ways in which a clip is spoilt, each from 0 to 1.
    """

    photographs: tuple[str, ...]
    motions: tuple[str, ...]
    sprites: tuple[str, ...]
    faults: tuple[str, ...]

    def sizes(self) -> dict[str, int]:
        """The number of outputs of each kind."""
        return {field.name: len(getattr(self, field.name)) for field in fields(self)}


class Recogniser(nn.Module):
    """Recognises photograph, camera's motion, sprite and faults of clips, and photograph and faults of patches.

    Four convolutions reduce a frame to cells of 16 pixels. Motion is read from correlations of cells of 8 pixels with
    those of a later frame, displaced by up to 3 cells, as in FlowNet (Dosovitskiy et al. 2015), and so depends little
    on what moves. How frames change one after another, all over, shows flicker and what stands still. The features
    before the last linear layer are those of `fd_world` and `fd_patch_world`.

    Args:
        labels: what it tells apart.
        channels: channels of cells of 2, 4, 8 and 16 pixels.
        width: channels of the layers after them.
        clip_dim: features of a clip.
        patch_dim: features of a patch.
        spotted: channels that say what is in front at each place, of which the largest counts; 0 for none.
    """

    def __init__(
        self,
        labels: RecognisedLabels,
        channels: tuple[int, int, int, int] = (16, 32, 56, 80),
        width: int = 88,
        clip_dim: int = 64,
        patch_dim: int = 64,
        spotted: int = 0,
    ) -> None:
        super().__init__()
        self.labels = labels
        self.options = {"channels": list(channels), "width": width, "clip_dim": clip_dim, "patch_dim": patch_dim}
        self.options |= {"spotted": spotted}
        self.clip_dim, self.patch_dim = clip_dim, patch_dim
        first, second, third, fourth = channels
        self.fine = nn.Sequential(_block(3, first, 2), _block(first, second, 2))
        self.middle = _block(second, third, 2)
        self.coarse = nn.Sequential(_block(third, fourth, 2), _block(fourth, fourth))
        self.compared = nn.Conv2d(third, 24, 1)
        self.sharpness = nn.Parameter(torch.tensor(2.5))  # logarithm
        self.moved = _block((2 * _REACH + 1) ** 2, 40, 2)
        self.fused = nn.Sequential(_block(fourth + 40, width), _block(width, width, 2))
        self.placed = nn.Sequential(nn.Linear(9 * width, 48), nn.GELU())
        sprites = len(labels.sprites) if spotted else 0
        self.spotted = nn.Sequential(_block(fourth, spotted), nn.Conv2d(spotted, sprites, 1)) if spotted else None
        whole = _GRAIN + sprites + 2 * 48 + 2 * width + 2 * (second + third + fourth) + fourth + 3 * FRAMES - 4
        self.clip = nn.Sequential(nn.Linear(whole, clip_dim), nn.GELU())
        self.patch = nn.Sequential(nn.Linear(_GRAIN + 2 * (second + third + fourth), patch_dim), nn.GELU())
        self.clip_heads = nn.Linear(clip_dim, sum(labels.sizes().values()))
        self.patch_heads = nn.Linear(patch_dim, len(labels.photographs) + len(labels.faults))

    def clip_features(self, frames: Tensor) -> Tensor:
        """Features of clips, float32 B x `clip_dim`; see `look`."""
        return self.look(frames)[0]

    def look(self, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of clips, and which sprites were spotted.

        Args:
            frames: uint8 B x T x H x W x 3, at least `FRAMES` frames; resized to 192x192, `FRAMES` of them used.

        Returns:
            float32 B x `clip_dim`, and logits of the sprites as one place shows them, which training teaches directly;
            None without `spotted`.

        Raises:
            ValueError: another type or shape, or fewer frames.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3 or frames.shape[1] < FRAMES:
            raise ValueError(f"expected uint8 B x T x H x W x 3 of at least {FRAMES} frames, got {described(frames)}")
        clips = len(frames)
        chosen = torch.linspace(0, frames.shape[1] - 1, FRAMES, device=frames.device).round().long()
        seen = frames[:, chosen]
        pixels = _floating(seen[:, ::_APART].flatten(0, 1).permute(0, 3, 1, 2))
        if pixels.shape[-2:] != (SIDE, SIDE):
            pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        fine = self.fine(pixels)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        cells = self.compared(middle)
        # Without what all cells of a frame have in common, even untrained cells are alike only where the picture is.
        cells = F.normalize(cells - cells.mean((2, 3), keepdim=True), dim=1).unflatten(0, (clips, -1))
        alike = correlations(cells[:, :-1].flatten(0, 1), cells[:, 1:].flatten(0, 1))
        motion = self.moved((alike * self.sharpness.exp()).softmax(1))
        earlier = coarse.unflatten(0, (clips, -1))[:, :-1].flatten(0, 1)
        fused = self.fused(torch.cat([earlier, motion], 1))
        placed = self.placed(F.adaptive_avg_pool2d(fused, 3).flatten(1)).unflatten(0, (clips, -1))
        largest = fused.amax((2, 3)).unflatten(0, (clips, -1)).mean(1)
        means = [_statistics(level).unflatten(0, (clips, -1)).mean(1) for level in (fine, middle, coarse)]
        look = coarse.mean((2, 3)).unflatten(0, (clips, -1))
        whole = fused.mean((2, 3)).unflatten(0, (clips, -1)).mean(1)
        spots = None if self.spotted is None else self.spotted(coarse).amax((2, 3)).unflatten(0, (clips, -1)).mean(1)
        parts = [
            *([] if spots is None else [spots]),
            grain(pixels).unflatten(0, (clips, -1)).mean(1),
            placed.mean(1),
            _spread(placed),
            largest,
            whole,
            *means,
            _spread(look),
            changes(seen),
        ]
        features: Tensor = self.clip(torch.cat(parts, 1))
        return features, spots

    def patch_features(self, patches: Tensor) -> Tensor:
        """Features of patches, uint8 N x 3 x S x S of any size from 16, as float32 N x `patch_dim`."""
        pixels = _floating(patches)
        fine = self.fine(pixels)
        middle = self.middle(fine)
        levels = (fine, middle, self.coarse(middle))
        features: Tensor = self.patch(torch.cat([grain(pixels), *(_statistics(level) for level in levels)], 1))
        return features

    def of_clips(self, features: Tensor) -> dict[str, Tensor]:
        """Logits of each kind of label by its name in `RecognisedLabels`, B x its size, from `clip_features`."""
        sizes = self.labels.sizes()
        return dict(zip(sizes, self.clip_heads(features).split(list(sizes.values()), 1), strict=True))

    def answers(self, frames: Tensor) -> dict[str, Tensor]:
        """Logits of each kind of label, see `look`; for sprites, those of where one was spotted count as well."""
        features, spots = self.look(frames)
        found = self.of_clips(features)
        return found if spots is None else found | {"sprites": found["sprites"] + spots}

    def of_patches(self, features: Tensor) -> dict[str, Tensor]:
        """Logits of `photographs` and `faults`, from `patch_features`."""
        sizes = {"photographs": len(self.labels.photographs), "faults": len(self.labels.faults)}
        return dict(zip(sizes, self.patch_heads(features).split(list(sizes.values()), 1), strict=True))

    def save(self, path: str | Path) -> None:
        """Write float16 weights with the labels in the header; the file is complete or absent."""
        tensors = {
            name: tensor.detach().cpu().contiguous().to(torch.float16 if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in self.state_dict().items()
        }
        about = {"labels": asdict(self.labels), "options": self.options}
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(save(tensors, {_KEY: json.dumps(about, sort_keys=True)}))


def load_recogniser(path: str | Path) -> Recogniser:
    """A saved network, in float32 and evaluation mode, frozen.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is another file, or damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"recogniser {path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"recogniser {path}: cannot be read ({error})") from error
    if not isinstance(about, Mapping):
        raise ValueError(f"recogniser {path}: not a recogniser's file")
    try:
        labels = RecognisedLabels(**{name: tuple(words) for name, words in about["labels"].items()})
        network = Recogniser(labels, **about["options"])
        network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"recogniser {path}: damaged ({type(error).__name__}: {str(error)[:200]})") from error
    return network.eval().requires_grad_(False)


def correlations(first: Tensor, second: Tensor, reach: int = _REACH) -> Tensor:
    """How alike each cell and the displaced cells of another map are.

    Args:
        first: B x C x h x w, each cell of length 1.
        second: likewise.
        reach: largest displacement in cells.

    Returns:
        B x (2 reach + 1)^2 x h x w: dot products, displacements row by row; 0 outside.
    """
    height, width = first.shape[2:]
    padded = F.pad(second, (reach,) * 4)
    steps = range(2 * reach + 1)
    shifted = [padded[:, :, down : down + height, right : right + width] for down in steps for right in steps]
    return torch.stack([(first * other).sum(1) for other in shifted], 1)


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def _floating(pixels: Tensor) -> Tensor:
    return pixels.float().div(127.5).sub(1)


def changes(frames: Tensor) -> Tensor:
    """How much frames change, one after another: what shows flicker, other orders and standing still.

    Args:
        frames: uint8 B x T x H x W x 3, at least 3 frames.

    Returns:
        B x (3 T - 4): logarithms of the mean change of a cell from frame to frame (T - 1), of what is left of it after
        a steady change (T - 2), and of the change of the mean brightness (T - 1); each over 1 of 255.
    """
    height, width = frames.shape[2:4]
    grey = frames.float().mean(-1)
    cells = F.interpolate(grey, (24, 24), mode="area") if min(height, width) >= 24 else grey
    first = cells[:, 1:] - cells[:, :-1]
    second = first[:, 1:] - first[:, :-1]
    found = [first.abs().mean((2, 3)), second.abs().mean((2, 3)), first.mean((2, 3)).abs()]
    return torch.log1p(torch.cat(found, 1))


def grain(pixels: Tensor) -> Tensor:
    """How rough pictures are, for noise and blur: Immerkaer's (1996) estimate of noise, of parts of 8 x 8 pixels.

    Args:
        pixels: N x 3 x H x W in [-1, 1], sides of 16 and more.

    Returns:
        N x 3: logarithms of the estimate, over 1 of 255: of the smoothest tenth of the parts, the median and the mean.
    """
    kernel = pixels.new_tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]])
    rough = F.conv2d(pixels.mean(1, keepdim=True), kernel[None, None]).abs().float()
    parts = F.avg_pool2d(rough, 8).flatten(1) * (127.5 * (torch.pi / 2) ** 0.5 / 6)
    tenth, median = parts.quantile(pixels.new_tensor([0.1, 0.5]), 1)
    return torch.log1p(torch.stack([tenth, median, parts.mean(1)], 1))


def _statistics(level: Tensor) -> Tensor:
    """Mean and spread of each channel, N x 2 C."""
    cells = level.flatten(2)
    return torch.cat([cells.mean(2), _spread(cells, 2)], 1)


def _spread(values: Tensor, dim: int = 1) -> Tensor:
    return (values.var(dim, correction=0) + 1e-6).sqrt()  # differentiable where all are equal
