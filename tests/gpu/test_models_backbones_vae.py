"""Encoding and decoding by Wan2.1's VAE on a GPU, with its real channels, through the Triton kernels."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from luve_lightning.functional.pixels import video_to_frames
from luve_lightning.models.backbones import latent_space_of, wan_vae
from luve_lightning.models.backbones.wan_vae import decode_whole_clip, encode_whole_clip, suits
from tests.helpers.gpu import DEVICE, FLOAT32, assert_rounds_like, coarse, error
from tests.helpers.noise import noise
from tests.models.backbones.test_wan_whole_clip import tiny_vae

CLIPS = {1: (9, 48, 72), 3: (5, 24, 32)}  # by batch: frames, height and width


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    """Its channels, with one residual block a level; only the multiples of 384 that attention needs are slow."""
    base = 96 if DEVICE.type == "cuda" else 16
    made = tiny_vae(base_dim=base, z_dim=16, dim_mult=[1, 2, 4, 4], latents_mean=[0.1] * 16, latents_std=[1.2] * 16)
    return coarse(made).requires_grad_(False)


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    """Clips and latents that bfloat16 holds exactly."""
    frames, height, width = CLIPS[batch]
    video = noise(batch, 3, frames, height, width).clamp(-1, 1)
    latents = noise(batch, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    return video.bfloat16().float(), latents.bfloat16().float()


def plain(vae: Any, video: Tensor, latents: Tensor, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Latents, pixels, and the gradient of pixels, by PyTorch's operations."""
    space = latent_space_of(deepcopy(vae).to(device, dtype))
    moments = encode_whole_clip(space.vae, video.to(device, dtype))
    z = latents.to(device, copy=True).requires_grad_()
    pixels = decode_whole_clip(space.vae, space.denormalize(z).to(dtype)).float()
    [gradient] = torch.autograd.grad(pixels.square().sum(), z)
    return [space.normalize(moments.chunk(2, dim=1)[0].float()), pixels.detach(), gradient]


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("batch", CLIPS)
def test_large_clips_go_through_the_kernels(
    device: torch.device, vae: AutoencoderKLWan, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No further from float32 than PyTorch's operations in bfloat16; also for a VAE in float32 under autocast."""
    video, latents = inputs(batch)
    exact = plain(vae, video, latents, torch.device("cpu"), torch.float32)
    rounded = plain(vae, video, latents, device, torch.bfloat16)
    monkeypatch.setattr(wan_vae, "WHOLE_CLIP_PIXELS", 0)  # small clips are large
    for dtype in (torch.bfloat16, torch.float32):
        codec = latent_space_of(deepcopy(vae).to(device, dtype))
        assert suits(codec.vae, device, torch.bfloat16) == (device.type == "cuda")
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.float32):
            encoded, decoded = codec.encode(video.to(device)), codec.decode(latents.to(device))
            z = latents.to(device, copy=True).requires_grad_()
            pixels = codec.decode_differentiable(z).float()
        [gradient] = torch.autograd.grad(pixels.square().sum(), z)
        frames = torch.empty(batch, *video.shape[2:], 3, dtype=torch.uint8)
        if device.type == "cuda":
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.float32):
                assert codec.streams(latents)
                assert codec.decode(latents.to(device), out=frames) is frames
            assert (frames.int() - video_to_frames(decoded).cpu().int()).abs().max() <= 1
        assert_rounds_like(encoded, rounded[0], exact[0])
        assert_rounds_like(decoded, rounded[1].clamp(-1, 1), exact[1].clamp(-1, 1))
        assert_rounds_like(pixels, rounded[1], exact[1])
        assert_rounds_like(gradient, rounded[2], exact[2])


@torch.no_grad()
@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("batch", CLIPS)
def test_float32_is_the_cpus_whole_and_in_tiles(device: torch.device, vae: AutoencoderKLWan, batch: int) -> None:
    video, latents = inputs(batch)
    codec = latent_space_of(deepcopy(vae))
    encoded, decoded = codec.encode(video), codec.decode(latents)
    there = latent_space_of(deepcopy(vae).to(device))
    assert error(there.encode(video.to(device)), encoded) < FLOAT32
    assert error(there.decode(latents.to(device)), decoded) < FLOAT32
    # In tiles, to the host's memory as `luve generate` decodes what is large.
    out = torch.empty_like(decoded)
    tiled = latent_space_of(deepcopy(vae).to(device), tile=(2, 3))
    assert tiled.decode(latents.to(device), out=out) is out
    assert error(out, decoded) < FLOAT32
    assert error(tiled.encode(video.to(device)), encoded) < FLOAT32


@pytest.mark.only_gpu
def test_an_offloaded_vae_decodes_the_same_and_its_kernels_can_be_built_before(
    device: torch.device, vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wan_vae, "WHOLE_CLIP_PIXELS", 0)
    _, latents = inputs(1)
    codec = latent_space_of(deepcopy(vae).to(device, torch.bfloat16))
    codec.build_kernels()
    want = codec.decode(latents.to(device))
    codec.to("cpu")
    codec.to(device)
    assert torch.equal(codec.decode(latents.to(device)), want)
