"""Sparse attentions in a transformer: dense where asked, recomputed, compiled, and with a linear branch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from luve_lightning.models.attention import Attention, Where, tiles
from luve_lightning.models.attention.dense import Dense
from luve_lightning.models.attention.sparse import SparseAttention
from luve_lightning.models.attention.tiles import Tiles
from luve_lightning.models.attention.windows import Windows
from luve_lightning.models.backbones import denoiser_of
from tests.helpers.attention_calls import AttentionCalls
from tests.helpers.masked_attention import drawn, with_gradients
from tests.helpers.tiny_wan import inputs, output, tiny_transformer

GRID = (2, 3, 5)
KINDS = [Windows(((1, 2, 3), (2, 1, 2))), Tiles((1, 2, 2), (1, 2, 2))]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_layers_and_noise_levels_stay_dense(kind: SparseAttention) -> None:
    q, k, v = drawn(GRID, batch=4)
    sparse = kind(q, k, v, Where(GRID, 0))
    dense = Dense()(q, k, v, Where(GRID, 0))
    assert not torch.allclose(sparse, dense)
    assert torch.equal(replace(kind, dense_layers=(0, 3))(q, k, v, Where(GRID, 0)), dense)
    mixed = replace(kind, dense_above=0.7, dense_layers=(3,))
    assert mixed.needs_sigma
    assert not kind.needs_sigma
    sigmas = (0.9, 0.1, 0.7, 0.69)
    got = mixed(q, k, v, Where(GRID, 0, sigmas))
    want = torch.where(torch.tensor([s >= 0.7 for s in sigmas])[:, None, None, None], dense, sparse)
    for ours, reference in zip(with_gradients(got, [q, k, v]), with_gradients(want, [q, k, v]), strict=True):
        torch.testing.assert_close(ours, reference)
    assert [mixed.pairs(GRID, layer, 0.5) == 900 for layer in (0, 3)] == [False, True]
    assert mixed.pairs(GRID, 0, 0.7) == 900
    assert torch.equal(mixed(q, k, v, Where(GRID, 3)), dense)
    with pytest.raises(ValueError, match=f"{type(kind).__name__}: dense_above needs the noise level of every sample"):
        mixed(q, k, v, Where(GRID, 0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dense_layers": [1, -1]}, r"dense_layers: expected whole numbers of at least 0, got \[1, -1\]"),
        ({"dense_layers": 3}, "dense_layers: expected whole numbers of at least 0, got 3"),
        ({"dense_layers": [True]}, "dense_layers: expected whole numbers"),
        ({"dense_above": 0}, "dense_above: expected a noise level above 0 and at most 1, or null, got 0"),
        ({"dense_above": 1.5}, "dense_above: expected a noise level"),
        ({"dense_above": True}, "dense_above: expected a noise level"),
        ({"dense_above": "0.9"}, "dense_above: expected a noise level"),
        ({"linear": 1}, "linear: expected true or false, got 1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"attention Windows: {message}"):
        Attention.from_record({"name": "Windows", "cuts": [[1, 2, 2]], **settings})


def test_dense_layers_are_layers_of_the_transformer() -> None:
    denoiser = denoiser_of(tiny_transformer())
    denoiser.use_attention(replace(KINDS[0], dense_layers=(0, 1)))
    with pytest.raises(ValueError, match=r"Windows: dense_layers: expected layers of a transformer of 2, 0 to 1, got"):
        denoiser.use_attention(replace(KINDS[0], dense_layers=(1, 2)))
    assert denoiser.attention == replace(KINDS[0], dense_layers=(0, 1))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_the_linear_branch_is_added_to_sparse_samples_only(kind: SparseAttention) -> None:
    q, k, v = drawn(GRID, batch=2)
    attention = replace(kind, linear=True, dense_above=0.5)
    branch = attention.branch(2, 4)
    sparse, dense = kind(q, k, v, Where(GRID, 0)), Dense()(q, k, v, Where(GRID, 0))
    assert torch.equal(attention(q, k, v, Where(GRID, 0, (0.1, 0.1)), branch), sparse)
    torch.nn.init.normal_(branch.projection)
    got = attention(q, k, v, Where(GRID, 0, (0.1, 0.9)), branch)
    torch.testing.assert_close(got[:1], (sparse + branch(q, k, v))[:1])
    assert torch.equal(got[1:], dense[1:])
    assert kind.branch(2, 4) is None
    # DDP waits for a gradient of every parameter, also of a batch of which each sample is dense.
    attention(q, k, v, Where(GRID, 0, (0.9, 0.9)), branch).sum().backward()
    assert torch.count_nonzero(branch.projection.grad) == 0


def step(attention: SparseAttention, recompute: Any, backend: str | None = None) -> tuple[list[Tensor], list[int]]:
    """Output and gradients of a step, and the attentions of its backward pass."""
    transformer = tiny_transformer(attention_head_dim=16)
    denoiser = denoiser_of(transformer)
    denoiser.use_attention(attention)
    for number, branch in enumerate(denoiser.branches.values()):
        torch.nn.init.normal_(branch.projection, generator=torch.Generator().manual_seed(number))
    denoiser.set_recompute(recompute)
    if backend is not None:
        for block in transformer.blocks:
            block.compile(backend=backend)
    result = output(transformer, inputs())
    with AttentionCalls() as backward:
        result.square().mean().backward()
    gradients = [p.grad for p in transformer.parameters()]
    assert all(g is not None for g in gradients)
    return [result.detach(), *gradients], backward.keys


WORDS = 3
IN_BLOCKS = ("blocks", Tiles((1, 6, 5), (1, 1, 1), linear=True))


@pytest.mark.parametrize(
    ("kernel", "attention"),
    [("plain", KINDS[0]), ("plain", KINDS[1]), ("plain", replace(KINDS[0], linear=True)), IN_BLOCKS],
    ids=["windows", "tiles", "windows, linear", "tiles in blocks, linear"],
)
def test_recomputing_changes_no_number_and_keeps_attention(
    kernel: str, attention: SparseAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "blocks":
        monkeypatch.setattr(tiles, "_by_blocks", lambda query: True)
    want, again = step(attention, "nothing")
    assert again == []
    for recompute in ("blocks", "all_but_attention"):
        got, again = step(attention, recompute)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True)), recompute
        assert [keys for keys in again if keys == WORDS] == [WORDS] * 2
        assert (len(again) > 2) == (recompute == "blocks")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "attention"),
    [("plain", replace(KINDS[0], linear=True)), ("plain", KINDS[1]), IN_BLOCKS],
    ids=["windows, linear", "tiles", "tiles in blocks, linear"],
)
def test_compiled_blocks_give_the_same(
    kernel: str, attention: SparseAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "blocks":
        monkeypatch.setattr(tiles, "_by_blocks", lambda query: True)
    want, _ = step(attention, "nothing")
    got, _ = step(attention, "nothing", "eager")
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
