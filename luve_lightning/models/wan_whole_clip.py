"""Whole-clip forms of AutoencoderKLWan's encoder and decoder.

diffusers runs the Wan VAE chunk by chunk and carries the causal convolutions' history in a cache on the module.
That bounds memory for long clips, but it is slow for short ones (Python work per chunk), it cannot be
checkpointed (recomputation would find a changed cache), and `decode` ends in a clamp that stops gradients.

The convolutions are causal with zero padding, so one pass over the whole clip gives the same numbers. Only the
temporal resampling treats the first frame apart:

- down: the first frame skips `time_conv`; the stride-2 convolution then runs over all frames, the first included;
- up: the first frame is not doubled; the others go through `time_conv`, whose history starts after it.

Shapes: x is B x C x T x H x W throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Stage = Callable[[Tensor], Tensor]


def _resample_frames(resample: WanResample, x: Tensor) -> Tensor:
    """Apply the per-frame (2-D) part of a resampling layer to every frame at once."""
    batch, channels, frames, height, width = x.shape
    x = x.permute(0, 2, 1, 3, 4).reshape(batch * frames, channels, height, width)
    x = resample.resample(x)
    return x.reshape(batch, frames, *x.shape[1:]).permute(0, 2, 1, 3, 4)


def _resample(resample: WanResample, x: Tensor) -> Tensor:
    """`WanResample` over a whole clip, first frame treated as the chunked form treats it."""
    if resample.mode == "upsample3d" and x.shape[2] > 1:
        rest = x[:, :, 1:]
        batch, channels, frames, height, width = rest.shape
        doubled = resample.time_conv(rest).reshape(batch, 2, channels, frames, height, width)
        doubled = doubled.permute(0, 2, 3, 1, 4, 5).reshape(batch, channels, 2 * frames, height, width)
        x = torch.cat([x[:, :, :1], doubled], dim=2)
    x = _resample_frames(resample, x)
    if resample.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], resample.time_conv(x)], dim=2)
    return x


def _head(net: Any, x: Tensor) -> Tensor:
    return net.conv_out(net.nonlinearity(net.norm_out(x)))


def _run(stages: list[Stage], x: Tensor, checkpointed: bool) -> Tensor:
    """Run the stages in turn; with `checkpointed`, keep only what lies between them for the backward pass."""
    for stage in stages:
        if checkpointed and torch.is_grad_enabled():
            x = checkpoint(stage, x, use_reentrant=False)
        else:
            x = stage(x)
    return x


def refuse_residual(vae: AutoencoderKLWan) -> None:
    """Raise a ValueError for Wan2.2's VAE, whose blocks the forms in this package do not know."""
    if vae.config.is_residual:
        raise ValueError(
            "this VAE has Wan2.2's residual blocks (is_residual=True); expected a Wan2.1 AutoencoderKLWan"
        )


def encode_whole_clip(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Posterior moments of a clip in one pass, equal to `vae._encode` to rounding.

    Args:
        vae: a Wan2.1 VAE; its parameters take part in the graph.
        video: B x 3 x T x H x W in [-1, 1]; T = 4k + 1.

    Returns:
        Mean and log-variance stacked, B x 2C x (T-1)/4+1 x H/8 x W/8.
    """
    refuse_residual(vae)
    net = vae.encoder
    stages: list[Stage] = [net.conv_in]
    for block in net.down_blocks:
        stages.append(_bind(_resample, block) if isinstance(block, WanResample) else block)
    stages += [net.mid_block, _bind(_head, net), vae.quant_conv]
    if vae.config.patch_size is not None:
        video = patchify(video, patch_size=vae.config.patch_size)
    return _run(stages, video, checkpointed=False)


def decode_whole_clip(vae: AutoencoderKLWan, latents: Tensor, *, checkpointed: bool = False) -> Tensor:
    """Decode a clip in one pass without the final clamp, equal to `vae.decode` to rounding inside [-1, 1].

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
    stages: list[Stage] = [vae.post_quant_conv, net.conv_in, net.mid_block]
    for block in net.up_blocks:
        stages += list(block.resnets)
        if block.upsamplers is not None:
            stages.append(_bind(_resample, block.upsamplers[0]))
    stages.append(_bind(_head, net))
    video = _run(stages, latents, checkpointed)
    if vae.config.patch_size is not None:
        video = unpatchify(video, patch_size=vae.config.patch_size)
    return video


def _bind(function: Callable[[nn.Module, Tensor], Tensor], module: nn.Module) -> Stage:
    return lambda x: function(module, x)
