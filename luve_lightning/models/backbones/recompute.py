"""What training keeps of a transformer's blocks, and what the backward pass computes again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from luve_lightning.models.attention.tiles import BLOCK_ATTENTION

Recompute = Literal["nothing", "blocks", "all_but_attention"]
"""What the backward pass computes again."""


def set_recompute(
    transformer: Any, blocks: Sequence[nn.Module], recompute: Recompute, keep_attention: int | None = None
) -> None:
    """Choose what training recomputes in the backward pass.

    At 2K and 49 frames, dense self-attention over 191,000 tokens is 93 % of a forward pass of Wan2.1-1.3B.
    Recomputing whole blocks would pay for it once more; keeping its outputs costs one tensor of the model's width
    per block.

    Args:
        transformer: a diffusers ModelMixin, which can checkpoint its blocks.
        blocks: its blocks in order of execution.
        recompute: "nothing" keeps every activation; "blocks" keeps only each block's input; "all_but_attention" also
            keeps the outputs of self-attention.
        keep_attention: with "all_but_attention", in how many blocks; None is all. At 2K and 49 frames one block's
            output is 0.55 GiB, and computing it again is 3 % of a forward pass with dense attention.

    Raises:
        ValueError: for another word, or a useless number of blocks.
    """
    if keep_attention is not None and (recompute != "all_but_attention" or not 0 <= keep_attention <= len(blocks)):
        raise ValueError(
            f"keep_attention: expected 0 to {len(blocks)} blocks, and recompute: all_but_attention; got "
            f"{keep_attention} and {recompute}"
        )
    for number, block in enumerate(blocks):
        # On the block, so that a copy of the transformer behaves the same.
        block.keeps_attention = keep_attention is None or number < keep_attention  # type: ignore[assignment]
    if recompute == "nothing":
        transformer.disable_gradient_checkpointing()
    elif recompute == "blocks":
        transformer.enable_gradient_checkpointing()
    elif recompute == "all_but_attention":
        transformer.enable_gradient_checkpointing(_keeping_attention)
    else:
        raise ValueError(f"recompute: expected 'nothing', 'blocks' or 'all_but_attention', got {recompute!r}")


_ATTENTION = (
    *(
        getattr(torch.ops.aten, name).default
        for name in (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
        )
    ),
    BLOCK_ATTENTION,
)


def _keeping_attention(block: Callable[..., Any], *args: Any) -> Any:
    if not getattr(block, "keeps_attention", True):
        return checkpoint(block, *args, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep self-attention; repeating attention over a few hundred text tokens is cheap."""
    del context
    if operator in _ATTENTION:
        query, key = (kwargs.get(name, args[i] if i < len(args) else None) for i, name in enumerate(("query", "key")))
        if query is not None and key is not None and query.shape[-2] == key.shape[-2]:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
