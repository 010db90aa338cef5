"""The whole-clip forms against diffusers' chunk-by-chunk ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn

from luve_lightning.models.backbones import latent_space_of
from luve_lightning.models.backbones.wan_vae import decode_whole_clip, encode_whole_clip
from tests.helpers.noise import noise
from tests.helpers.tiny_wan import in_float64

LEVELS = {"three levels": ([False, True, True], [1, 2, 2, 2]), "two levels": ([True, True], [1, 2, 2])}


def tiny_vae(levels: str = "three levels", patch_size: int | None = None, **changes: Any) -> AutoencoderKLWan:
    """Random weights with every bias and norm in use, and outputs of the size of pixels."""
    downsample, dim_mult = LEVELS[levels]
    channels = 3 if patch_size is None else 3 * patch_size**2
    config = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": dim_mult,
        "num_res_blocks": 1,
        "temperal_downsample": downsample,
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.1, 0.9, 1.2, 0.8],
        "patch_size": patch_size,
        "in_channels": channels,
        "out_channels": channels,
    }
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**(config | changes)).eval()
    for name, parameter in vae.named_parameters():
        if name.endswith(("bias", "gamma")):
            nn.init.normal_(parameter, mean=float(name.endswith("gamma")), std=0.1)
    return vae


@pytest.mark.parametrize("patch_size", [None, 2])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_equals_diffusers_chunked_form(frames: int, levels: str, patch_size: int | None) -> None:
    vae = in_float64(tiny_vae(levels, patch_size))
    ratio = 2 ** len(LEVELS[levels][0]) * (patch_size or 1)
    video = noise(2, 3, frames, 2 * ratio, 3 * ratio).double()
    latents = noise(2, 4, (frames - 1) // 4 + 1, 2, 3).double()
    with torch.no_grad():
        moments = encode_whole_clip(vae, video)
        assert moments.shape == (2, 8, (frames - 1) // 4 + 1, 2, 3)
        torch.testing.assert_close(moments, vae.encode(video).latent_dist.parameters, rtol=1e-10, atol=1e-10)
        pixels = decode_whole_clip(vae, latents)
        assert pixels.shape == video.shape
        torch.testing.assert_close(pixels.clamp(-1, 1), vae.decode(latents).sample, rtol=1e-10, atol=1e-10)
    # Something is compared: frames and places differ from each other.
    assert moments.std() > 1e-2
    assert pixels.std() > 1e-2


def test_the_past_does_not_depend_on_the_future() -> None:
    vae, latents = in_float64(tiny_vae()), noise(1, 4, 4, 2, 2).double()
    with torch.no_grad():
        whole, start = decode_whole_clip(vae, latents), decode_whole_clip(vae, latents[:, :, :2])
    torch.testing.assert_close(whole[:, :, :5], start, rtol=1e-10, atol=1e-10)


def bright(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Every pixel comes out above 1."""
    nn.init.constant_(vae.decoder.conv_out.bias, 5.0)
    return vae


def test_pixels_out_of_range_keep_their_gradient() -> None:
    vae = bright(tiny_vae())
    latents = noise(1, 4, 2, 2, 3).requires_grad_()
    pixels = decode_whole_clip(vae, latents)
    assert pixels.min() > 1
    [gradient] = torch.autograd.grad(pixels.square().sum(), latents)
    assert (gradient != 0).float().mean() > 0.9
    [clamped] = torch.autograd.grad(vae.decode(latents).sample.square().sum(), latents)
    assert (clamped == 0).all()  # what this form is there to avoid


@pytest.mark.parametrize("patch_size", [None, 2])
def test_checkpointed_gradients_equal_plain_ones(patch_size: int | None) -> None:
    vae, latents = tiny_vae(patch_size=patch_size), noise(2, 4, 3, 2, 3).requires_grad_()
    wanted = [latents, *(p for p in [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()])]
    outputs, gradients = [], []
    for checkpointed in (False, True):
        pixels = decode_whole_clip(vae, latents, checkpointed=checkpointed)
        outputs.append(pixels.detach())
        # The first frame skips the temporal convolutions of the last level only.
        gradients.append(torch.autograd.grad(pixels.square().sum(), wanted, allow_unused=True))
    assert torch.equal(*outputs)
    assert any(g is not None for g in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        if plain is None:
            assert recomputed is None
        else:
            torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-6)


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    vae, latents = tiny_vae().requires_grad_(False), noise(1, 4, 3, 4, 4).requires_grad_()
    kept = {}
    for checkpointed in (False, True):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.numel()), x)[1], lambda x: x):  # type: ignore[misc]
            decode_whole_clip(vae, latents, checkpointed=checkpointed)
        kept[checkpointed] = sum(sizes)
    assert kept[True] < kept[False] / 4


def test_the_codec_trains_what_made_the_latents_and_not_the_vae() -> None:
    codec = latent_space_of(bright(tiny_vae()))
    latents = noise(1, 4, 2, 2, 3).requires_grad_()
    video = codec.decode_differentiable(latents)
    assert video.shape == (1, 3, 5, 16, 24)
    assert video.min() > 1
    video.square().sum().backward()
    assert latents.grad is not None
    assert (latents.grad != 0).float().mean() > 0.9
    assert all(p.grad is None and not p.requires_grad for p in codec.parameters())
    torch.testing.assert_close(video.detach().clamp(-1, 1), codec.decode(latents))


def test_a_residual_vae_is_refused() -> None:
    vae = tiny_vae(patch_size=2, is_residual=True, decoder_base_dim=4)
    with pytest.raises(ValueError, match=r"Wan2\.2's residual blocks"):
        encode_whole_clip(vae, noise(1, 3, 1, 32, 32))
    with pytest.raises(ValueError, match=r"Wan2\.2's residual blocks"):
        decode_whole_clip(vae, noise(1, 4, 1, 2, 2))
