"""What is recomputed changes time and memory, not numbers; and self-attention is not run again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from luve_lightning.models.experts import add_expert, expert_parameters
from luve_lightning.models.recompute import set_recompute
from tests.helpers.tiny_wan import LFE, inputs, output, randomise, tiny_transformer

BLOCKS, TOKENS, WORDS = 2, 60, 3


class AttentionCalls(TorchDispatchMode):
    """Numbers of keys of the attentions computed."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__
        if "scaled_dot_product" in name and "backward" not in name:
            self.keys.append(args[1].shape[-2])
        return function(*args, **(kwargs or {}))


def prepared(expert: bool, dtype: torch.dtype) -> tuple[WanTransformer3DModel, list[Tensor]]:
    """A transformer, and what of it is trained: everything, or an expert on a frozen base."""
    transformer = tiny_transformer().to(dtype)
    if not expert:
        return transformer, list(transformer.parameters())
    add_expert(transformer, "lfe", LFE, torch.float32)
    randomise(transformer, "lfe")
    return transformer, list(expert_parameters(transformer, "lfe"))


def step(recompute: Any, expert: bool, dtype: torch.dtype) -> tuple[list[Tensor], list[int], list[int]]:
    """Loss and gradients of one step; the attentions of its forward and of its backward pass."""
    transformer, trained = prepared(expert, dtype)
    set_recompute(transformer, recompute)
    with AttentionCalls() as forward:
        loss = output(transformer, inputs(dtype=dtype)).float().square().mean()
    with AttentionCalls() as backward:
        loss.backward()
    assert all(p.grad is not None for p in trained)
    gradients = [p.grad for p in trained if p.grad is not None]
    return [loss.detach(), *gradients], forward.keys, backward.keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("expert", [False, True], ids=["all weights", "expert"])
def test_numbers_stay_and_self_attention_is_kept(expert: bool, dtype: torch.dtype) -> None:
    want, forward, again = step("nothing", expert, dtype)
    assert (forward, again) == ([TOKENS, WORDS] * BLOCKS, [])
    repeated = {"blocks": [TOKENS, WORDS] * BLOCKS, "all_but_attention": [WORDS] * BLOCKS}
    for recompute, expected in repeated.items():
        got, forward, again = step(recompute, expert, dtype)
        assert forward == [TOKENS, WORDS] * BLOCKS
        assert again == expected, recompute
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w), recompute


def test_the_choice_can_be_taken_back_and_has_three_words() -> None:
    transformer, _ = prepared(True, torch.float32)
    set_recompute(transformer, "all_but_attention")
    set_recompute(transformer, "nothing")
    loss = output(transformer, inputs()).square().mean()
    with AttentionCalls() as backward:
        loss.backward()
    assert backward.keys == []
    with pytest.raises(ValueError, match=r"recompute: expected 'nothing', 'blocks' or .*, got 'all'"):
        set_recompute(transformer, "all")  # type: ignore[arg-type]
