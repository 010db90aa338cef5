"""Wan2.1's latent space: AutoencoderKLWan in whole-clip form, and in tiles where frames are large.

diffusers runs the Wan VAE chunk by chunk and carries the causal convolutions' history in a cache on the module.
That bounds memory for long clips, but it is slow for short ones, it cannot be checkpointed, because recomputation
would find a changed cache, and `decode` ends in a clamp that stops gradients.

The convolutions are causal with zero padding: one pass gives the same numbers, if temporal resampling spares frame 0:

- down: the first frame skips `time_conv`; the stride-2 convolution then runs over all frames, including the first;
- up: the first frame is not doubled; the others go through `time_conv`, whose history starts after it.

x is B x C x T x H x W throughout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luve_lightning.functional.frames import Convolution, FrameLayer, Linear, Norm, keeping, kernels_suit
from luve_lightning.functional.frames.codec import Down, FrameAttention, FrameCodec, Residual, Up
from luve_lightning.models.backbones.encoders import LatentSpace, Written, unheard
from luve_lightning.models.backbones.wan_tiles import (
    DEFAULT_TILE,
    bring_to_device,
    check_room,
    decode_tiled,
    dry_decode_tiled,
    encode_tiled,
    refuse_residual,
    write_frames,
)  # fmt: skip

# Pixels (batch x frames x height x width) of a clip that takes one pass, such as 114 frames at 192x192.
WHOLE_CLIP_PIXELS = 2**22

_Stage = Callable[[Tensor], Tensor]


class WanLatentSpace(LatentSpace):
    """Pixels to normalised latents and back by Wan2.1's VAE.

    Latents are (z - latents_mean) / latents_std with the statistics of the VAE's config, as in diffusers'
    pipelines.

    Args:
        vae: a Wan2.1 VAE. On a CPU its weights are laid out for speed.
        tile: see LatentSpace.
    """

    default_tile = DEFAULT_TILE
    vae: AutoencoderKLWan

    def __init__(self, vae: AutoencoderKLWan, tile: tuple[int, int] | None = None) -> None:
        config = vae.config
        super().__init__(
            vae,
            tile,
            mean=config["latents_mean"],
            std=config["latents_std"],
            spatial_ratio=config.scale_factor_spatial,
            temporal_ratio=config.scale_factor_temporal,
        )
        self._patch = config.patch_size or 1
        self._streamed: tuple[Any, FrameCodec] | None = None
        self._lay_out_weights()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WanLatentSpace:
        """What `to`, `cuda`, `half` and the like call."""
        super()._apply(fn, recurse)
        self._streamed = None
        self._lay_out_weights()
        return self

    def _lay_out_weights(self) -> None:
        """Store convolutions channels last on a CPU: encoding, decoding and its gradient take 60 % of the time.

        Elsewhere the layout is PyTorch's own, whatever happened to the weights before.
        """
        for module in self.vae.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                formats = {2: torch.channels_last, 3: torch.channels_last_3d}
                on_cpu = module.weight.device.type == "cpu"
                layout = formats[len(module.kernel_size)] if on_cpu else torch.contiguous_format
                module.weight.data = module.weight.data.contiguous(memory_format=layout)

    def clips_at_once(self, frames: int, height: int, width: int) -> int:
        """See LatentSpace."""
        return max(1, WHOLE_CLIP_PIXELS // (frames * height * width))

    def _takes_whole(self, frames: int, height: int, width: int) -> bool:
        return frames * height * width <= WHOLE_CLIP_PIXELS and not self.vae.use_tiling

    def _tile_for(self, height: int, width: int) -> tuple[int, int] | None:
        """The tile for latent frames of this size; None for frames that are no larger."""
        fits = self.tile is None or (height <= self.tile[0] and width <= self.tile[1])
        return None if fits else self.tile

    def _stream(self) -> FrameCodec | None:
        """The form for a GPU where it is the fast one; None elsewhere."""
        self.wake()
        weight = next(self.vae.parameters())
        kind, dtype = weight.device.type, weight.dtype
        if kind != "meta" and torch.is_autocast_enabled(kind):  # which does not know it
            dtype = torch.get_autocast_dtype(kind)
        if self.vae.use_tiling or not suits(self.vae, weight.device, dtype):
            return None
        state = dtype, tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.vae.parameters())
        if self._streamed is None or self._streamed[0] != state:
            self._streamed = state, frame_codec(self.vae, dtype)
        return self._streamed[1]

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """See LatentSpace."""
        frames, height, width = video.shape[2:]
        _, h, w = self.latent_size(frames, height, width)
        if tile := self._tile_for(h, w):
            clips = [encode_tiled(self.vae, clip, tile) for clip in video.split(1)]
            return self.normalize(torch.cat(clips).chunk(2, dim=1)[0].float())
        whole = self._takes_whole(frames, height, width)
        if not whole and (stream := self._stream()):
            patches = (wan.patchify(clip.to(stream.device), self._patch)[0] for clip in video.split(1))
            moments = torch.stack([stream.encode(clip) for clip in patches])
            return self.normalize(moments.chunk(2, dim=1)[0].float())
        means = []
        for part in video.to(self.dtype).split(self.clips_at_once(frames, height, width)):
            moments = encode_whole_clip(self.vae, part) if whole else self.vae.encode(part).latent_dist.parameters
            means.append(moments.chunk(2, dim=1)[0])
        return self.normalize(torch.cat(means).float())

    @torch.no_grad()
    def decode(self, latents: Tensor, *, out: Tensor | None = None, written: Written = unheard) -> Tensor:
        """See LatentSpace."""
        size = self.pixel_size(latents.shape[2], latents.shape[3], latents.shape[4])
        tile = self._tile_for(latents.shape[3], latents.shape[4])
        whole = self._takes_whole(*size)
        if self.streams(latents):
            return self._decode_stream(latents, out, (len(latents), 3, *size), written)
        if out is not None or tile:
            return self._decode_tiles(latents, out, (len(latents), 3, *size))
        videos = []
        for part in self.denormalize(latents.float()).to(self.dtype).split(self.clips_at_once(*size)):
            video = decode_whole_clip(self.vae, part) if whole else self.vae.decode(part).sample
            videos.append(video.float().clamp(-1, 1))
        return torch.cat(videos)

    def streams(self, latents: Tensor) -> bool:
        """See LatentSpace."""
        tile, whole = self._tile_for(*latents.shape[3:]), self._takes_whole(*self.pixel_size(*latents.shape[2:]))
        return tile is None and not whole and self._stream() is not None

    @torch.no_grad()
    def build_kernels(self) -> None:
        """See LatentSpace; a VAE that is offloaded stays where it is."""
        device = next(self.vae.parameters()).device
        if device.type == "cuda" and (stream := self._stream()):  # kernels are the same for all sizes
            list(stream.decode(torch.zeros(self.channels, 2, 8, 8, device=device), 1, 1))

    def _decode_stream(self, latents: Tensor, out: Tensor | None, size: tuple[int, ...], written: Written) -> Tensor:
        """Decode clip by clip, a few latent frames at a time, into one tensor."""
        out, stream = _room(latents, out, size), self._stream()
        assert stream is not None
        for clip, place in zip(self.denormalize(latents.float()), out.split(1), strict=True):
            start = 0
            for part in stream.decode(clip):
                start = write_frames(place, wan.unpatchify(part[None], self._patch).float().clamp_(-1, 1), start)
                written(start)
        return out

    def _decode_tiles(self, latents: Tensor, out: Tensor | None, size: tuple[int, ...]) -> Tensor:
        """Decode clip by clip, in tiles, into one tensor."""
        out = _room(latents, out, size)
        for clip, place in zip(self.denormalize(latents.float()).split(1), out.split(1), strict=True):
            decode_tiled(self.vae, clip, self.tile or DEFAULT_TILE, out=place)
        return out

    def decode_differentiable(self, latents: Tensor) -> Tensor:
        """See LatentSpace; peak memory is one decoder block's activations, because blocks are recomputed."""
        z = self.denormalize(latents.float())
        if stream := self._stream():
            return wan.unpatchify(torch.stack([stream.decode_differentiable(clip) for clip in z]), self._patch)
        return decode_whole_clip(self.vae, z.to(self.dtype), checkpointed=True)

    def decode_in_tiles(self, latents: Tensor, tile: tuple[int, int]) -> Tensor:
        """See LatentSpace."""
        return decode_tiled(self.vae, self.denormalize(latents).to(self.dtype), tile)

    def dry_decode_in_tiles(
        self, latents: Tensor, tile: tuple[int, int], times: Callable[[int], AbstractContextManager[Any]]
    ) -> None:
        """See LatentSpace."""
        dry_decode_tiled(times, self.vae, self.denormalize(latents).to(self.dtype), tile)

    def fingerprint(self) -> str:
        """sha256 of the VAE's configuration and weights.

        Weights are hashed as float32, so the same VAE loaded as bfloat16 from a bfloat16 file has the same
        fingerprint.
        """
        config = {k: v for k, v in dict(self.vae.config).items() if not k.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def wake(self) -> None:
        """See LatentSpace."""
        bring_to_device(self.vae)

    @property
    def feature_channels(self) -> int:
        """Channels before the encoder's last convolution."""
        return int(self.vae.encoder.conv_out.in_channels)

    def features(self, video: Tensor) -> Tensor:
        """The input of the encoder's last convolution, before it is squeezed into latents."""
        taken: list[Tensor] = []
        hook = self.vae.encoder.conv_out.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
        try:
            encode_whole_clip(self.vae, video.to(self.dtype))
        finally:
            hook.remove()
        return taken[0]

    def forget_decoder(self) -> None:
        """See LatentSpace."""
        self.vae.decoder = None  # two thirds of the weights

    @staticmethod
    def moments(vae: Any, video: Tensor) -> Tensor:
        """See LatentSpace."""
        return encode_whole_clip(vae, video)

    @staticmethod
    def pixels(vae: Any, latents: Tensor) -> Tensor:
        """See LatentSpace."""
        return decode_whole_clip(vae, latents)

    @staticmethod
    def set_statistics(vae: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        """See LatentSpace."""
        vae.register_to_config(latents_mean=list(mean), latents_std=list(std))


def _room(latents: Tensor, out: Tensor | None, size: tuple[int, ...]) -> Tensor:
    """`out`, or a new tensor for the video of latents; ValueError where `out` cannot hold it."""
    if out is None:
        return latents.new_empty(size, dtype=torch.float32)
    if len(out) != len(latents):
        raise ValueError(f"out: for {len(out)} clips; the latents are of {len(latents)}")
    return check_room(out, size)


def suits(vae: AutoencoderKLWan, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `frame_codec` is the fast form of a VAE; its kernels move 8 channels."""
    odd = vae.config.base_dim % 8 or (vae.config.decoder_base_dim or 8) % 8
    return not odd and not vae.config.is_residual and kernels_suit(device, dtype)


def frame_codec(vae: AutoencoderKLWan, dtype: torch.dtype) -> FrameCodec:
    """The form for large clips on a GPU, equal up to rounding; frames are in patches where the VAE takes patches.

    Raises:
        ValueError: for a residual (Wan2.2) VAE.
    """
    refuse_residual(vae)
    config, device = vae.config, vae.quant_conv.weight.device

    def ends(net: Any) -> tuple[Convolution, Convolution]:
        return Convolution.of(net.conv_in, dtype), Convolution.of(net.conv_out, dtype, Norm.of(net.norm_out, dtype))

    def encoder() -> list[FrameLayer]:
        first, last = ends(vae.encoder)
        blocks = [*vae.encoder.down_blocks, *_mid_blocks(vae.encoder)]
        return [first, *(_frame_layer(block, dtype) for block in blocks), last, Linear(vae.quant_conv, dtype)]

    def decoder() -> list[FrameLayer]:
        first, last = ends(vae.decoder)
        blocks = _mid_blocks(vae.decoder)
        for block in vae.decoder.up_blocks:
            blocks += [*block.resnets, *(block.upsamplers or [])]
        return [first, *(_frame_layer(block, dtype) for block in blocks), last]

    ratio = config.scale_factor_spatial // (config.patch_size or 1)
    with keeping():
        before = Linear(vae.post_quant_conv, dtype)
    return FrameCodec(encoder, decoder, before, config.scale_factor_temporal, ratio, dtype, device)


def _mid_blocks(net: Any) -> list[Any]:
    mid = net.mid_block
    later = zip(mid.attentions, mid.resnets[1:], strict=True)
    return [mid.resnets[0], *(block for pair in later for block in pair)]


def _frame_layer(block: Any, dtype: torch.dtype) -> FrameLayer:
    if isinstance(block, wan.WanResidualBlock):
        first = Convolution.of(block.conv1, dtype, Norm.of(block.norm1, dtype))
        second = Convolution.of(block.conv2, dtype, Norm.of(block.norm2, dtype))
        short = block.conv_shortcut
        return Residual(first, second, Linear(short, dtype) if isinstance(short, nn.Conv3d) else None)
    if isinstance(block, wan.WanAttentionBlock):
        norm = Norm.of(block.norm, dtype, active=False)
        return FrameAttention(norm, Linear(block.to_qkv, dtype), Linear(block.proj, dtype))
    assert isinstance(block, wan.WanResample)
    conv: Any = block.resample[1]
    time = Convolution.of(block.time_conv, dtype) if block.mode.endswith("3d") else None
    up = block.mode.startswith("up")
    return Up(Convolution.of(conv, dtype), time) if up else Down(conv.weight, conv.bias, dtype, time)


def _resample(resample: wan.WanResample, x: Tensor) -> Tensor:
    """`WanResample` over a whole clip, with the first frame treated as in the chunked form."""
    if resample.mode == "upsample3d" and x.shape[2] > 1:
        rest = x[:, :, 1:]
        batch, channels, frames, height, width = rest.shape
        doubled = resample.time_conv(rest).reshape(batch, 2, channels, frames, height, width)
        doubled = doubled.permute(0, 2, 3, 1, 4, 5).reshape(batch, channels, 2 * frames, height, width)
        x = torch.cat([x[:, :, :1], doubled], dim=2)
    # The per-frame (2-D) part, for every frame at once.
    batch, channels, frames, height, width = x.shape
    x = resample.resample(x.permute(0, 2, 1, 3, 4).reshape(batch * frames, channels, height, width))
    x = x.reshape(batch, frames, *x.shape[1:]).permute(0, 2, 1, 3, 4)
    if resample.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], resample.time_conv(x)], dim=2)
    return x


def _head(net: Any, x: Tensor) -> Tensor:
    return net.conv_out(net.nonlinearity(net.norm_out(x)))


def _run(stages: list[_Stage], x: Tensor, checkpointed: bool) -> Tensor:
    """Run the stages in turn; with `checkpointed`, keep only their inputs for the backward pass."""
    for stage in stages:
        x = checkpoint(stage, x, use_reentrant=False) if checkpointed and torch.is_grad_enabled() else stage(x)
    return x


def encode_whole_clip(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Posterior moments of a clip in one pass, equal to `vae._encode` up to rounding.

    Args:
        vae: a Wan2.1 VAE; its parameters take part in the graph.
        video: B x 3 x T x H x W in [-1, 1]; T = 4k + 1.

    Returns:
        Mean and log-variance stacked, B x 2C x (T-1)/4+1 x H/8 x W/8.
    """
    refuse_residual(vae)
    net = vae.encoder
    stages: list[_Stage] = [net.conv_in]
    for block in net.down_blocks:
        stages.append(partial(_resample, block) if isinstance(block, wan.WanResample) else block)
    stages += [net.mid_block, partial(_head, net), vae.quant_conv]
    if vae.config.patch_size is not None:
        video = wan.patchify(video, patch_size=vae.config.patch_size)
    return _run(stages, video, checkpointed=False)


def decode_whole_clip(vae: AutoencoderKLWan, latents: Tensor, *, checkpointed: bool = False) -> Tensor:
    """Decode a clip in one pass without the final clamp, equal to `vae.decode` up to rounding inside [-1, 1].

    Args:
        vae: a Wan2.1 VAE; its parameters take part in the graph unless they do not require gradients.
        latents: denormalised latents, B x C x t x h x w.
        checkpointed: recompute each residual block and each resampling in the backward pass. The blocks hold no
            state in this form, so recomputation is exact; peak memory falls to one block's activations.

    Returns:
        Pixels, B x 3 x 4(t-1)+1 x 8h x 8w, nominally in [-1, 1] but not clamped: a pixel outside keeps its gradient.
    """
    refuse_residual(vae)
    net = vae.decoder
    stages: list[_Stage] = [vae.post_quant_conv, net.conv_in, net.mid_block]
    for block in net.up_blocks:
        stages += list(block.resnets)
        if block.upsamplers is not None:
            stages.append(partial(_resample, block.upsamplers[0]))
    stages.append(partial(_head, net))
    video = _run(stages, latents, checkpointed)
    if vae.config.patch_size is not None:
        video = wan.unpatchify(video, patch_size=vae.config.patch_size)
    return video
