"""A narrowed VLUer: what a network holds without using is left out for nothing, and what is left out matters least."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luve_lightning.models.vluer import VLUer
from luve_lightning.tasks.narrowing import _Moments, check_narrowing, kept_pairs, narrow
from tests.helpers.released import small_released
from tests.helpers.tiny_luve import noise

SMALL: dict[str, Any] = {"channels": 4, "pairs": 2, "hidden": 6, "layers": 2, "query_channels": 3, "decoder_layers": 1}
LARGE = SMALL | {"channels": 7, "pairs": 3, "hidden": 9, "query_channels": 5}
SAMPLES = [(noise(2, 16, 3, 5, 4), (3, 7, 9)), (noise(1, 16, 2, 4, 4, seed=1), (2, 8, 8))]


def net(seed: int = 0, **changes: Any) -> VLUer:
    """A VLUer all of whose weights are random, those that start at zero too."""
    torch.manual_seed(seed)
    model = VLUer(**(SMALL | changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def held_by(small: VLUer) -> VLUer:
    """The same function with more numbers: another basis of the stream, copies of units, a pair that adds nothing."""
    large: Any = net(1, **LARGE)
    parts: Any = small
    basis, _ = torch.linalg.qr(noise(LARGE["channels"], SMALL["channels"], seed=2))

    def copies(name: str) -> list[int]:  # unit of the small network that each of the large one's is
        return [i % SMALL[name] for i in range(LARGE[name])]

    def shared(weight: Tensor, name: str) -> Tensor:  # what reads copies takes its share of each
        own = copies(name)
        return weight[:, own] / torch.tensor([own.count(i) for i in own]).view(-1, *[1] * (weight.ndim - 2))

    def into(weight: Tensor) -> Tensor:
        return torch.einsum("nc,c...->n...", basis, weight)

    def reads(weight: Tensor) -> Tensor:
        return torch.einsum("oc...,nc->on...", weight, basis)

    def put(layer: Any, weight: Tensor, bias: Tensor) -> None:
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)

    encoder = parts.encoder
    put(large.encoder.conv_in, into(encoder.conv_in.weight), into(encoder.conv_in.bias))
    for pair, wide in zip(encoder.pairs, [large.encoder.pairs[0], large.encoder.pairs[2]], strict=True):
        units = copies("channels")
        put(wide.conv1, reads(pair.conv1.weight)[units], pair.conv1.bias[units])
        put(wide.conv2, into(shared(pair.conv2.weight, "channels")), into(pair.conv2.bias))
    for parameter in large.encoder.pairs[1].conv2.parameters():
        parameter.zero_()
    units = copies("hidden")
    put(large.upsampler.first, reads(parts.upsampler.first.weight)[units], parts.upsampler.first.bias[units])
    large.upsampler.coordinates.weight.copy_(parts.upsampler.coordinates.weight[units])
    for layer, wide in zip(parts.upsampler.hidden, large.upsampler.hidden, strict=True):
        put(wide, shared(layer.weight, "hidden")[units], layer.bias[units])
    queries = copies("query_channels")
    last = parts.upsampler.last
    put(large.upsampler.last, shared(last.weight, "hidden")[queries], last.bias[queries])
    (layer,), (wide,) = parts.decoder.layers, large.decoder.layers
    put(wide, shared(layer.weight, "query_channels")[queries], layer.bias[queries])
    out = parts.decoder.conv_out
    put(large.decoder.conv_out, shared(out.weight, "query_channels"), out.bias)
    return large


def test_a_network_that_holds_a_smaller_one_is_narrowed_to_it() -> None:
    small = net()
    large = held_by(small)
    before = {name: x.clone() for name, x in large.state_dict().items()}
    latents, size = noise(1, 16, 3, 4, 6, seed=3), (4, 9, 10)
    with torch.no_grad():
        wanted = large(latents, size)
        # In float64 the rounding of the large one's weights to float32 is left, which is the same on every machine.
        exact = [copy.deepcopy(each).double()(latents.double(), size) for each in (large, small)]
        torch.testing.assert_close(*exact, atol=1e-5, rtol=1e-5)
    student = net(5)
    narrow(large, student, SAMPLES)
    with torch.no_grad():
        torch.testing.assert_close(student(latents, size), wanted, atol=1e-3, rtol=1e-3)
    assert all(torch.equal(x, before[name]) for name, x in large.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in large.parameters())


def test_with_its_own_numbers_it_is_the_teacher() -> None:
    teacher, student = net(1, **LARGE).requires_grad_(False), net(2, **LARGE)
    narrow(teacher, student, SAMPLES)
    weights = student.state_dict()
    for name, weight in teacher.state_dict().items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=1e-5)


def moments(seed: int = 0, n: int = 6) -> _Moments:
    found = _Moments()
    values = noise(50, n, seed=seed) @ noise(n, n, seed=seed + 1)
    found.add(values + 1, noise(50, n, seed=seed + 2) @ noise(n, n, seed=seed + 3))
    return found


def test_the_directions_kept_lose_the_least() -> None:
    place = moments()
    values, gradients, n = place.values[:6, :6], place.gradients, 6

    def loss(into: Tensor, back: Tensor) -> float:
        rest = torch.eye(n).double() - back @ into
        return float((gradients @ rest @ values @ rest.T).trace())

    into, back = place.directions(3)
    identity = torch.eye(3).double()
    torch.testing.assert_close(into @ back, identity)
    torch.testing.assert_close(back.T @ back, identity)
    # The least that any three directions can lose: what the smallest eigenvalues of G C say.
    assert loss(into, back) == pytest.approx(
        float(torch.linalg.eigvals(gradients @ values).real.sort().values[:3].sum())
    )
    for seed in range(20):
        other, _ = torch.linalg.qr(noise(n, 3, seed=seed).double())
        assert loss(other.T, other) > loss(into, back)


def test_a_unit_left_out_is_regressed_on_those_kept() -> None:
    values = noise(50, 6).double() @ noise(6, 6, seed=1).double() + 2
    place = _Moments()
    place.add(values, noise(50, 6, seed=2) @ noise(6, 6, seed=3))

    def left(kept: list[int]) -> float:
        """Trace of G and the residuals' moments, by plain least squares."""
        known = torch.cat([values[:, kept], torch.ones(50, 1).double()], 1)
        rest = values - known @ torch.linalg.lstsq(known, values).solution
        return float((place.gradients @ rest.T @ rest).trace())

    first = min(range(6), key=lambda unit: left([unit]))
    second = min(set(range(6)) - {first}, key=lambda unit: left([first, unit]))
    kept = place.chosen(2)
    assert kept.tolist() == sorted([first, second])
    known = torch.cat([values[:, kept], torch.ones(50, 1).double()], 1)
    wanted = torch.linalg.lstsq(known, values).solution.T
    torch.testing.assert_close(place.regression(kept), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("of", "count", "kept"), [(6, 4, [0, 2, 3, 5]), (6, 6, [0, 1, 2, 3, 4, 5]), (3, 1, [0]), (3, 0, [])]
)
def test_the_pairs_kept_are_evenly_spaced(of: int, count: int, kept: list[int]) -> None:
    assert kept_pairs(of, count) == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 8}, "net: channels: expected at most the teacher's 7, got 8"),
        ({"layers": 1}, "net: layers: expected the teacher's 2, got 1"),
        ({"use_cell": False}, "net: use_cell: expected the teacher's True, got False"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_narrowing(net(**LARGE), net(**changes))


def test_another_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^teacher: only a VLUer can be narrowed, got a ReleasedVLUer$"):
        check_narrowing(small_released(), net())
    with pytest.raises(ValueError, match=r"^samples: expected at least one batch of latents, got none$"):
        narrow(net(**LARGE), net(), [])
