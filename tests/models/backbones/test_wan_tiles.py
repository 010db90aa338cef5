"""Tiles against the untiled VAE: the same numbers, without seams, whatever the tile."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from luve_lightning.functional.pixels import video_to_frames
from luve_lightning.models.backbones import latent_space_of, load_backbone
from luve_lightning.models.backbones.wan_tiles import (
    Layer,
    TileRun,
    decode_tiled,
    decoder_layers,
    encode_tiled,
    encoder_layers,
    frame_sizes,
    spread,
    times,
    trace,
)
from luve_lightning.models.backbones.wan_vae import decode_whole_clip
from tests.helpers.live_memory import LiveMemory
from tests.helpers.noise import noise
from tests.helpers.tiny_wan import in_float64

MINI = Path(__file__).resolve().parents[3] / "data" / "mini" / "wan"
SMALL = {"base_dim": 4, "z_dim": 4, "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.1, 0.9, 1.2, 0.8]}
CONFIGS: dict[str, dict[str, Any]] = {
    "real blocks, few channels": {"base_dim": 4},
    "three levels": SMALL | {"num_res_blocks": 1, "dim_mult": [1, 2, 2, 2]},
    "two levels, patches": SMALL
    | {"num_res_blocks": 1, "dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "patch_size": 2}
    | {"in_channels": 12, "out_channels": 12},
    "another decoder": SMALL | {"decoder_base_dim": 6, "num_res_blocks": 1, "dim_mult": [1, 1, 2, 2]},
}
SIZES = [
    # batch, latent frames, height and width, tile
    pytest.param(3, 1, (3, 5), (2, 3), id="one frame, three clips, thin tiles"),
    pytest.param(1, 2, (9, 3), (4, 4), id="tiles do not divide the frame"),
    pytest.param(1, 3, (1, 6), (1, 1), id="tiles of one latent"),
    pytest.param(1, 5, (2, 7), (8, 3), id="17 frames, tile higher than the frame"),
    pytest.param(1, 2, (4, 3), (64, 64), id="one tile"),
]


@cache
def vae_of(name: str) -> AutoencoderKLWan:
    """Random weights with every bias and norm in use, or the mini backbone's VAE."""
    if name == "mini":
        return load_backbone(MINI).vae()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(**CONFIGS[name]).eval()
        for key, parameter in vae.named_parameters():
            if key.endswith(("bias", "gamma")):
                nn.init.normal_(parameter, mean=float(key.endswith("gamma")), std=0.1)
        # The attention of random weights hardly tells places apart; a trained one does.
        for net in (vae.encoder, vae.decoder):
            net.mid_block.attentions[0].to_qkv.weight.data *= 4
    return vae


@cache
def in_double(name: str) -> AutoencoderKLWan:
    """The same weights in float64, where only the order of sums differs: a bound that no rounding reaches."""
    return in_float64(vae_of(name))


def latents_for(vae: AutoencoderKLWan, batch: int, frames: int, size: tuple[int, int]) -> Tensor:
    return noise(batch, vae.config.z_dim, frames, *size)


def video_for(batch: int, latent_frames: int, size: tuple[int, int]) -> Tensor:
    return noise(batch, 3, 4 * latent_frames - 3, 8 * size[0], 8 * size[1]).tanh()


@pytest.mark.parametrize(("batch", "frames", "size", "tile"), SIZES)
@pytest.mark.parametrize("name", [*CONFIGS, "mini"])
def test_equals_untiled(name: str, batch: int, frames: int, size: tuple[int, int], tile: tuple[int, int]) -> None:
    vae = in_double(name)
    latents, video = latents_for(vae, batch, frames, size).double(), video_for(batch, frames, size).double()
    with torch.no_grad():
        untiled, moments = vae.decode(latents).sample, vae.encode(video).latent_dist.parameters
    assert untiled.std() > 0.03
    assert moments.std() > 0.03
    torch.testing.assert_close(decode_tiled(vae, latents, tile), untiled, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(encode_tiled(vae, video, tile), moments, rtol=1e-10, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(
    frames=st.integers(1, 3),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    tile=st.tuples(st.integers(1, 14), st.integers(1, 14)),
)
def test_any_size_and_tile(frames: int, size: tuple[int, int], tile: tuple[int, int]) -> None:
    vae = in_double("two levels, patches")
    latents = latents_for(vae, 1, frames, size).double()
    with torch.no_grad():
        whole = decode_whole_clip(vae, latents)
    tiled = decode_tiled(vae, latents, tile)
    torch.testing.assert_close(tiled, whole.clamp(-1, 1), rtol=1e-10, atol=1e-10)
    moments = encode_tiled(vae, whole, tile)
    torch.testing.assert_close(moments, encode_tiled(vae, whole, size), rtol=1e-10, atol=1e-10)


@given(size=st.integers(1, 500), tile=st.integers(1, 600))
def test_parts_cover_the_frame_and_are_equal(size: int, tile: int) -> None:
    parts = spread(size, tile)
    assert (parts[0][0], parts[-1][1]) == (0, size)
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    lengths = [stop - start for start, stop in parts]
    assert max(lengths) <= tile
    assert max(lengths) - min(lengths) <= 1
    assert len(parts) == -(-size // tile)


@pytest.mark.parametrize("coder", ["decoder", "encoder"])
def test_the_halo_is_just_wide_enough(coder: str) -> None:
    """Each row and column of a tile's input matters to the tile, and the next ones outside do not."""
    vae = vae_of("real blocks, few channels")
    if coder == "decoder":
        layers, size, channels = decoder_layers(vae)[1], 24, 16
        wanted = times((11, 12), 8)
    else:
        layers, size, channels = encoder_layers(vae)[0], 96, 3
        wanted = (6, 7)
    spans = trace(layers, wanted, size)
    assert 0 < spans[0][0] < spans[0][1] < size  # not cut by the frame
    x = noise(1, channels, 1, size, size).requires_grad_()
    everything = [(0, n) for n in frame_sizes(layers, size)]
    y = TileRun(layers, everything, everything)(x)
    [gradient] = torch.autograd.grad(y[..., slice(*wanted), slice(*wanted)].square().sum(), x)
    seen = gradient[0, :, 0].abs().sum(0)
    for axis in (0, 1):
        places = seen.sum(axis).nonzero().flatten().tolist()
        assert (places[0], places[-1] + 1) == spans[0]


def seam(untiled: Tensor, tiled: Tensor) -> float:
    """Greatest difference to the untiled video."""
    return (tiled - untiled).abs().max().item()


@pytest.mark.parametrize("name", ["real blocks, few channels", "mini"])
def test_diffusers_tiles_leave_seams_and_ours_do_not(name: str) -> None:
    vae = in_double(name)
    latents = latents_for(vae, 1, 2, (10, 12)).double()
    with torch.no_grad():
        untiled = vae.decode(latents).sample
        vae.enable_tiling(64, 64, 48, 48)  # pixels: 8x8 latents, two of them blended
        try:
            theirs = vae.decode(latents).sample
        finally:
            vae.disable_tiling()
    assert seam(untiled, theirs) > 1e-2
    assert seam(untiled, decode_tiled(vae, latents, (8, 8))) < 1e-10


def test_bfloat16_differs_no_more_than_its_rounding() -> None:
    vae, exact = AutoencoderKLWan(**CONFIGS["three levels"]).eval(), vae_of("three levels")
    vae.load_state_dict(exact.state_dict())
    vae = vae.to(torch.bfloat16)
    latents = latents_for(vae, 1, 2, (6, 7))
    with torch.no_grad():
        precise, untiled = exact.decode(latents).sample, vae.decode(latents.bfloat16()).sample
    tiled = decode_tiled(vae, latents, (4, 4))
    assert tiled.dtype == torch.bfloat16
    rounding = (untiled.float() - precise).abs()
    assert 0 < (tiled.float() - precise).abs().mean() < 1.2 * rounding.mean()
    assert (tiled.float() - untiled.float()).abs().max() < 1.5 * rounding.max()


def test_repeats_to_the_bit_and_in_threads() -> None:
    """Nothing is kept on the VAE, whose own cache two threads would mix up."""
    vae = vae_of("three levels")
    clips = [latents_for(vae, 1, 3, size) for size in ((5, 6), (4, 9))]
    alone = [decode_tiled(vae, clip, (3, 3)) for clip in clips]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda clip: decode_tiled(vae, clip, (3, 3)), clips * 2))
    for one, other in zip(alone * 2, together, strict=True):
        assert torch.equal(one, other)


def test_writes_where_it_is_told() -> None:
    vae = vae_of("two levels, patches")
    latents = latents_for(vae, 2, 2, (3, 5))
    video = decode_tiled(vae, latents, (2, 2))
    half = torch.empty(2, 3, 5, 24, 40, dtype=torch.float16)
    assert decode_tiled(vae, latents, (2, 2), out=half) is half
    assert torch.equal(half, video.half())
    frames = torch.empty(2, 5, 24, 40, 3, dtype=torch.uint8)
    assert torch.equal(decode_tiled(vae, latents, (2, 2), out=frames), video_to_frames(video))


def test_an_offloaded_vae_is_fetched() -> None:
    """What accelerate's hook does before `vae.decode` happens here too."""
    vae, fetched = vae_of("three levels"), []
    vae._hf_hook = SimpleNamespace(pre_forward=fetched.append)
    try:
        decode_tiled(vae, latents_for(vae, 1, 1, (1, 1)))
        encode_tiled(vae, video_for(1, 1, (1, 1)))
    finally:
        del vae._hf_hook
    assert fetched == [vae, vae]


def test_the_codec_goes_in_tiles_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the codec makes in float64 differs by the rounding of its results to float32: an eps of values around 1.
    codec = latent_space_of(copy.deepcopy(in_double("three levels")))  # a copy: the codec lays out weights anew
    latents, video = noise(2, 4, 2, 5, 6), video_for(2, 2, (5, 6))
    untiled, encoded = codec.decode(latents), codec.encode(video)
    for tile in ((2, 3), (5, 6), (9, 2)):
        codec.tile = tile
        torch.testing.assert_close(codec.decode(latents), untiled, rtol=0, atol=1e-6)
        torch.testing.assert_close(codec.encode(video), encoded, rtol=0, atol=1e-6)
    codec.tile = (5, 6)  # the frame is no larger: as without
    assert torch.equal(codec.decode(latents), untiled)
    frames = torch.empty(2, 5, 40, 48, 3, dtype=torch.uint8)
    assert codec.decode(latents, out=frames) is frames
    assert (frames.int() - video_to_frames(untiled).int()).abs().max() <= 1
    with pytest.raises(ValueError, match="out: for 2 clips; the latents are of 1"):
        codec.decode(latents[:1], out=frames)
    # A halo that lacks one row and column is far outside the bound.
    needed = Layer.needed
    monkeypatch.setattr(Layer, "needed", lambda layer, *args: needed(replace(layer, reach=min(layer.reach, 1)), *args))
    codec.tile = (2, 3)
    assert seam(untiled, codec.decode(latents)) > 1e-2
    assert seam(encoded, codec.encode(video)) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("coder", ["decode", "encode"])
def test_tiles_save_memory_in_the_real_vae(coder: str) -> None:
    """Tensors alive, counted on the meta device where nothing is computed."""
    with torch.device("meta"):
        vae = AutoencoderKLWan().eval()
        latents, video = torch.empty(1, 16, 3, 26, 44), torch.empty(1, 3, 9, 208, 352)
        out = torch.empty_like(video)
    sizes: dict[str, int] = {}
    for name, tile in (("tiles", (26, 22)), ("whole", (26, 44))):
        with LiveMemory() as memory:
            if coder == "decode":
                decode_tiled(vae, latents, tile, out=out)
            else:
                encode_tiled(vae, video, tile)
        sizes[name] = memory.peak
    assert sizes["tiles"] < 0.7 * sizes["whole"]


def test_what_is_refused() -> None:
    vae = vae_of("three levels")
    with pytest.raises(ValueError, match="tile 0x4: expected at least 1x1 latents"):
        decode_tiled(vae, noise(1, 4, 1, 4, 4), (0, 4))
    with pytest.raises(ValueError, match=r"out: torch.float32 1 x 3 x 1 x 8 x 8; expected .* 1 x 3 x 1 x 32 x 32"):
        decode_tiled(vae, noise(1, 4, 1, 4, 4), out=torch.empty(1, 3, 1, 8, 8))
    for shape in ((1, 3, 4, 16, 16), (1, 3, 5, 16, 20), (1, 3, 5, 0, 16)):
        with pytest.raises(ValueError, match=r"expected 4k \+ 1 frames, height and width multiples of 8"):
            encode_tiled(vae, torch.zeros(shape))
    attentive = AutoencoderKLWan(**SMALL, attn_scales=[0.5])
    with pytest.raises(ValueError, match=r"WanAttentionBlock outside the VAE's mid block"):
        encode_tiled(attentive, torch.zeros(1, 3, 1, 16, 16))
    residual = {"is_residual": True, "decoder_base_dim": 4, "patch_size": 2}
    wan22 = AutoencoderKLWan(**SMALL, **residual, in_channels=12, out_channels=12)
    for refused in (
        lambda: decode_tiled(wan22, noise(1, 4, 1, 2, 2)),
        lambda: encode_tiled(wan22, noise(1, 3, 1, 32, 32)),
    ):
        with pytest.raises(ValueError, match=r"Wan2\.2's residual blocks"):
            refused()
