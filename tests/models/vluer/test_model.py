"""VLUer: exact sizes, the paper's form of its first layer, and nothing remembered between calls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from luve_lightning.functional.interpolation import interpolate_latents
from luve_lightning.models.vluer import VLUer
from luve_lightning.models.vluer.model import ImplicitUpsampler, widened_conv3d
from tests.helpers.noise import noise

TINY: dict[str, Any] = {
    "latent_channels": 3, "channels": 4, "pairs": 1, "hidden": 5, "layers": 1, "query_channels": 4, "decoder_layers": 1,
}  # fmt: skip
MINI: dict[str, Any] = {
    "channels": 64, "pairs": 5, "hidden": 96, "layers": 2, "query_channels": 32, "decoder_layers": 1,
}  # fmt: skip


def trained(**config: Any) -> VLUer:
    """A tiny VLUer with random weights everywhere, as after training."""
    torch.manual_seed(0)
    net = VLUer(**(TINY | config)).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def trilinear(latents: Tensor, size: tuple[int, int, int]) -> Tensor:
    return F.interpolate(latents, size=size, mode="trilinear", align_corners=False)


SIZES = {
    "batch": st.sampled_from([1, 3]),
    "given": st.tuples(st.integers(1, 4), st.integers(1, 33), st.integers(1, 47)),
    "wanted": st.tuples(st.integers(1, 6), st.integers(1, 97), st.integers(1, 131)),
}
NET = trained()


@settings(max_examples=25, deadline=None)
@given(**SIZES)
def test_gives_the_size_asked_for(batch: int, given: tuple[int, int, int], wanted: tuple[int, int, int]) -> None:
    with torch.inference_mode():
        out = NET(noise(batch, 3, *given), wanted)
    assert out.shape == (batch, 3, *wanted)
    assert out.isfinite().all()


@pytest.mark.parametrize("frames", [(1, 1), (3, 3), (2, 5), (5, 2)])
@pytest.mark.parametrize("given", [(1, 1), (1, 47), (33, 1), (33, 47)])
@pytest.mark.parametrize("wanted", [(1, 1), (1, 131), (97, 1), (97, 131)])
def test_gives_the_corners_of_the_range(
    frames: tuple[int, int], given: tuple[int, int], wanted: tuple[int, int]
) -> None:
    with torch.inference_mode():
        out = NET(noise(1, 3, frames[0], *given), (frames[1], *wanted))
    assert out.shape == (1, 3, frames[1], *wanted)
    assert out.isfinite().all()


@pytest.mark.parametrize("use_decoder", [True, False])
@pytest.mark.parametrize("size", [(3, 5, 7), (3, 10, 14), (2, 13, 4), (7, 6, 20)])
def test_untrained_it_is_bilinear_exactly(size: tuple[int, int, int], use_decoder: bool) -> None:
    net, latents = VLUer(**TINY, use_decoder=use_decoder), noise(2, 3, 3, 5, 7)
    assert torch.equal(net(latents, size), trilinear(latents, size))
    assert torch.equal(net(latents, size), interpolate_latents(latents, size, "bilinear"))


def unfolded(upsampler: ImplicitUpsampler, features: Tensor, size: tuple[int, int, int]) -> Tensor:
    """The paper's form: unfold 3x3x3, take the nearest position, append coordinates, one Linear, the rest."""
    batch, channels, frames, height, width = features.shape
    padded = F.pad(features, (1, 1, 1, 1, 1, 1))
    shifts = [(a, b, c) for a in range(3) for b in range(3) for c in range(3)]
    neighbours = [padded[:, :, a : a + frames, b : b + height, c : c + width] for a, b, c in shifts]
    columns = torch.stack(neighbours, dim=2).reshape(batch, channels * 27, frames, height, width)
    weight = torch.cat([upsampler.first.weight.flatten(1), upsampler.coordinates.weight], dim=1)
    cells = [i / o for i, o in zip(features.shape[2:], size, strict=True)] if upsampler.use_cell else []
    out = torch.empty(batch, upsampler.last.out_features, *size)
    for t in range(size[0]):
        for y in range(size[1]):
            for x in range(size[2]):
                position, offsets = [], []
                for i, n_in, n_out in zip((t, y, x), features.shape[2:], size, strict=True):
                    centre = (i + 0.5) * n_in / n_out
                    position.append(min(math.floor(centre + 1e-9), n_in - 1))
                    offsets.append(centre - position[-1] - 0.5)
                coordinates = torch.tensor([offsets + cells]).expand(batch, -1)
                query = torch.cat([columns[:, :, position[0], position[1], position[2]], coordinates], dim=1)
                hidden = F.silu(F.linear(query, weight, upsampler.first.bias))
                for layer in upsampler.hidden:
                    hidden = F.silu(layer(hidden))
                out[:, :, t, y, x] = upsampler.last(hidden)
    return out


@pytest.mark.parametrize("use_cell", [True, False])
@settings(max_examples=12, deadline=None)
@given(
    given=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    wanted=st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)),
)
def test_equals_the_unfolded_form(use_cell: bool, given: tuple[int, int, int], wanted: tuple[int, int, int]) -> None:
    upsampler, features = trained(use_cell=use_cell).upsampler, noise(2, 4, *given)
    with torch.no_grad():
        torch.testing.assert_close(
            upsampler(features, wanted), unfolded(upsampler, features, wanted), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("chunk", [1, 40, 10_000])
def test_chunks_of_queries_change_nothing(chunk: int) -> None:
    latents, size = noise(2, 3, 3, 4, 5).double(), (5, 7, 9)
    whole = trained().double()(latents, size)  # with gradients there are no chunks
    with torch.no_grad():
        parts = trained(query_chunk=chunk).double()(latents, size)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_a_clip_does_not_depend_on_its_batch() -> None:
    latents, size = noise(3, 3, 3, 4, 5), (3, 7, 11)
    with torch.no_grad():
        together = NET(latents, size)
        alone = torch.cat([NET(one, size) for one in latents.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_bfloat16_weights_autocast_and_inputs() -> None:
    latents, size = noise(2, 3, 3, 4, 5), (3, 7, 11)
    with torch.no_grad():
        want = NET(latents, size)
        half = trained().to(torch.bfloat16)
        got = half(latents.bfloat16(), size)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1)
        # Single-precision latents keep their precision: only the learned part is rounded.
        got = half(latents, size)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            got = NET(latents, size)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_is_the_same_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    net = trained(query_chunk=77).to(dtype)
    net.save_pretrained(tmp_path)
    loaded = VLUer.from_pretrained(tmp_path, torch_dtype=dtype)
    assert {k: v for k, v in loaded.config.items() if not k.startswith("_")} == {
        k: v for k, v in net.config.items() if not k.startswith("_")
    }
    assert loaded.config.query_chunk == 77
    assert loaded.state_dict().keys() == net.state_dict().keys()
    for name, value in loaded.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, net.state_dict()[name])
    latents = noise(2, 3, 3, 4, 5).to(dtype)
    with torch.no_grad():
        assert torch.equal(loaded(latents, (3, 7, 9)), net(latents, (3, 7, 9)))


def test_the_sizes_of_the_configurations() -> None:
    with torch.device("meta"):
        base, mini = VLUer(), VLUer(**MINI)
    assert 15_000_000 <= base.num_parameters() <= 22_000_000
    assert mini.num_parameters() <= 1_500_000
    # The encoder, what the released model spends its parameters on, has most of them.
    assert sum(p.numel() for p in base.encoder.parameters()) > 0.8 * base.num_parameters()


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((3, 2, 4, 5), (2, 8, 8), "B x 3 x T x h x w, got shape"),
        ((1, 4, 2, 4, 5), (2, 8, 8), "B x 3 x T x h x w, got shape"),
        ((1, 3, 0, 4, 5), (2, 8, 8), "empty axis"),
        ((0, 3, 2, 4, 5), (2, 8, 8), "empty axis"),
        ((1, 3, 2, 4, 5), (2, 0, 8), "each an integer >= 1"),
        ((1, 3, 2, 4, 5), (2, 8, -1), "each an integer >= 1"),
        ((1, 3, 2, 4, 5), (2, 8, 8.5), "each an integer >= 1"),
        ((1, 3, 2, 4, 5), (8, 8), "each an integer >= 1"),
    ],
)
def test_wrong_inputs_are_refused(shape: tuple[int, ...], size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NET(torch.zeros(shape), size)


def tensors_of(net: nn.Module) -> Iterator[int]:
    """Identities of all tensors that hang on a module's parts, wherever."""
    for module in net.modules():
        for value in [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]:
            if isinstance(value, Tensor):
                yield id(value)


def test_remembers_nothing_between_calls() -> None:
    net, latents = trained(), noise(2, 3, 3, 4, 5)
    attributes = {name: set(vars(module)) for name, module in net.named_modules()}
    tensors = set(tensors_of(net))
    with torch.no_grad():
        first = net(latents, (3, 7, 9))
        net(noise(1, 3, 1, 9, 2), (4, 3, 17))
        again = net(latents, (3, 7, 9))
    assert torch.equal(first, again)
    assert {name: set(vars(module)) for name, module in net.named_modules()} == attributes
    assert set(tensors_of(net)) == tensors


def test_inference_mode_gives_the_numbers_of_training() -> None:
    latents, size = noise(1, 3, 2, 4, 5), (3, 6, 7)
    with torch.inference_mode():
        got = NET(latents, size)
    want = NET(latents, size)
    assert want.requires_grad
    torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_finite_differences() -> None:
    net = trained().double()
    latents = noise(1, 3, 2, 2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: net(z, (2, 3, 4)), (latents,), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("outputs", [1, 3, 4])
def test_a_widened_convolution_is_the_convolution(outputs: int) -> None:
    conv = nn.Conv3d(4, outputs, 3, padding=1).double()
    x, gradient = noise(3, 4, 2, 5, 3).double().requires_grad_(), noise(3, outputs, 2, 5, 3).double()
    leaves = (x, conv.weight, conv.bias)

    def found(output: Tensor) -> list[Tensor]:
        return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]

    for one, other in zip(found(widened_conv3d(conv, x)), found(conv(x)), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_every_weight_has_a_gradient() -> None:
    net = trained()
    net(noise(2, 3, 3, 4, 5), (3, 7, 9)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("name", "least"), [("channels", 1), ("hidden", 1), ("query_chunk", 1), ("pairs", 0), ("layers", 0)]
)
def test_sizes_from_which_nothing_can_be_built(name: str, least: int) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected {least} or more, got {least - 1}"):
        VLUer(**{name: least - 1})
