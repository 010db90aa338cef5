"""Whole frames in chunks of time against the whole-clip form: the same numbers, however the clip is cut."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import Tensor, nn

from luve_lightning.functional.frames.codec import FrameCodec, chunk_room
from luve_lightning.functional.pixels import video_to_frames
from luve_lightning.models.backbones import latent_space_of, wan_vae
from luve_lightning.models.backbones.wan_vae import decode_whole_clip, encode_whole_clip, frame_codec, suits
from tests.helpers.noise import noise
from tests.helpers.tiny_wan import in_float64
from tests.models.backbones.test_wan_whole_clip import LEVELS, tiny_vae


def streamed(vae: AutoencoderKLWan, latents: Tensor, at_once: int | None = None, finest: int | None = None) -> Tensor:
    codec = frame_codec(vae, latents.dtype)
    parts = torch.cat(list(codec.decode(latents, at_once, finest)), dim=1)
    return unpatchify(parts[None], vae.config.patch_size or 1)[0]


def farthest(tensor: Tensor, other: Tensor) -> float:
    """The greatest difference."""
    assert tensor.shape == other.shape
    return (tensor - other).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("patch_size", [None, 2])
@pytest.mark.parametrize("levels", LEVELS)
def test_equals_the_whole_clip_however_it_is_cut(levels: str, patch_size: int | None, dtype: torch.dtype) -> None:
    exact = in_float64(tiny_vae(levels, patch_size)).requires_grad_(False)
    vae = exact if dtype == torch.float64 else tiny_vae(levels, patch_size).requires_grad_(False)
    ratio = 2 ** len(LEVELS[levels][0]) * (patch_size or 1)
    for frames in (1, 5, 17):
        video = noise(1, 3, frames, 2 * ratio, 3 * ratio).to(dtype)
        latents = noise(1, 4, (frames - 1) // 4 + 1, 3, 2).to(dtype)
        moments, pixels = encode_whole_clip(vae, video)[0], decode_whole_clip(vae, latents)[0]
        assert moments.std() > 1e-2
        assert pixels.std() > 1e-2
        # How far float32 is from float64 on this machine. Both forms are, and the greatest of few numbers varies.
        off_moments = 8 * farthest(moments, encode_whole_clip(exact, video.double())[0]) + 1e-12
        off_pixels = 8 * farthest(pixels, decode_whole_clip(exact, latents.double())[0]) + 1e-12
        assert max(off_moments, off_pixels) < 1e-4
        for at_once in (1, 2, 5):
            got = frame_codec(vae, dtype).encode(patchify(video, patch_size or 1)[0], at_once)
            assert farthest(got, moments) < off_moments
            for finest in (None, 1, 3):
                assert farthest(streamed(vae, latents[0], at_once, finest), pixels) < off_pixels


def test_attention_in_the_encoders_levels_is_followed() -> None:
    vae = in_float64(tiny_vae(attn_scales=[0.5])).requires_grad_(False)
    video = noise(1, 3, 5, 16, 24).double()
    want = encode_whole_clip(vae, video)[0]
    torch.testing.assert_close(frame_codec(vae, torch.float64).encode(video[0], 1), want, rtol=1e-10, atol=1e-10)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU and small clips use what a GPU uses for large ones."""
    monkeypatch.setattr(wan_vae, "suits", lambda *_: True)
    monkeypatch.setattr(wan_vae, "WHOLE_CLIP_PIXELS", 0)


@pytest.mark.usefixtures("always")
def test_the_codec_encodes_and_decodes_batches_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = latent_space_of(in_float64(tiny_vae()))  # what it returns is rounded to float32
    video, latents = noise(3, 3, 9, 16, 24), noise(3, 4, 3, 2, 3)
    encoded, decoded = codec.encode(video), codec.decode(latents)
    floats, frames = torch.empty_like(decoded), torch.empty(3, 9, 16, 24, 3, dtype=torch.uint8)
    assert codec.decode(latents, out=floats) is floats
    assert torch.equal(floats, decoded)
    assert torch.equal(codec.decode(latents, out=frames), video_to_frames(decoded))
    assert encoded.dtype == decoded.dtype == torch.float32
    with pytest.raises(ValueError, match="for 2 clips; the latents are of 3"):
        codec.decode(latents, out=floats[:2])
    with pytest.raises(ValueError, match="expected floating point 3 x 3 x 9 x 16 x 24"):
        codec.decode(latents, out=floats[:, :, 1:])
    monkeypatch.setattr(wan_vae, "suits", lambda *_: False)
    monkeypatch.setattr(wan_vae, "WHOLE_CLIP_PIXELS", 2**22)
    torch.testing.assert_close(encoded, codec.encode(video), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(decoded, codec.decode(latents), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("always")
def test_changed_weights_are_used() -> None:
    codec = latent_space_of(tiny_vae())
    video = noise(1, 3, 5, 16, 24)
    before = codec.encode(video)
    nn.init.constant_(codec.vae.quant_conv.bias, 3.0)
    assert (codec.encode(video) - before).abs().min() > 1
    codec.double()
    assert codec._streamed is None


@pytest.mark.usefixtures("always")
def test_the_precision_is_that_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = latent_space_of(tiny_vae())
    used: list[torch.dtype] = []

    def watched(vae: AutoencoderKLWan, dtype: torch.dtype) -> FrameCodec:
        used.append(dtype)
        return frame_codec(vae, dtype)

    monkeypatch.setattr(wan_vae, "frame_codec", watched)
    video = noise(1, 3, 5, 16, 24)
    exact = codec.encode(video)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = codec.encode(video)
    assert used == [torch.float32, torch.bfloat16]
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.05


def test_bfloat16_is_nearer_to_float32_than_diffusers_own() -> None:
    exact = tiny_vae(base_dim=16, num_res_blocks=2).bfloat16().float().requires_grad_(False)
    half = tiny_vae(base_dim=16, num_res_blocks=2).bfloat16().requires_grad_(False)
    video, latents = noise(1, 3, 9, 32, 48), noise(1, 4, 3, 4, 6)
    with torch.no_grad():
        moments, pixels = exact.encode(video).latent_dist.parameters, decode_whole_clip(exact, latents)
        plain_moments = half.encode(video.bfloat16()).latent_dist.parameters
        plain_pixels = decode_whole_clip(half, latents.bfloat16())
    ours = frame_codec(half, torch.bfloat16)
    pairs = [(ours.encode(video[0]), plain_moments, moments)]
    pairs.append((torch.cat(list(ours.decode(latents[0])), dim=1), plain_pixels, pixels))
    for got, plain, want in pairs:
        error = (got.float() - want[0]).norm() / want.norm()
        assert 0 < error < (plain.float() - want).norm() / want.norm()


def test_chunks_follow_memory_alone() -> None:
    stream = frame_codec(tiny_vae(base_dim=96, num_res_blocks=1), torch.bfloat16)
    lengths = [stream.at_once(8 * n, 16 * n, decoding) for decoding in (False, True) for n in (20, 60, 100, 180, 270)]
    assert lengths[:5] == sorted(lengths[:5], reverse=True)
    assert lengths[5:] == sorted(lengths[5:], reverse=True)
    assert lengths[4] == lengths[9] == 1  # 4K
    assert min(lengths[0], lengths[5]) >= 13  # 49 small frames in one


def test_chunks_shorten_to_what_is_free() -> None:
    stream = frame_codec(tiny_vae(base_dim=96, num_res_blocks=1), torch.bfloat16)
    size, gib = (1472, 2560), 2**30
    for decoding in (False, True):
        lengths = [stream.at_once(*size, decoding, room * gib) for room in (80, 40, 30, 20, 10, 0)]
        assert lengths[0] == lengths[1] == stream.at_once(*size, decoding)
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] > lengths[-1] == 1
    assert stream.finest_at_once(2176, 3840, 3, 0) == 12
    assert [stream.finest_at_once(2176, 3840, 1, room * gib) for room in (80, 45, 44, 10)] == [2, 2, 1, 1]


def test_room_is_what_is_free_after_what_pytorch_only_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    gib, emptied = 2**30, []
    state = {"free": 60 * gib, "held": 10 * gib}  # 80 in all, 10 in use

    def empty() -> None:
        emptied.append(True)
        state["free"] += state["held"] // 2  # the rest lies in pieces
        state["held"] //= 2

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (state["free"], 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * gib + state["held"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * gib)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    cuda = torch.device("cuda")
    assert chunk_room(cuda) == pytest.approx(0.75 * 70 * gib)
    assert not emptied, "clip after clip, PyTorch's own store is used"
    state["free"] = 30 * gib
    assert chunk_room(cuda) == pytest.approx(0.75 * 35 * gib)
    assert emptied == [True]
    assert chunk_room(torch.device("cpu")) == chunk_room(torch.device("meta")) == float("inf")


def test_where_it_is_used() -> None:
    cuda = torch.device("cuda")
    vae = tiny_vae(base_dim=8)
    assert not suits(vae, torch.device("cpu"), torch.bfloat16)
    assert suits(vae, torch.device("meta"), torch.bfloat16)
    assert not suits(vae, cuda, torch.float64)
    assert not suits(tiny_vae(base_dim=4), cuda, torch.bfloat16)
    residual = tiny_vae(base_dim=8, patch_size=2, is_residual=True, decoder_base_dim=8)
    assert not suits(residual, cuda, torch.bfloat16)
    with pytest.raises(ValueError, match=r"Wan2\.2's residual blocks"):
        frame_codec(residual, torch.bfloat16)


@pytest.mark.parametrize("patch_size", [None, 2])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("frames", [1, 3])
def test_gradients_equal_autograds(frames: int, levels: str, patch_size: int | None) -> None:
    vae = in_float64(tiny_vae(levels, patch_size)).requires_grad_(False)
    latents = noise(1, 4, frames, 3, 2).double().requires_grad_()
    found: list[list[Tensor]] = []
    for decode in (
        lambda z: decode_whole_clip(vae, z),
        lambda z: unpatchify(frame_codec(vae, z.dtype).decode_differentiable(z[0])[None], patch_size or 1),
    ):
        pixels = decode(latents)
        weights = noise(*pixels.shape).double()
        found.append([pixels.detach(), *torch.autograd.grad((pixels * weights).sum(), latents)])
    assert found[0][1].std() > 1e-2
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_the_codec_takes_gradients_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = latent_space_of(in_float64(tiny_vae()))
    latents = noise(3, 4, 2, 2, 3).requires_grad_()
    plain = codec.decode_differentiable(latents)
    [want] = torch.autograd.grad(plain.square().sum(), latents)
    monkeypatch.setattr(wan_vae, "suits", lambda *_: True)
    pixels = codec.decode_differentiable(latents)
    torch.testing.assert_close(pixels, plain, rtol=1e-10, atol=1e-10)
    [got] = torch.autograd.grad(pixels.square().sum(), latents)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # float32, as the latents are
    with torch.no_grad():
        assert torch.equal(codec.decode_differentiable(latents), pixels)
    assert all(p.grad is None and not p.requires_grad for p in codec.parameters())


@pytest.mark.usefixtures("always")
def test_validation_in_inference_mode_leaves_gradients_possible() -> None:
    codec = latent_space_of(tiny_vae())
    latents = noise(1, 4, 2, 2, 3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):  # other weights than the VAE's own
        with torch.inference_mode():
            codec.decode(latents.detach())
        [before] = torch.autograd.grad(codec.decode_differentiable(latents).sum(), latents)
        with torch.inference_mode():
            codec.decode(latents.detach())
        [after] = torch.autograd.grad(codec.decode_differentiable(latents).sum(), latents)
    assert torch.equal(before, after)
