"""Tokens in another order, with gradients, and after inference."""

from __future__ import annotations

import torch

from luve_lightning.models.attention.sparse import indices, take
from luve_lightning.models.attention.windows import window_order

SETTINGS = (2, 3, 5, 1, 2, 2, 1, 2)  # grid, cut, remote, samples


def test_rows_and_their_gradients() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    index, back, kept = torch.tensor([2, 0, 2, 3]), torch.tensor([1, 0, 2, 3]), torch.tensor([True, False, True, True])
    assert torch.equal(take(x, index, back), x[index])
    torch.autograd.backward(take(x, index, back, kept), g := torch.randn(4, 3, dtype=torch.float64))
    assert torch.equal(x.grad, torch.stack([g[1], torch.zeros(3), g[2], g[3]]))


def test_an_order_and_its_reverse() -> None:
    token, place = indices(window_order, torch.zeros(1), SETTINGS)
    assert torch.equal(token[place], torch.arange(60))
    assert torch.equal(place[token], torch.arange(60))
    assert indices(window_order, torch.zeros(1), SETTINGS)[0] is token


def test_tables_made_in_inference_serve_training() -> None:
    settings = (1, 2, 3, 1, 1, 2, 1, 1)
    with torch.inference_mode():
        token, place = indices(window_order, torch.zeros(1), settings)
    x = torch.randn(6, 2, requires_grad=True)
    take(x, token, place).sum().backward()
    assert x.grad is not None
