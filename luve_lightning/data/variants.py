"""Variants of a clip: transforms of its pixels before they are encoded."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luve_lightning.functional.pixels import resize_video
from luve_lightning.functional.unsharp import check_unsharp, unsharp_mask


class PixelTransform(nn.Module):
    """What a variant does to high-resolution pixels before they are downscaled and encoded.

    `forward` takes and returns B x C x T x H x W in [-1, 1].
    """

    def label(self) -> str:
        """Every parameter that decides the result, in words: part of the store's key. Empty for none."""
        raise NotImplementedError(f"{type(self).__name__} must say what its results depend on")

    def forward(self, video: Tensor) -> Tensor:
        """Transform a batch of videos."""
        raise NotImplementedError(f"{type(self).__name__} transforms nothing")


class Unchanged(PixelTransform):
    """The unchanged pixels: the variant "plain"."""

    def label(self) -> str:
        """Empty."""
        return ""

    def forward(self, video: Tensor) -> Tensor:
        """The same tensor."""
        return video


class InTurn(PixelTransform):
    """Several transforms, one after the other.

    Args:
        transforms: transforms in order, at least one.
    """

    def __init__(self, transforms: list[PixelTransform]) -> None:
        super().__init__()
        if not transforms:
            raise ValueError("transforms: expected at least one")
        self.transforms = nn.ModuleList(transforms)

    def label(self) -> str:
        """The labels in order."""
        return ", then ".join(step.label() for step in self.transforms if step.label())  # type: ignore[operator]

    def forward(self, video: Tensor) -> Tensor:
        """B x C x T x H x W through each."""
        for step in self.transforms:
            video = step(video)
        return video


def variant_name(name: str, transform: PixelTransform) -> str:
    """`LatentKey.variant` of a named transform, such as "sharpened (radius 2, amount 0.5)"."""
    label = transform.label()
    return f"{name} ({label})" if label else name


class Sharpened(PixelTransform):
    """Unsharp masking of the high-resolution pixels before they are encoded (LuVe, arXiv 2602.11564).

    The paper gives neither number. The defaults are scikit-image's, a mild mask: a radius of one pixel affects the
    highest frequencies, which are the HFE's task, and draws no halos around edges.

    Args:
        radius: sigma of the Gaussian in pixels of the high-resolution clip, > 0.
        amount: share of the detail above it to add.
    """

    def __init__(self, radius: float = 1.0, amount: float = 1.0) -> None:
        super().__init__()
        check_unsharp(radius, amount)
        self.radius, self.amount = float(radius), float(amount)

    def label(self) -> str:
        """Both numbers, with every digit."""
        return f"radius {self.radius!r}, amount {self.amount!r}"

    def forward(self, video: Tensor) -> Tensor:
        """B x C x T x H x W in [-1, 1] to the same."""
        return unsharp_mask(video, self.radius, self.amount)


class Symmetry(PixelTransform):
    """Mirrors, transposes, reverses time, inverts or permutes colours.

    A VAE is not equivariant to any of these, so they cannot be applied to latents; each is a variant of its own.

    Args:
        mirror: swap left and right.
        transpose: swap rows and columns; frames must be square.
        reverse: last frame first.
        negative: invert brightness.
        colors: where each channel goes, a permutation of "rgb".
    """

    def __init__(
        self,
        mirror: bool = False,
        transpose: bool = False,
        reverse: bool = False,
        negative: bool = False,
        colors: str = "rgb",
    ) -> None:
        super().__init__()
        if sorted(colors) != sorted("rgb"):
            raise ValueError(f"colors: expected a permutation of rgb, got {colors!r}")
        self.mirror, self.transpose, self.reverse, self.negative = mirror, transpose, reverse, negative
        self.colors = colors

    def label(self) -> str:
        """What is done, in order."""
        flags = ("mirror", "transpose", "reverse", "negative")
        return " ".join([name for name in flags if getattr(self, name)] + [self.colors])

    def forward(self, video: Tensor) -> Tensor:
        """B x 3 x T x H x W to the same shape."""
        if self.mirror:
            video = video.flip(4)
        if self.transpose:
            if video.shape[3] != video.shape[4]:
                raise ValueError(f"transpose needs square frames, got {video.shape[3]}x{video.shape[4]}")
            video = video.transpose(3, 4)
        if self.reverse:
            video = video.flip(2)
        if self.negative:
            video = -video
        return video[:, ["rgb".index(c) for c in self.colors]].contiguous()


# Cells of the random field whose level set outlines a piece.
_FIELD = 7


class Collage(PixelTransform):
    """Pieces of the clip, each turned, zoomed, recoloured and cut out along a random outline, laid over one another.

    What an upsampler must learn is local: edges and textures of every direction, scale and contrast. A few
    photographs show few of them; their pieces, rearranged, show more. Motion stays within each piece. The pieces
    follow from the seed and the clip's own pixels, so a clip always gives the same collage.

    Args:
        seed: each seed gives another collage.
        pieces: number of pieces over the first, which fills the frame; at least 0.
        zoom: least and greatest factor by which a piece is enlarged, > 0.
    """

    def __init__(self, seed: int = 0, pieces: int = 4, zoom: tuple[float, float] = (0.5, 1.5)) -> None:
        super().__init__()
        if seed < 0 or pieces < 0:
            raise ValueError(f"expected seed >= 0 and pieces >= 0, got {seed} and {pieces}")
        if not 0 < zoom[0] <= zoom[1]:
            raise ValueError(f"zoom: expected 0 < least <= greatest, got {list(zoom)}")
        self.seed, self.pieces, self.zoom = seed, pieces, (float(zoom[0]), float(zoom[1]))

    def label(self) -> str:
        """All parameters."""
        return f"seed {self.seed}, {self.pieces} pieces, zoom {self.zoom[0]!r} to {self.zoom[1]!r}"

    def forward(self, video: Tensor) -> Tensor:
        """B x 3 x T x H x W in [-1, 1] to the same; each clip by its own random numbers."""
        return torch.cat([self._collage(clip) for clip in video.split(1)])

    def _collage(self, clip: Tensor) -> Tensor:
        pixels = clip.add(1).mul(127.5).round().to(torch.uint8).cpu().numpy()
        rng = np.random.default_rng([self.seed, zlib.crc32(pixels.tobytes())])
        frame = self._piece(clip, rng)
        for _ in range(self.pieces):
            mask = _outline(rng, clip)
            frame = torch.lerp(frame, self._piece(clip, rng), mask)
        return frame.clamp(-1, 1)

    def _piece(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        """The clip turned about a random point, zoomed and recoloured, mirrored where it ends."""
        height, width = clip.shape[3:]
        zoom = math.exp(rng.uniform(math.log(self.zoom[0]), math.log(self.zoom[1])))
        angle, flip = rng.uniform(0, 2 * math.pi), rng.choice([-1.0, 1.0])
        center = rng.uniform(-0.5, 0.5, size=2)
        if zoom < 1:  # reduced with antialiasing; sampling alone would fold fine detail into coarse
            clip = resize_video(clip, (max(2, round(height * zoom)), max(2, round(width * zoom))))
        frames = clip[0].transpose(0, 1)
        # grid_sample's coordinates span the (reduced) clip by 2; one output pixel is one pixel of it, or 1/zoom.
        step = 1 / max(1.0, zoom)
        sy, sx = step * height / frames.shape[2], step * width / frames.shape[3]
        cos, sin = math.cos(angle), math.sin(angle)
        ratio = width / height
        theta = torch.tensor(
            [[flip * sx * cos, -sx * sin / ratio, center[0]], [flip * sy * sin * ratio, sy * cos, center[1]]],
            dtype=frames.dtype,
            device=frames.device,
        )
        grid = F.affine_grid(theta[None], [1, 1, height, width], align_corners=False)
        turned = F.grid_sample(
            frames, grid.expand(len(frames), -1, -1, -1), mode="bicubic", padding_mode="reflection", align_corners=False
        )
        return _recolor(turned, rng).transpose(0, 1)[None]


def _recolor(frames: Tensor, rng: np.random.Generator) -> Tensor:
    """Contrast and brightness changed and channels mixed a little; half of the pieces permuted, a quarter inverted."""
    order = rng.permutation(3) if rng.random() < 0.5 else np.arange(3)
    matrix = np.eye(3)[order] + rng.uniform(-0.15, 0.15, size=(3, 3))
    matrix *= rng.uniform(0.5, 1.2) * (-1.0 if rng.random() < 0.25 else 1.0)
    bias = rng.uniform(-0.2, 0.2, size=3)
    weight = torch.tensor(matrix, dtype=frames.dtype, device=frames.device)
    offset = torch.tensor(bias, dtype=frames.dtype, device=frames.device)
    return torch.einsum("ij,tjhw->tihw", weight, frames) + offset[:, None, None]


def _outline(rng: np.random.Generator, clip: Tensor) -> Tensor:
    """A mask in [0, 1] with edges about a pixel wide, where a smooth random field exceeds a random level."""
    height, width = clip.shape[3:]
    field = torch.tensor(rng.standard_normal((1, 1, _FIELD, _FIELD)), dtype=clip.dtype, device=clip.device)
    field = F.interpolate(field, size=(height, width), mode="bicubic", align_corners=False)[0, 0]
    level = rng.uniform(-0.3, 0.8)
    # The field changes by about 1 in one of its cells: this slope takes it from 0 to 1 within a pixel or two.
    slope = 0.5 * max(height, width) / _FIELD
    return torch.sigmoid((field - level) * slope * 4)


class Degraded(PixelTransform):
    """Blur, loss of resolution and noise: one round of Real-ESRGAN's degradation (arXiv 2107.10833).

    FlashVideo (arXiv 2502.05179) and Waver (arXiv 2508.15761) train on low-resolution frames made worse like that,
    because what a first stage generates is worse than a video that is only scaled down. In this order every clip is
    blurred by a Gaussian, reduced and enlarged again, and given normal noise, each by an amount drawn for the clip from
    the seed and its own pixels; so a clip always gives the same result. Left out: compression, sinc filters, the
    paper's other kernels and kinds of noise, and its second round.

    Args:
        seed: each seed gives other amounts and another noise.
        blur: least and greatest sigma of the Gaussian in pixels, > 0.
        shrink: least and greatest factor by which frames are reduced, >= 1.
        noise: least and greatest standard deviation of the noise, where the range of pixels is 2; >= 0.
    """

    def __init__(
        self,
        seed: int = 0,
        blur: tuple[float, float] = (0.2, 2.0),
        shrink: tuple[float, float] = (1.0, 2.0),
        noise: tuple[float, float] = (0.0, 0.05),
    ) -> None:
        super().__init__()
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        if not 0 < blur[0] <= blur[1] < float("inf"):
            raise ValueError(f"blur: expected 0 < least <= greatest, got {list(blur)}")
        if not 1 <= shrink[0] <= shrink[1] < float("inf"):
            raise ValueError(f"shrink: expected 1 <= least <= greatest, got {list(shrink)}")
        if not 0 <= noise[0] <= noise[1] < float("inf"):
            raise ValueError(f"noise: expected 0 <= least <= greatest, got {list(noise)}")
        self.seed = seed
        self.blur, self.shrink, self.noise = ((float(least), float(most)) for least, most in (blur, shrink, noise))

    def label(self) -> str:
        """All parameters."""
        parts = (("blur", self.blur), ("shrink", self.shrink), ("noise", self.noise))
        return f"seed {self.seed}, " + ", ".join(f"{name} {least!r} to {most!r}" for name, (least, most) in parts)

    def forward(self, video: Tensor) -> Tensor:
        """B x 3 x T x H x W in [-1, 1] to the same; each clip by its own random numbers."""
        return torch.cat([self._degraded(clip) for clip in video.split(1)])

    def _degraded(self, clip: Tensor) -> Tensor:
        pixels = clip.add(1).mul(127.5).round().to(torch.uint8).cpu().numpy()
        rng = np.random.default_rng([self.seed, zlib.crc32(pixels.tobytes())])
        blur, shrink, noise = (float(rng.uniform(*limits)) for limits in (self.blur, self.shrink, self.noise))
        height, width = clip.shape[3:]
        clip = unsharp_mask(clip, blur, -1.0)  # of the detail above the blur, all is taken away
        small = max(1, round(height / shrink)), max(1, round(width / shrink))
        if small != (height, width):
            clip = resize_video(resize_video(clip, small), (height, width))
        added = torch.from_numpy(rng.standard_normal(clip.shape, dtype=np.float32)).to(clip)
        return (clip + noise * added).clamp(-1, 1)
