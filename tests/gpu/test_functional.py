"""Functions of pixels and latents on a GPU against a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from luve_lightning.functional.interpolation import interpolate_latents
from luve_lightning.functional.takes import take_measures
from luve_lightning.functional.unsharp import unsharp_mask
from tests.helpers.gpu import error
from tests.helpers.noise import noise

LEVEL = 2 / 255


@pytest.fixture(params=["highest", "high"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """With "high", products of float32 matrices may be TF32, as a user may ask for in training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("precision")
def test_sharpening_is_within_a_tenth_of_a_level(device: torch.device) -> None:
    """Also when the user allows TF32."""
    video = noise(2, 3, 3, 131, 257)
    with torch.autocast(device.type, torch.bfloat16):
        got = unsharp_mask(video.to(device), 2.0, 1.0)
    assert (got.cpu() - unsharp_mask(video, 2.0, 1.0)).abs().max() < 0.1 * LEVEL


@pytest.mark.parametrize("batch", [1, 3])
def test_interpolation(device: torch.device, batch: int) -> None:
    """Positions are float32, and so are the weights that follow from them."""
    latents = noise(batch, 16, 3, 9, 11)
    assert error(interpolate_latents(latents.to(device), (5, 23, 31)), interpolate_latents(latents, (5, 23, 31))) < 5e-6


def test_a_take_is_measured_as_on_a_cpu(device: torch.device) -> None:
    frames = noise(5, 96, 128, 3).sigmoid().mul(255).round().to(torch.uint8)
    assert take_measures(frames.to(device)) == pytest.approx(take_measures(frames), rel=1e-3, abs=1e-4)
