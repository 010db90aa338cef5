"""Video super-resolution on pixels: RealBasicVSR and Real-ESRGAN's network, with the names of their published weights.

The code is our own, after the papers and the names of the published tensors; no weights are shipped.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luve_lightning.functional.pixels import IMAGENET_MEAN, IMAGENET_STD, described

TILE = 512
"""Side of the tiles, in pixels of the input. At 4x a tile's largest feature map takes about 1 GB in float32."""
CHUNK = 16
"""Frames whose features of the way back are in memory at once."""


class PixelSuperResolver(nn.Module, ABC):
    """A network that enlarges videos by a whole factor; it takes any size, batch, device and floating dtype.

    Attributes:
        scale: output over input, of each side.
    """

    scale: int

    @abstractmethod
    def stream(self, video: Tensor, tile: int | None = TILE, chunk: int = CHUNK) -> Iterator[Tensor]:
        """Enlarge a video; a frame is given away as soon as it is made.

        Args:
            video: B x 3 x T x H x W in [-1, 1].
            tile: side of the tiles, in pixels of the input; None computes whole frames.
            chunk: frames whose features are kept at once, where frames depend on each other.

        Yields:
            Each frame in order, float32 B x 3 x scale H x scale W, around [-1, 1].
        """

    def forward(self, video: Tensor, tile: int | None = TILE, chunk: int = CHUNK) -> Tensor:
        """All frames of `stream`, B x 3 x T x scale H x scale W, in the input's dtype."""
        return torch.stack(list(self.stream(video, tile, chunk)), dim=2).to(video.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which features are computed; pixels, flow and positions stay in float32."""
        return next(self.parameters()).dtype


def warp(features: Tensor, flow: Tensor, padding: str = "zeros") -> Tensor:
    """Features fetched along an optical flow: out(y, x) = features(y + flow_y, x + flow_x), bilinear.

    Positions and interpolation are float32: bfloat16 cannot tell pixel 300 from pixel 301.

    Args:
        features: B x C x H x W.
        flow: B x 2 x H x W, (x, y) in pixels.
        padding: what lies outside, "zeros" or "border".
    """
    height, width = features.shape[-2:]
    rows = torch.arange(height, device=flow.device, dtype=torch.float32)
    columns = torch.arange(width, device=flow.device, dtype=torch.float32)
    x = 2 * (columns[None, None, :] + flow[:, 0].float()) / max(width - 1, 1) - 1
    y = 2 * (rows[None, :, None] + flow[:, 1].float()) / max(height - 1, 1) - 1
    grid = torch.stack([x, y], dim=-1)
    warped = F.grid_sample(features.float(), grid, mode="bilinear", padding_mode=padding, align_corners=True)
    return warped.to(features.dtype)


def tiled(function: Callable[[Tensor], Tensor], image: Tensor, tile: int | None, halo: int, scale: int = 1) -> Tensor:
    """The result of a convolutional function, computed tile by tile.

    Equal to the whole, up to rounding, where the function sees no further than `halo` pixels.

    Args:
        function: from B x C x h x w to B x D x scale h x scale w.
        image: its input.
        tile: side of the tiles; None, or an image that is no larger, is computed at once.
        halo: pixels around a tile that are computed with it and cut off.
        scale: output over input, of each side.
    """
    height, width = image.shape[-2:]
    if tile is None or max(height, width) <= tile:
        return function(image)
    whole: Tensor | None = None
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            y, x = max(top - halo, 0), max(left - halo, 0)
            part = function(image[..., y : bottom + halo, x : right + halo])
            if whole is None:
                whole = part.new_empty(*part.shape[:-2], height * scale, width * scale)
            inner = part[..., (top - y) * scale : (bottom - y) * scale, (left - x) * scale : (right - x) * scale]
            whole[..., top * scale : bottom * scale, left * scale : right * scale] = inner
    assert whole is not None
    return whole


def _check(video: Tensor, tile: int | None, chunk: int) -> None:
    if video.ndim != 5 or video.shape[1] != 3 or 0 in video.shape or not video.is_floating_point():
        raise ValueError(f"video: expected floating point B x 3 x T x H x W, got {described(video)}")
    if chunk < 1 or (tile is not None and tile < 1):
        raise ValueError(f"expected tile >= 1 or None and chunk >= 1, got {tile} and {chunk}")


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


def _named(**parts: nn.Module) -> nn.Sequential:
    """Modules one after another, under the names that the published weights give them."""
    return nn.Sequential(OrderedDict(parts))


def _trunk(channels_in: int, channels: int, blocks: int) -> nn.Sequential:
    """A convolution and residual blocks; it sees 1 + 2 x blocks pixels far."""
    residuals = nn.Sequential(*(_Residual(channels) for _ in range(blocks)))
    return _named(main=nn.Sequential(nn.Conv2d(channels_in, channels, 3, padding=1), nn.LeakyReLU(0.1), residuals))


def _flow_level() -> nn.Sequential:
    """One level of SPyNet: 7 x 7 convolutions from both images and a flow to the flow's residue."""
    convolutions = [_named(conv=nn.Conv2d(a, b, 7, padding=3)) for a, b in pairwise((8, 32, 64, 32, 16, 2))]
    for convolution in convolutions[:-1]:
        convolution.add_module("activate", nn.ReLU())
    return _named(basic_module=nn.Sequential(*convolutions))


def _shuffled(channels_in: int, channels: int) -> nn.Sequential:
    """A convolution to four times the channels, which become two times the height and width."""
    return _named(upsample_conv=nn.Conv2d(channels_in, 4 * channels, 3, padding=1), shuffle=nn.PixelShuffle(2))


class SPyNet(nn.Module):
    """Optical flow by a spatial pyramid (arXiv 1611.00850), in the form of mmediting: six levels, no normalisation.

    From coarse to fine, each level adds a residue to the flow from below, at twice its size:
    f_l = 2 up(f_(l-1)) + G_l(reference, warp(other, 2 up(f_(l-1))), 2 up(f_(l-1))).
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.basic_module = nn.ModuleList(_flow_level() for _ in range(6))
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, reference: Tensor, other: Tensor) -> Tensor:
        """The flow that fetches `other` onto `reference`, see `warp`.

        Args:
            reference: B x 3 x H x W in [0, 1].
            other: likewise.

        Returns:
            float32 B x 2 x H x W, (x, y) in pixels.
        """
        height, width = reference.shape[-2:]
        size = tuple(-(-side // 32) * 32 for side in (height, width))
        pyramids = []
        for image in (reference, other):
            image = F.interpolate(image.float(), size=size, mode="bilinear", align_corners=False)
            levels = [(image - self.mean.float()) / self.std.float()]
            for _ in self.basic_module[1:]:
                levels.append(F.avg_pool2d(levels[-1], 2))
            pyramids.append(levels[::-1])
        flow = reference.new_zeros(len(reference), 2, size[0] // 32, size[1] // 32, dtype=torch.float32)
        dtype = next(self.parameters()).dtype
        for number, (level, near, far) in enumerate(zip(self.basic_module, *pyramids, strict=True)):
            if number:
                flow = 2 * F.interpolate(flow, scale_factor=2, mode="bilinear", align_corners=True)
            seen = torch.cat([near, warp(far, flow, "border"), flow], dim=1)
            flow = flow + level(seen.to(dtype)).float()
        flow = F.interpolate(flow, size=(height, width), mode="bilinear", align_corners=False)
        return flow * flow.new_tensor([width / size[1], height / size[0]]).view(1, 2, 1, 1)


class BasicVSR(nn.Module):
    """BasicVSR (arXiv 2012.02181): features are carried back and then forth along the flow, and frames enlarged 4x.

    With x_i the frames, b_i = B(x_i, warp(b_(i+1), flow to the next frame)), f_i = F(x_i, warp(f_(i-1), flow to the
    previous one)), and frame i is U(b_i, f_i) added to x_i enlarged bilinearly.

    Args:
        channels: channels of the features.
        blocks: residual blocks of each direction.
    """

    def __init__(self, channels: int = 64, blocks: int = 20) -> None:
        super().__init__()
        self.spynet = SPyNet()
        self.backward_resblocks = _trunk(channels + 3, channels, blocks)
        self.forward_resblocks = _trunk(channels + 3, channels, blocks)
        self.fusion = nn.Conv2d(2 * channels, channels, 1)
        self.upsample1, self.upsample2 = _shuffled(channels, channels), _shuffled(channels, 64)
        self.conv_hr, self.conv_last = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 3, 3, padding=1)
        self.channels, self.sees = channels, 1 + 2 * blocks

    def stream(self, frames: Sequence[Tensor], tile: int | None, chunk: int) -> Iterator[Tensor]:
        """The enlarged frames in order, from float32 B x 3 x H x W in [0, 1].

        The way back is walked once for the features that enter each chunk from its end, and again chunk by chunk:
        memory holds the features of one chunk, and the result is the same.
        """
        to_next = [self.spynet(frame, following) for frame, following in pairwise(frames)]
        parts = [range(i, min(i + chunk, len(frames))) for i in range(0, len(frames), chunk)]
        entering: list[Tensor | None] = [None] * len(parts)
        for k in reversed(range(1, len(parts))):
            entering[k - 1] = deque(self._back(frames, to_next, parts[k], entering[k], tile), maxlen=1)[0][1]
        carried: Tensor | None = None
        for k, part in enumerate(parts):
            behind = dict(self._back(frames, to_next, part, entering[k], tile))
            for i in part:
                flow = self.spynet(frames[i], frames[i - 1]) if i else None
                carried = self._carry(self.forward_resblocks, frames[i], carried, flow, tile)
                details = tiled(self._enlarged, torch.cat([behind.pop(i), carried], dim=1), tile, halo=4, scale=4)
                yield details.float() + F.interpolate(frames[i], scale_factor=4, mode="bilinear", align_corners=False)

    def _back(
        self, frames: Sequence[Tensor], flows: Sequence[Tensor], part: range, carried: Tensor | None, tile: int | None
    ) -> Iterator[tuple[int, Tensor]]:
        """Number and features of a chunk's frames, from the last to the first."""
        for i in reversed(part):
            flow = None if carried is None else flows[i]
            carried = self._carry(self.backward_resblocks, frames[i], carried, flow, tile)
            yield i, carried

    def _carry(
        self, trunk: nn.Module, frame: Tensor, carried: Tensor | None, flow: Tensor | None, tile: int | None
    ) -> Tensor:
        """A frame's features from those of its neighbour; without one, from zeros."""
        dtype = self.fusion.weight.dtype
        if carried is None or flow is None:
            carried = frame.new_zeros(len(frame), self.channels, *frame.shape[-2:], dtype=dtype)
        else:
            carried = warp(carried, flow)
        return tiled(trunk, torch.cat([frame.to(dtype), carried], dim=1), tile, self.sees)

    def _enlarged(self, features: Tensor) -> Tensor:
        x = F.leaky_relu(self.fusion(features), 0.1)
        for layer in (self.upsample1, self.upsample2, self.conv_hr):
            x = F.leaky_relu(layer(x), 0.1)
        made: Tensor = self.conv_last(x)
        return made


class RealBasicVSR(PixelSuperResolver):
    """RealBasicVSR (arXiv 2111.12704): frames are cleaned up to three times, then BasicVSR enlarges them 4x.

    Dynamic cleaning: x <- x + C(x), again while the mean |C(x)| of the video is at least the threshold. Here each
    video of a batch decides for itself; published, the batch decides together. Names of tensors are those of
    mmediting's and mmagic's `realbasicvsr_c64b20_1x30x8_lr5e-5_150k_reds`, without `generator.`.

    Frames are computed one after another, in tiles that overlap as far as the convolutions see, and flow and
    features are warped on whole frames: tiles and chunks give the result of the whole up to rounding, everywhere.
    Memory grows with a frame's size by a chunk's features, and with the length by flow and pixels, and by one frame's
    features a chunk.

    Args:
        channels: channels of the features.
        blocks: residual blocks of each direction.
        cleaning_blocks: residual blocks of the cleaning.
        threshold: of 255 levels. 5 is what the published configuration asks for in tests; its own value, 255, cleans
            once.
    """

    scale: int = 4

    def __init__(self, channels: int = 64, blocks: int = 20, cleaning_blocks: int = 20, threshold: float = 5.0) -> None:
        super().__init__()
        self.image_cleaning = nn.Sequential(_trunk(3, channels, cleaning_blocks), nn.Conv2d(channels, 3, 3, padding=1))
        self.basicvsr = BasicVSR(channels, blocks)
        self.threshold, self.sees = threshold / 255, 2 + 2 * cleaning_blocks

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> RealBasicVSR:
        """One of the sizes that tensors' names and shapes tell; published ones where they tell none."""
        return cls(
            shapes.get("image_cleaning.1.weight", (3, 64))[1],
            _count(shapes, r"basicvsr\.(?:back|for)ward_resblocks\.main\.2\.(\d+)\.", 20),
            _count(shapes, r"image_cleaning\.0\.main\.2\.(\d+)\.", 20),
        )

    def stream(self, video: Tensor, tile: int | None = TILE, chunk: int = CHUNK) -> Iterator[Tensor]:
        """See PixelSuperResolver."""
        _check(video, tile, chunk)
        frames = [(frame.float() + 1) / 2 for frame in video.unbind(2)]
        for frame in self.basicvsr.stream(self.cleaned(frames, tile), tile, chunk):
            yield 2 * frame - 1

    def cleaned(self, frames: Sequence[Tensor], tile: int | None = None) -> list[Tensor]:
        """The frames of one batch of videos, B x 3 x H x W in [0, 1] each, cleaned as often as each video needs."""
        frames = list(frames)
        done = torch.zeros(len(frames[0]), dtype=torch.bool, device=frames[0].device)
        for _ in range(3):
            changes = []
            for i, frame in enumerate(frames):
                residue = tiled(self.image_cleaning, frame.to(self.dtype), tile, self.sees).float()
                frames[i] = torch.where(done.view(-1, 1, 1, 1), frame, frame + residue)
                changes.append(residue.abs().mean((1, 2, 3)))
            done = done | (torch.stack(changes).mean(0) < self.threshold)
            if done.all():
                break
        return frames


class _Dense(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        for i in range(4):
            self.add_module(f"conv{i + 1}", nn.Conv2d(channels + i * growth, growth, 3, padding=1))
        self.conv5 = nn.Conv2d(channels + 4 * growth, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for i in range(4):
            seen.append(F.leaky_relu(self.get_submodule(f"conv{i + 1}")(torch.cat(seen, dim=1)), 0.2))
        return x + 0.2 * self.conv5(torch.cat(seen, dim=1))


class _DenseTriple(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (_Dense(channels, growth) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(PixelSuperResolver):
    """Real-ESRGAN's network of residual dense blocks (arXiv 2107.10833), a frame at a time; 4x, or 2x.

    Names of tensors are those of `RealESRGAN_x4plus` and its like. At 2x the input is folded 2 x 2 into channels,
    its last row or column repeated where a side is odd. A network of 23 blocks sees about 350 pixels far, tiles overlap
    by 32: tiles differ slightly from the whole, most at their borders.

    Args:
        scale: 4 or 2.
        channels: channels of the features.
        blocks: number of blocks, each of three dense ones.
        growth: channels that a dense block's convolution adds.
    """

    def __init__(self, scale: int = 4, channels: int = 64, blocks: int = 23, growth: int = 32) -> None:
        super().__init__()
        if scale not in (2, 4):
            raise ValueError(f"RRDBNet: scale: expected 2 or 4, got {scale}")
        self.scale, self.fold = scale, 4 // scale
        self.conv_first = nn.Conv2d(3 * self.fold**2, channels, 3, padding=1)
        self.body = nn.Sequential(*(_DenseTriple(channels, growth) for _ in range(blocks)))
        self.conv_body, self.conv_up1, self.conv_up2, self.conv_hr = (
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(4)
        )
        self.conv_last = nn.Conv2d(channels, 3, 3, padding=1)

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> RRDBNet:
        """See RealBasicVSR."""
        first = shapes.get("conv_first.weight", (64, 3))
        growth = shapes.get("body.0.rdb1.conv1.weight", (32,))[0]
        return cls(2 if first[1] == 12 else 4, first[0], _count(shapes, r"body\.(\d+)\.", 23), growth)

    def stream(self, video: Tensor, tile: int | None = TILE, chunk: int = CHUNK) -> Iterator[Tensor]:
        """See PixelSuperResolver; frames do not depend on each other."""
        _check(video, tile, chunk)
        height, width = video.shape[-2:]
        tile = None if tile is None else -(-tile // self.fold) * self.fold
        for frame in video.unbind(2):
            padded = F.pad((frame.float() + 1) / 2, (0, -width % self.fold, 0, -height % self.fold), mode="replicate")
            made = tiled(self._enlarged, padded.to(self.dtype), tile, halo=32, scale=self.scale)
            yield 2 * made[..., : height * self.scale, : width * self.scale].float() - 1

    def _enlarged(self, x: Tensor) -> Tensor:
        first = self.conv_first(F.pixel_unshuffle(x, self.fold) if self.fold > 1 else x)
        x = first + self.conv_body(self.body(first))
        for layer in (self.conv_up1, self.conv_up2):
            x = F.leaky_relu(layer(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
        made: Tensor = self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))
        return made


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str, otherwise: int) -> int:
    """One more than the largest number at this place of tensors' names; `otherwise` where there is none."""
    return max((int(found[1]) + 1 for name in shapes if (found := re.match(pattern, name))), default=otherwise)
