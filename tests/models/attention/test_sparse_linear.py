"""The linear branch is linear attention, and nothing before it is trained."""

from __future__ import annotations

import pytest
import torch

from luve_lightning.models.attention import sparse
from luve_lightning.models.attention.sparse import LinearBranch
from tests.helpers.masked_attention import drawn


@pytest.mark.parametrize("chunk", [7, 1000])
def test_it_is_softmax_linear_attention(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_CHUNK", chunk)
    query, key, value = drawn((2, 3, 5))
    branch = LinearBranch(2, 4).double()
    torch.nn.init.normal_(branch.projection)
    weights = torch.einsum("bnhd,bmhd->bhnm", query.softmax(-1), key.softmax(-1))
    mean = torch.einsum("bhnm,bmhe->bnhe", weights / weights.sum(-1, keepdim=True), value)
    want = torch.einsum("bnhe,hef->bnhf", mean, branch.projection)
    torch.testing.assert_close(branch(query, key, value), want)
    torch.autograd.gradcheck(branch, (query, key, value), fast_mode=True)


def test_it_starts_at_zero_and_its_projection_learns() -> None:
    query, key, value = drawn((2, 3, 5))
    branch = LinearBranch(2, 4)
    output = branch(query, key, value)
    assert torch.count_nonzero(output) == 0
    output.sum().backward()
    assert torch.count_nonzero(branch.projection.grad) == branch.projection.numel()


def test_bfloat16_and_autocast_are_close() -> None:
    inputs = drawn((2, 3, 5))
    branch = LinearBranch(2, 4)
    torch.nn.init.normal_(branch.projection)
    want = branch(*inputs)
    half = [x.bfloat16() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        got = branch(*half)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, branch(*half))
    torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.02)


def test_a_channel_that_no_key_uses() -> None:
    query, key, value = (x.detach() for x in drawn((2, 3, 5)))
    branch = LinearBranch(2, 4)
    torch.nn.init.normal_(branch.projection)
    key[..., 0] = -1000  # its weights vanish, in any precision
    output = branch(query, key, value)
    assert torch.isfinite(output).all()
    torch.testing.assert_close(output, branch(query, key + 500, value))
