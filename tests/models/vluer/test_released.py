"""The released VLUer: its reference outputs, its habits against plain forms, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from luve_lightning.functional.interpolation import interpolate_latents, nearest_indices
from luve_lightning.models.vluer import ReleasedVLUer
from luve_lightning.models.vluer.released import ReleasedMLP, sampled_cells
from tests.helpers.noise import noise
from tests.helpers.released import REFERENCE, reference, rule_weights, small_released

Size = tuple[int, int, int]


@pytest.fixture(scope="module")
def net() -> ReleasedVLUer:
    return small_released()


@pytest.fixture(scope="module")
def released() -> ReleasedVLUer:
    net = ReleasedVLUer().eval()
    rule_weights(net)
    return net


def test_parameters_are_the_released_ones(released: ReleasedVLUer) -> None:
    assert {name: list(each.shape) for name, each in released.named_parameters()} == reference()["parameters"]
    assert released.num_parameters() == 22_110_472
    assert set(released.state_dict()) == set(reference()["parameters"])  # what can be recomputed is not saved


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("case", range(3))
def test_gives_what_the_released_network_gives(
    released: ReleasedVLUer, case: int, request: pytest.FixtureRequest
) -> None:
    if case > 0 and not request.config.getoption("--all-references"):
        pytest.skip("ten seconds each on a quiet core: pytest --all-references")
    about = reference()["cases"][case]
    latents = np.random.default_rng(about["input_seed"]).standard_normal(about["input"]).astype(np.float32)
    out = released(torch.from_numpy(latents), tuple(about["output"][2:]))
    assert list(out.shape) == about["output"]
    places = np.random.default_rng(about["index_seed"]).choice(out.numel(), about["samples"], replace=False)
    with np.load(REFERENCE.with_suffix(".npz")) as file:
        want = torch.from_numpy(file[f"case{case}_values"])
    got = out.flatten()[torch.from_numpy(np.sort(places))]
    # Both are off by rounding: in float64 the reference's worst value differs by 9e-5.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    assert (got - want).abs().mean() < 1e-5
    assert float(out.mean()) == pytest.approx(about["mean"], abs=1e-5)
    assert float(out.abs().mean()) == pytest.approx(about["abs_mean"], abs=1e-5)


def plain_cells(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Nearest cell and offset in half-cells, each operation rounded to float32; halves go to the even cell."""
    one = np.float32(1)

    def centres(n: int) -> np.ndarray:
        return np.float32(-1 + 1 / n) + np.float32(2 / n) * np.arange(n, dtype=np.float32)

    index = np.rint(((centres(n_out) + one) * np.float32(n_in) - one) / np.float32(2)).astype(int)
    return index, (centres(n_out) - centres(n_in)[index]) * np.float32(n_in)


@given(st.integers(1, 300), st.integers(1, 600))
def test_cells_are_rounded_as_the_original_rounds_them(n_in: int, n_out: int) -> None:
    index, offset = sampled_cells(n_in, n_out, torch.device("cpu"))
    want_index, want_offset = plain_cells(n_in, n_out)
    assert index.tolist() == want_index.tolist()
    assert offset.tolist() == want_offset.tolist()
    # As the sum of gradients takes for granted.
    assert index.tolist() == sorted(index.tolist())
    assert index.bincount().max() <= -(-n_out // n_in) + 1


def test_ties_are_the_originals_own() -> None:
    index, offset = sampled_cells(64, 96, torch.device("cpu"))
    ties = offset.abs() > 0.99  # one half-cell: right between two cells
    assert ties.sum() == 32
    assert (index[ties] % 2 == 0).float().mean() > 0.5
    assert (index != nearest_indices(64, 96)).any()  # exact ties, which ours sends to the upper cell


def plain_mlp(mlp: ReleasedMLP, features: Tensor, size: Size) -> Tensor:
    """Unfold by (frame offset, channel, row offset, column offset), sample by grid_sample, concatenate, all layers."""
    batch, channels, *n_in = features.shape
    padded = F.pad(features, (1, 1, 1, 1, 1, 1))
    shifted = [
        padded[:, c, dt : dt + n_in[0], dy : dy + n_in[1], dx : dx + n_in[2]]
        for dt in range(3)
        for c in range(channels)
        for dy in range(3)
        for dx in range(3)
    ]

    def grid(sizes: list[int] | Size) -> Tensor:
        axes = [-1 + 1 / n + (2 / n) * torch.arange(n).float() for n in sizes]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)

    def sample(volume: Tensor) -> Tensor:
        places = grid(size).flip(-1).expand(batch, -1, -1, -1, -1)
        return F.grid_sample(volume, places, mode="nearest", align_corners=False)

    centres = sample(grid(n_in).permute(3, 0, 1, 2).expand(batch, -1, -1, -1, -1))
    offset = (grid(size).permute(3, 0, 1, 2) - centres) * torch.tensor(n_in).view(3, 1, 1, 1)
    cell = torch.tensor([2 / n_out * n for n, n_out in zip(n_in, size, strict=True)])
    cell = cell.view(1, 3, 1, 1, 1).expand(batch, -1, *size)
    columns = torch.cat((sample(torch.stack(shifted, 1)), offset, cell), 1)
    return mlp.layers(columns.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("grid", "size"), [((2, 8, 10), (2, 12, 15)), ((3, 9, 5), (4, 18, 15)), ((4, 6, 8), (1, 11, 4))]
)
def test_the_mlp_is_that_of_unfolded_features(grid: Size, size: Size) -> None:
    mlp = ReleasedMLP(4, (9, 7), 5, query_chunk=50)
    features = noise(2, 4, *grid)
    torch.testing.assert_close(mlp(features, size), plain_mlp(mlp, features, size), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_interpolated_latents_come_before_the_decoder() -> None:
    net, latents, size = small_released(), noise(1, 16, 2, 64, 64), (2, 72, 80)
    for parameter in net.imnet.layers[-1].parameters():
        parameter.zero_()
    between = interpolate_latents(latents, size, "bilinear")
    decoded = net.decoder(between)
    more = torch.stack([net.conv(decoded[:, :, t]) for t in range(2)], dim=2)
    torch.testing.assert_close(net(latents, size), between + more, rtol=0, atol=1e-6)


@torch.no_grad()
def test_samples_of_a_batch_do_not_meet() -> None:
    net, latents, size = small_released().double(), noise(3, 16, 2, 64, 64).double(), (2, 16, 72)
    apart = torch.cat([net(each[None], size) for each in latents])
    torch.testing.assert_close(net(latents, size), apart, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_chunks_of_queries_change_nothing(net: ReleasedVLUer) -> None:
    latents = noise(1, 16, 2, 64, 64)
    chunked = small_released(query_chunk=1)
    torch.testing.assert_close(chunked(latents, (3, 64, 64)), net(latents, (3, 64, 64)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 8, 16), (5, 64, 8)])
def test_gives_small_sizes(net: ReleasedVLUer, size: Size) -> None:
    out = net(noise(1, 16, 2, 64, 64), size)
    assert out.shape == (1, 16, *size)
    assert out.isfinite().all()


@torch.no_grad()
def test_bfloat16_is_near(net: ReleasedVLUer) -> None:
    latents, size = noise(1, 16, 2, 64, 64), (2, 72, 64)
    want = net(latents, size)
    low = small_released().to(torch.bfloat16)(latents.bfloat16(), size)
    assert low.dtype == torch.bfloat16
    assert (low.float() - want).abs().mean() < 0.05 * want.abs().mean()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(latents, size)
    assert mixed.dtype == torch.float32
    assert (mixed - want).abs().mean() < 0.05 * want.abs().mean()


def test_gradients_reach_every_weight() -> None:
    net = small_released().train()
    net(noise(1, 16, 2, 64, 72), (3, 16, 72)).square().mean().backward()
    gradients = {name: each.grad for name, each in net.named_parameters()}
    assert [name for name, each in gradients.items() if each is None or not each.any()] == []
    assert [name for name, each in gradients.items() if each is not None and not each.isfinite().all()] == []


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((1, 16, 1, 64, 64), (1, 96, 96), "at least 2 latent frames of 64 x 64, got 1 of 64 x 64"),
        ((1, 16, 2, 56, 64), (2, 96, 96), "at least 2 latent frames of 64 x 64, got 2 of 56 x 64"),
        ((1, 16, 2, 90, 160), (2, 184, 320), r"multiples of 8, got 90 x 160; crop=True .* cuts off what is over"),
        ((1, 16, 2, 64, 64), (2, 92, 96), "gives latents .* multiples of 8, asked for 92 x 96"),
        ((1, 4, 2, 64, 64), (2, 96, 96), "B x 16 x T x h x w"),
        ((1, 16, 2, 64, 64), (0, 96, 96), "each an integer >= 1"),
    ],
)
def test_refuses_what_it_cannot_take(net: ReleasedVLUer, shape: tuple[int, ...], size: Size, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        net(torch.zeros(shape), size)


@torch.no_grad()
def test_crop_cuts_the_end_and_stretches_the_rest(net: ReleasedVLUer) -> None:
    latents, size = noise(1, 16, 2, 70, 79), (2, 72, 80)
    assert torch.equal(small_released(crop=True)(latents, size), net(latents[..., :64, :72], size))
    with pytest.raises(ValueError, match="asked for 90 x 80"):
        small_released(crop=True)(latents, (2, 90, 80))


def test_refuses_impossible_widths() -> None:
    with pytest.raises(ValueError, match=r"^channels: expected multiples of 4 with 2 heads, got \(18, 12\)$"):
        small_released(channels=18)
