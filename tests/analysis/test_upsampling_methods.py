"""The baselines of the comparison."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from luve_lightning.analysis.upsampling_methods import (
    BASELINES,
    CEILING,
    baseline_methods,
    method_names,
    rgb_bicubic,
)
from luve_lightning.functional.interpolation import interpolate_latents
from luve_lightning.functional.resize import resize_video
from luve_lightning.models.backbone import LatentCodec


@pytest.fixture(scope="module")
def codec(tiny_backbone: Path) -> LatentCodec:
    return LatentCodec.from_pretrained(tiny_backbone)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_names_and_their_order() -> None:
    assert method_names() == ["vluer", "nearest", "bilinear", "bicubic", "rgb_bicubic", "vae"]
    assert method_names(["vluer_shipped"])[:3] == ["vluer", "vluer_shipped", "nearest"]
    assert (*BASELINES, CEILING) == ("nearest", "bilinear", "bicubic", "rgb_bicubic", "vae")


@pytest.mark.parametrize("extra", [["vae"], ["vluer"], ["a", "bilinear", "nearest"]])
def test_a_taken_name_is_refused(extra: list[str]) -> None:
    with pytest.raises(ValueError, match="has a method of that name already"):
        method_names(extra)


def test_latent_interpolations_are_the_functional_ones(codec: LatentCodec) -> None:
    methods, latents, size = baseline_methods(codec), noise(1, 16, 2, 2, 3), (2, 3, 6)
    assert tuple(methods) == BASELINES
    for mode in ("nearest", "bilinear", "bicubic"):
        assert torch.equal(methods[mode](latents, size), interpolate_latents(latents, size, mode))


@pytest.mark.parametrize("size", [(2, 3, 6), (2, 2, 3), (3, 4, 4)])
def test_rgb_bicubic_decodes_resizes_and_encodes(codec: LatentCodec, size: tuple[int, int, int]) -> None:
    latents = noise(1, 16, 2, 2, 3)
    got = rgb_bicubic(codec, latents, size)
    assert got.shape == (1, 16, *size)
    with torch.no_grad():
        video = codec.vae.decode(codec.denormalize(latents)).sample
        video = resize_video(video, (8 * size[1], 8 * size[2]))
        video = F.interpolate(video, size=(4 * size[0] - 3, *video.shape[3:]), mode="trilinear")
        want = codec.normalize(codec.vae.encode(video).latent_dist.mode())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(baseline_methods(codec)["rgb_bicubic"](latents, size), got)
