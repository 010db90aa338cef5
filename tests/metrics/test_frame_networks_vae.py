"""Features of a VAE's encoder, against the encoder run layer by layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luve_lightning.datamodules.base import vae_fingerprint
from luve_lightning.functional.patches import PatchPlan
from luve_lightning.metrics.frame_networks import VAEFeatures
from luve_lightning.metrics.frechet_patch import FrechetPatchDistance
from luve_lightning.models.backbones import load_backbone
from tests.helpers.patch_features import stub_video


@pytest.fixture(scope="module")
def extractor(tiny_backbone: Path) -> VAEFeatures:
    features = VAEFeatures(tiny_backbone)
    features.prepare("cpu")
    return features


def test_features_are_the_input_of_the_last_convolution_averaged(extractor: VAEFeatures, tiny_backbone: Path) -> None:
    patches = PatchPlan(size=32, frames=2).cut(stub_video(0, height=64, width=70))
    encoder = load_backbone(tiny_backbone).vae().encoder
    x = encoder.conv_in((patches.float() / 127.5 - 1)[:, :, None])
    for block in encoder.down_blocks:
        x = block(x)
    x = encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x)))
    got = extractor(patches)
    assert got.shape == (len(patches), extractor.dim)
    torch.testing.assert_close(got, 100 * x[:, :, 0].mean((2, 3)), rtol=1e-4, atol=1e-4)
    assert got.std(0).max() > 0.01
    torch.testing.assert_close(got[:3], extractor(patches[:3]), rtol=1e-4, atol=1e-4)


def test_the_column_and_the_name_tell_which_network_it_is(
    extractor: VAEFeatures, tiny_backbone: Path, tmp_path: Path
) -> None:
    metric = FrechetPatchDistance(PatchPlan(size=32), extractor)
    assert metric.name == "fd_patch_vae"
    assert extractor.name == f"vae-{vae_fingerprint(tiny_backbone, tmp_path)[:12]}"


def test_the_column_is_known_before_anything_is_loaded() -> None:
    extractor = VAEFeatures("no/backbone")
    assert FrechetPatchDistance(PatchPlan(size=32), extractor).name == "fd_patch_vae"
    with pytest.raises(RuntimeError, match="call prepare"):
        _ = extractor.name
    with pytest.raises(FileNotFoundError, match="no/backbone"):
        VAEFeatures("no/backbone/here").prepare("cpu")


def test_patches_that_the_vae_would_crop_are_refused(extractor: VAEFeatures) -> None:
    with pytest.raises(ValueError, match=r"^patches of 36 \(patches.size\) for a VAE: expected a multiple of 8$"):
        extractor(torch.zeros(1, 3, 36, 36, dtype=torch.uint8))


def test_nothing_is_trained_or_left_behind(extractor: VAEFeatures) -> None:
    extractor.train()
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    extractor(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert extractor.network is not None
    assert not extractor.network.vae.encoder.conv_out._forward_pre_hooks
