"""The latent codec on a tiny real VAE: sizes, normalisation, passes, and what a missing backbone says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from luve_lightning.models.backbones import LatentSpace, latent_space_of, load_backbone, wan_vae
from tests.helpers.noise import noise
from tests.helpers.tiny_wan import in_float64


@pytest.fixture(scope="module")
def codec(tiny_backbone: Path) -> LatentSpace:
    return load_backbone(tiny_backbone).latent_space()


def test_the_facts_of_wan(codec: LatentSpace) -> None:
    assert (codec.channels, codec.spatial_ratio, codec.temporal_ratio) == (16, 8, 4)
    assert codec.dtype == torch.float32
    assert codec.latent_size(49, 720, 1280) == (13, 90, 160)
    assert codec.latent_size(49, 2176, 3840) == (13, 272, 480)


@settings(max_examples=100, deadline=None)
@given(t=st.integers(1, 30), h=st.integers(1, 300), w=st.integers(1, 500))
def test_sizes_there_and_back(codec: LatentSpace, t: int, h: int, w: int) -> None:
    frames, height, width = codec.pixel_size(t, h, w)
    assert codec.latent_size(frames, height, width) == (t, h, w)


@settings(max_examples=100, deadline=None)
@given(frames=st.integers(-3, 60), height=st.integers(-9, 200), width=st.integers(1, 200))
def test_sizes_that_the_vae_would_crop_are_refused(codec: LatentSpace, frames: int, height: int, width: int) -> None:
    possible = frames >= 1 and frames % 4 == 1 and height >= 8 and height % 8 == 0 and width >= 8 and width % 8 == 0
    if possible:
        assert codec.pixel_size(*codec.latent_size(frames, height, width)) == (frames, height, width)
        return
    with pytest.raises(ValueError, match="nearest are") as error:
        codec.latent_size(frames, height, width)
    text = str(error.value)
    name = "frames" if "frames" in text else text.split()[0]
    wrong = {"frames": frames, "height": height, "width": width}[name]
    low, high = (int(word) for word in text.split("nearest are ")[1].split(" and "))
    # They are possible, and neighbours on both sides, or the two smallest.
    for n in (low, high):
        codec.latent_size(*({"frames": 5, "height": 16, "width": 16} | {name: n}).values())
    assert high - low == (4 if name == "frames" else 8)
    assert low < wrong < high or wrong < low in (1, 8)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((7, 64, 64), "7 frames: expected 4k + 1, nearest are 5 and 9"),
        ((0, 64, 64), "0 frames: expected 4k + 1, nearest are 1 and 5"),
        ((5, 1080, 1920), None),
        ((5, 1084, 1920), "height 1084: expected a multiple of 8, nearest are 1080 and 1088"),
        ((5, 64, 3), "width 3: expected a multiple of 8, nearest are 8 and 16"),
    ],
)
def test_messages_of_refused_sizes(codec: LatentSpace, size: tuple[int, int, int], message: str | None) -> None:
    if message is None:
        assert codec.latent_size(*size) == (2, 135, 240)
    else:
        with pytest.raises(ValueError) as error:
            codec.latent_size(*size)
        assert str(error.value) == message


def test_encoding_refuses_what_the_vae_would_crop(codec: LatentSpace) -> None:
    with pytest.raises(ValueError, match="nearest are 16 and 24"):
        codec.encode(noise(1, 3, 5, 20, 16))
    with pytest.raises(ValueError, match="nearest are 5 and 9"):
        codec.encode(noise(1, 3, 6, 16, 16))


def test_normalisation_is_that_of_the_config_and_goes_back(codec: LatentSpace) -> None:
    z = noise(2, 16, 3, 5, 7) * 4
    normal = codec.normalize(z)
    for channel in range(16):
        mean, std = codec.vae.config.latents_mean[channel], codec.vae.config.latents_std[channel]
        torch.testing.assert_close(normal[:, channel], (z[:, channel] - mean) / std)
    torch.testing.assert_close(codec.denormalize(normal), z, rtol=1e-6, atol=1e-6)
    assert codec.normalize(z.bfloat16()).dtype == torch.float32


@pytest.fixture
def exact(codec: LatentSpace) -> LatentSpace:
    """It computes in float64; what it returns is rounded to float32."""
    return latent_space_of(in_float64(codec.vae))


def test_encodes_the_mode_and_decodes_it(exact: LatentSpace) -> None:
    codec, video = exact, noise(2, 3, 5, 16, 24).clamp(-1, 1).double()
    latents = codec.encode(video)
    assert latents.shape == (2, 16, 2, 2, 3)
    with torch.no_grad():
        mode = codec.vae.encode(video).latent_dist.mode()
        torch.testing.assert_close(latents, codec.normalize(mode.float()), rtol=1e-6, atol=1e-6)
        want = codec.vae.decode(codec.denormalize(latents).double()).sample.float()
    torch.testing.assert_close(codec.decode(latents), want, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_decoded_pixels_are_clamped(tiny_backbone: Path) -> None:
    codec = load_backbone(tiny_backbone).latent_space()
    nn.init.constant_(codec.vae.decoder.conv_out.bias, -3.0)
    assert codec.decode(noise(1, 16, 1, 2, 2)).max() == -1
    assert codec.decode_differentiable(noise(1, 16, 1, 2, 2)).max() < -1


def test_one_pass_parts_and_chunks_agree(exact: LatentSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = exact
    video = noise(3, 3, 9, 16, 16).clamp(-1, 1)
    latents = noise(3, 16, 3, 2, 2)
    encoded, decoded = codec.encode(video), codec.decode(latents)
    clip = 9 * 16 * 16
    for limit, at_once in ((2 * clip, 2), (clip, 1), (clip - 1, 1)):  # the last: no clip fits, chunk by chunk
        monkeypatch.setattr(wan_vae, "WHOLE_CLIP_PIXELS", limit)
        assert codec.clips_at_once(9, 16, 16) == at_once
        torch.testing.assert_close(codec.encode(video), encoded, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(codec.decode(latents), decoded, rtol=1e-6, atol=1e-6)


def test_bfloat16_weights_with_single_precision_latents(tiny_backbone: Path, codec: LatentSpace) -> None:
    half = load_backbone(tiny_backbone).latent_space(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.latents_mean.dtype == torch.float32
    video = noise(1, 3, 5, 16, 16).clamp(-1, 1)
    latents = half.encode(video)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, codec.encode(video), rtol=0.05, atol=0.05)
    decoded = half.decode(latents)
    assert decoded.dtype == torch.float32
    # Thirty roundings to 2^-9 in turn: their deviation is 0.0075, and the greatest of 3,840 is seven times that.
    off = (decoded - codec.decode(latents)).abs()
    assert off.mean() < 0.01
    assert off.max() < 0.1


@pytest.mark.slow
def test_weights_are_laid_out_anew_when_they_move(tiny_backbone: Path) -> None:
    codec = load_backbone(tiny_backbone).latent_space()
    holder = nn.ModuleDict({"codec": codec})
    values = codec.vae.decoder.conv_out.weight.detach().clone(memory_format=torch.contiguous_format)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        holder.to(dtype)
        assert codec.vae.decoder.conv_out.weight.is_contiguous(memory_format=torch.channels_last_3d)
        assert not codec.vae.decoder.conv_out.weight.is_contiguous()
    torch.testing.assert_close(codec.vae.decoder.conv_out.weight, values, rtol=0.01, atol=0)
    holder.to("meta")  # stands for a device that is no CPU
    assert codec.vae.decoder.conv_out.weight.is_contiguous()


def test_stays_frozen_and_in_eval_mode_inside_a_training_module(codec: LatentSpace) -> None:
    nn.ModuleDict({"codec": codec}).train()
    assert not any(module.training for module in codec.modules())
    assert not any(p.requires_grad for p in codec.parameters())
    assert not codec.encode(noise(1, 3, 1, 8, 8)).requires_grad
    assert not any(name.startswith("latents_") for name in codec.state_dict())


def test_the_fingerprint_follows_weights_and_config(tiny_backbone: Path, tmp_path: Path) -> None:
    codec = load_backbone(tiny_backbone).latent_space()
    first = codec.fingerprint()
    assert len(first) == 64
    assert load_backbone(str(tiny_backbone)).latent_space().fingerprint() == first
    parameter = codec.vae.decoder.conv_out.weight
    with torch.no_grad():
        parameter[0, 1, 1, 2, 0] += 1e-3
    changed = codec.fingerprint()
    assert changed != first
    with torch.no_grad():
        parameter[0, 1, 1, 2, 0] -= 1e-3
    codec.vae.register_to_config(latents_mean=[0.5] * 16)
    assert codec.fingerprint() not in (first, changed)


def test_the_fingerprint_is_of_the_numbers_not_of_the_dtype(tiny_backbone: Path, tmp_path: Path) -> None:
    vae = load_backbone(tiny_backbone).vae(torch.float16)
    vae.save_pretrained(tmp_path / "vae")
    saved = latent_space_of(vae).fingerprint()
    assert load_backbone(tmp_path).latent_space().fingerprint() == saved  # float32 again
    assert load_backbone(tmp_path).latent_space(torch.float16).fingerprint() == saved
    assert load_backbone(tiny_backbone).latent_space().fingerprint() != saved  # before rounding to float16


def test_loads_in_single_precision_unless_told(tiny_backbone: Path, tmp_path: Path) -> None:
    load_backbone(tiny_backbone).vae(torch.float16).save_pretrained(tmp_path / "vae")
    assert next(load_backbone(tmp_path).vae().parameters()).dtype == torch.float32


def message(name: str | Path) -> str:
    with pytest.raises(FileNotFoundError) as error:
        load_backbone(name).vae()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_backbone_is_one_clear_line(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert message(tmp_path / "none") == (
        f"backbone {tmp_path / 'none'}: no such folder; expected a diffusers pipeline folder or a hub id"
    )
    assert "no such folder; expected" in message("./none")
    assert "no such folder; expected" in message("data/mini/none")
    assert (
        message(tmp_path) == f"backbone {tmp_path}: no model_index.json there, nor transformer/config.json; "
        "expected a diffusers pipeline folder or a transformer's own"
    )
    # The form of a hub id, and the hub cannot be reached (conftest.py).
    assert message("nobody/nothing").startswith(
        "backbone nobody/nothing: no such folder, and its model_index.json is not available from the hub: "
    )
    # A folder of that form is a folder.
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_backbone, tmp_path / "nobody" / "nothing")
    assert isinstance(load_backbone("nobody/nothing").vae(), AutoencoderKLWan)


def test_a_broken_backbone_is_one_clear_line(tiny_backbone: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_backbone, tmp_path, dirs_exist_ok=True)
    for weights in (tmp_path / "vae").glob("*.safetensors"):
        weights.unlink()
    assert message(tmp_path).startswith(f"backbone {tmp_path}: cannot load its vae/: ")
