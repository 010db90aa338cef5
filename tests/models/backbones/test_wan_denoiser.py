"""Wan's denoiser: its attention replaced and put back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from luve_lightning.functional.frequency import Grid
from luve_lightning.models.backbones.wan_denoiser import WanDenoiser
from tests.helpers.tiny_wan import inputs, output, tiny_transformer


@torch.no_grad()
def test_self_attention_can_be_replaced_and_put_back() -> None:
    """By the same arithmetic nothing changes, by another one it does; text is attended to as before."""
    transformer = tiny_transformer()
    denoiser, want, grids = WanDenoiser(transformer), output(transformer, inputs()), []

    def plain(query: Tensor, key: Tensor, value: Tensor, grid: Grid) -> Tensor:
        grids.append(grid)
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)

    denoiser.set_attention(plain)
    torch.testing.assert_close(output(transformer, inputs()), want)
    assert grids == [(2, 6, 5)] * 2
    denoiser.set_attention(lambda query, key, value, grid: value)
    assert not torch.allclose(output(transformer, inputs()), want, atol=1e-3)
    denoiser.set_attention(None)
    assert torch.equal(output(transformer, inputs()), want)
