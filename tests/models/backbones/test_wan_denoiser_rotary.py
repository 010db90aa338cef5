"""Wan's rotary embedding, scaled for sizes that the transformer was not trained for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from luve_lightning.models.attention.dense import attend
from luve_lightning.models.attention.windows import Windows
from luve_lightning.models.backbones.wan_denoiser import WanDenoiser
from tests.helpers.second_family import RibbonDenoiser, RibbonTransformer
from tests.helpers.tiny_wan import inputs, output, tiny_transformer


def velocity(net: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        return output(net, inputs(3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_of_one_change_no_bit_and_others_are_undone(dtype: torch.dtype) -> None:
    net = tiny_transformer().to(dtype)
    want = velocity(net, dtype)
    denoiser = WanDenoiser(net)
    with denoiser.scaled_rotary():
        assert torch.equal(velocity(net, dtype), want)
    with denoiser.scaled_rotary(20.0, 3.0, 1.2):
        assert not torch.equal(velocity(net, dtype), want)
        with denoiser.scaled_rotary():
            assert torch.equal(velocity(net, dtype), want)
    assert torch.equal(velocity(net, dtype), want)
    with pytest.raises(KeyboardInterrupt), denoiser.scaled_rotary(20.0):
        raise KeyboardInterrupt
    assert torch.equal(velocity(net, dtype), want)


def test_each_axis_turns_by_powers_of_its_base() -> None:
    """Pair i of d channels turns by position * (10000 * factor) ** (-2 i / d); a token's channels are T, h, w."""
    net = tiny_transformer(attention_head_dim=24)
    denoiser, (frames, rows, columns) = WanDenoiser(net), (2, 3, 4)
    assert denoiser.rotary_channels == (8, 8, 8)
    with denoiser.scaled_rotary(7.0, 2.5, 1.44):
        cos, sin = net.rope(torch.empty(1, 4, frames, 2 * rows, 2 * columns))
    for number in range(frames * rows * columns):
        place = number // (rows * columns), number // columns % rows, number % columns
        for axis, factor in enumerate((1.0, 7.0, 2.5)):
            for pair in range(4):
                angle = place[axis] * (10_000 * factor) ** (-2 * pair / 8)
                channel = 8 * axis + 2 * pair
                for got, of in ((cos, math.cos), (sin, math.sin)):
                    both = got[0, number, 0, channel : channel + 2].tolist()
                    assert both == pytest.approx([1.2 * of(angle)] * 2, abs=1e-6)


def test_temperature_scales_the_logits_of_self_attention() -> None:
    net = tiny_transformer()
    seen: list[Tensor] = []

    def attending(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        seen.append(torch.einsum("bqhc,bkhc->bhqk", query, key))
        return attend(query, key, value)

    denoiser = WanDenoiser(net)
    denoiser.set_attention(attending)
    velocity(net)
    with denoiser.scaled_rotary(temperature=1.3):
        velocity(net)
    first, scaled = seen[0], seen[2]  # of the first block, whose input is the same
    torch.testing.assert_close(scaled, 1.3 * first, rtol=1e-5, atol=1e-5)


def test_windows_and_compiled_blocks_heed_it() -> None:
    net = tiny_transformer()
    denoiser = WanDenoiser(net)
    denoiser.use_attention(Windows(((1, 2, 2),)))
    with denoiser.scaled_rotary(5.0, 5.0, 1.2):
        want = velocity(net)
    assert not torch.equal(velocity(net), want)
    denoiser.compile_blocks("eager")
    with denoiser.scaled_rotary(5.0, 5.0, 1.2):
        torch.testing.assert_close(velocity(net), want)
    torch._dynamo.reset()


def test_what_cannot_be_is_refused() -> None:
    for factor in (0.0, -1.0, math.inf, math.nan):
        with (
            pytest.raises(ValueError, match=f"width: expected a factor greater than 0, got {factor}"),
            WanDenoiser(tiny_transformer()).scaled_rotary(width=factor),
        ):
            pass
    ribbon = RibbonDenoiser(RibbonTransformer(6, 12, 10, 2, 1))
    with (
        pytest.raises(ValueError, match=r"^RibbonTransformer: its rotary embedding cannot be scaled$"),
        ribbon.scaled_rotary(),
    ):
        pass
