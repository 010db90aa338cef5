"""Every loss against its definition in numpy, and what a task relies on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning import losses
from luve_lightning.losses import (
    FrameDifferenceL1,
    LatentL1,
    Loss,
    PixelL1,
    PixelLogMSE,
    PixelMSE,
    VelocityLoss,
    VelocityMSE,
)

DEFINITIONS = {
    LatentL1: lambda x, y: np.abs(x - y).mean(),
    PixelL1: lambda x, y: np.abs(x - y).mean(),
    PixelMSE: lambda x, y: ((x - y) ** 2).mean(),
    VelocityMSE: lambda x, y: ((x - y) ** 2).mean(),
    PixelLogMSE: lambda x, y: np.mean([np.log(1 + ((a - b) ** 2).mean() / 1e-5) for a, b in zip(x, y, strict=True)]),
    FrameDifferenceL1: lambda x, y: np.mean(
        [np.abs((x[:, :, t] - x[:, :, t - 1]) - (y[:, :, t] - y[:, :, t - 1])).mean() for t in range(1, x.shape[2])]
    ),
}


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_every_loss_of_the_package_is_tested_here() -> None:
    exported = {getattr(losses, name) for name in losses.__all__} - {Loss, VelocityLoss}
    assert exported == set(DEFINITIONS)
    assert losses.__all__ == sorted(losses.__all__)


@pytest.mark.parametrize("kind", DEFINITIONS)
@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 3), frames=st.integers(2, 4), height=st.integers(1, 5), width=st.integers(1, 5))
def test_is_its_definition(kind: type[Loss], batch: int, frames: int, height: int, width: int) -> None:
    prediction, target = pair(batch, 3, frames, height, width)
    got = kind()(prediction, target)
    assert got.shape == ()
    want = DEFINITIONS[kind](prediction.double().numpy(), target.double().numpy())
    assert got.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_is_zero_on_the_target_and_has_gradients_elsewhere(kind: type[Loss]) -> None:
    prediction, target = pair(2, 3, 3, 4, 5)
    assert kind()(target, target).item() == 0
    prediction.requires_grad_()
    kind()(prediction, target).backward()
    assert prediction.grad is not None
    assert prediction.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_half_precision_is_summed_in_single(kind: type[Loss]) -> None:
    prediction, target = (x.bfloat16() for x in pair(2, 3, 3, 16, 16))
    got = kind()(prediction, target)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(kind()(prediction.float(), target.float()).item(), rel=1e-6)


def test_one_frame_has_no_motion_but_a_graph() -> None:
    prediction, target = pair(1, 3, 1, 4, 4)
    prediction.requires_grad_()
    loss = FrameDifferenceL1()(prediction, target)
    loss.backward()
    assert loss.item() == 0
    assert prediction.grad is not None
    assert prediction.grad.abs().sum() == 0


def test_the_space_says_what_a_loss_is_given() -> None:
    assert {kind: kind.space for kind in DEFINITIONS} == {
        LatentL1: "latent",
        PixelL1: "pixel",
        PixelMSE: "pixel",
        VelocityMSE: "velocity",
        PixelLogMSE: "pixel",
        FrameDifferenceL1: "pixel",
    }


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight of PixelL1 must be >= 0"):
        PixelL1(weight)


@pytest.mark.parametrize("floor", [0.0, -1e-5, float("nan")])
def test_a_floor_that_is_none_is_refused(floor: float) -> None:
    with pytest.raises(ValueError, match="floor of PixelLogMSE must be > 0"):
        PixelLogMSE(floor=floor)


def test_a_weight_is_kept_and_not_applied() -> None:
    prediction, target = pair(1, 3, 2, 4, 4)
    assert PixelL1(0.25).weight == 0.25
    assert torch.equal(PixelL1(0.25)(prediction, target), PixelL1()(prediction, target))
