"""The methods of upsampling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from luve_lightning.cascade.upsampling import LooseModels, baselines, upsampling_method, upsampling_methods
from luve_lightning.functional.interpolation import interpolate_latents
from luve_lightning.functional.pixels import resize_video
from luve_lightning.models.backbones import LatentSpace, load_backbone
from tests.helpers.upsampling import tiny_vluer


@pytest.fixture(scope="module")
def codec(tiny_backbone: Path) -> LatentSpace:
    return load_backbone(tiny_backbone).latent_space()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_names_and_their_order() -> None:
    papers = ["nearest", "bilinear", "bicubic", "rgb_bicubic"]
    assert [name for name in baselines() if name in papers] == papers
    assert set(upsampling_methods()) == {*baselines(), "latent", "rgb", "vluer"}
    for name, paper in (("bilinear", "latent"), ("rgb_bicubic", "rgb")):
        assert upsampling_method(name) == upsampling_method(paper)
    with pytest.raises(ValueError, match=r"^upsampling: expected one of .*nearest, .*, got 'lanczos'$"):
        upsampling_method("lanczos")


def test_latent_interpolations_are_the_functional_ones(codec: LatentSpace) -> None:
    latents, size = noise(1, 16, 2, 2, 3), (2, 3, 6)
    for mode in ("nearest", "bilinear", "bicubic"):
        got = upsampling_method(mode)(latents, size, LooseModels(codec))
        assert torch.equal(got, interpolate_latents(latents, size, mode))


@pytest.mark.parametrize("size", [(2, 3, 6), (2, 2, 3), (3, 4, 4)])
def test_rgb_bicubic_decodes_resizes_and_encodes(codec: LatentSpace, size: tuple[int, int, int]) -> None:
    latents = noise(1, 16, 2, 2, 3)
    got = upsampling_method("rgb_bicubic")(latents, size, LooseModels(codec))
    assert got.shape == (1, 16, *size)
    with torch.no_grad():
        video = codec.vae.decode(codec.denormalize(latents)).sample
        video = resize_video(video, (8 * size[1], 8 * size[2]))
        video = F.interpolate(video, size=(4 * size[0] - 3, *video.shape[3:]), mode="trilinear")
        want = codec.normalize(codec.vae.encode(video).latent_dist.mode())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_vluer_upsamples_and_is_asked_for(codec: LatentSpace) -> None:
    latents, vluer = noise(1, 16, 2, 2, 3), tiny_vluer().eval()
    upsample = upsampling_method("vluer").of(LooseModels(codec, vluer))
    assert torch.equal(upsample(latents, (2, 3, 6)), vluer(latents, (2, 3, 6)))
    with pytest.raises(ValueError, match="there is no VLUer"):
        upsampling_method("vluer")(latents, (2, 3, 6), LooseModels(codec))
