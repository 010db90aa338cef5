"""What training keeps of a transformer's blocks, and what the backward pass computes again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from luve_lightning.models.attention.tiles import BLOCK_ATTENTION

Recompute = Literal["nothing", "blocks", "all_but_attention"]
"""What the backward pass computes again."""


_PART = 2**28  # bytes; pinned memory is handed out in powers of two


def set_recompute(
    transformer: Any,
    blocks: Sequence[nn.Module],
    recompute: Recompute,
    keep_attention: int | None = None,
    offload: bool = False,
    chunks: int = 1,
    feed_forwards: Sequence[nn.Module] = (),
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
        offload: keep the blocks' inputs in the host's memory between the passes. They are copied while the GPU
            computes. At 4K and 49 frames the inputs of Wan2.1-1.3B's 30 blocks are 36 GiB.
        chunks: parts of the tokens that pass the feed-forward one after another in training, each kept by its input
            alone. At 4K and 49 frames one of its hidden tensors is 7.1 GiB; each block computes it once more.
        feed_forwards: the blocks' feed-forward modules, for `chunks`.

    Raises:
        ValueError: for another word, a useless number of blocks or chunks, or nothing to offload.
    """
    if chunks < 1:
        raise ValueError(f"chunks: expected at least 1, got {chunks}")
    for module in feed_forwards:
        _set_chunks(module, chunks)
    if keep_attention is not None and (recompute != "all_but_attention" or not 0 <= keep_attention <= len(blocks)):
        raise ValueError(
            f"keep_attention: expected 0 to {len(blocks)} blocks, and recompute: all_but_attention; got "
            f"{keep_attention} and {recompute}"
        )
    if recompute not in get_args(Recompute):
        raise ValueError(f"recompute: expected 'nothing', 'blocks' or 'all_but_attention', got {recompute!r}")
    if recompute == "nothing":
        if offload:
            raise ValueError(
                "offload: the blocks' inputs are kept alone only with recompute: blocks or all_but_attention"
            )
        transformer.disable_gradient_checkpointing()
        return
    host = _Host() if offload else None
    for number, block in enumerate(blocks):
        # On the block, so that a copy of the transformer behaves the same.
        some: Any = block
        some.keeps_attention = recompute == "all_but_attention" and (keep_attention is None or number < keep_attention)
        some.input_host = host
    transformer.enable_gradient_checkpointing(_checkpointed)


def _checkpointed(block: Any, *args: Any) -> Any:
    kept: dict[str, Any] = (
        {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if block.keeps_attention else {}
    )
    # The hooks act on what the checkpoint keeps of its arguments; inside it, its own do.
    with nullcontext() if block.input_host is None else block.input_host.keeping(args[0].shape):
        return checkpoint(block, *args, use_reentrant=False, **kept)


class _InChunks:
    """A feed-forward whose tokens pass in chunks where there are gradients, each kept by its input alone.

    Mixed into the class of a module that is there already: weights, names and hooks stay.
    """

    chunks: int

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.chunks > 1 and torch.is_grad_enabled():
            return self._chunked(tokens, *args, **kwargs)
        output: Tensor = super().forward(tokens, *args, **kwargs)  # type: ignore[misc]
        return output

    @torch.compiler.disable  # inner checkpoints run again on their own, outside a compiled block
    def _chunked(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        run = partial(super().forward, *args, **kwargs)  # type: ignore[misc]
        return torch.cat([checkpoint(run, part, use_reentrant=False) for part in tokens.chunk(self.chunks, dim=1)], 1)


def _set_chunks(module: Any, chunks: int) -> None:
    if not isinstance(module, _InChunks):
        if chunks == 1:
            return
        kind: Any = type(module)
        module.__class__ = _in_chunks(kind)
    module.chunks = chunks


@cache  # one class for all blocks: compiled code tells classes apart
def _in_chunks(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Chunked{kind.__name__}", (_InChunks, kind), {})


class _Host:
    """Keeps the inputs of a transformer's blocks in the host's memory between the forward and the backward pass."""

    def __init__(self) -> None:
        self.last: Callable[[], _HostCopy | None] = lambda: None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Host, ()  # a copy of the transformer has passes of its own

    def keeping(self, shape: torch.Size) -> saved_tensors_hooks:
        """A context in which autograd keeps tensors of this shape on the host."""

        # Autograd keeps both functions as long as what it saved: a tensor named in them would stay on the GPU.
        def pack(x: Tensor) -> Tensor | _HostCopy:
            if x.shape != shape:
                return x
            before = self.last()
            copy = _HostCopy(x, self.last)
            if before is not None:
                before.release()
            self.last = weakref.ref(copy)
            return copy

        return saved_tensors_hooks(pack, lambda kept: kept.tensor() if isinstance(kept, _HostCopy) else kept)


class _HostCopy:
    """A tensor in the host's memory, pinned for a GPU, and copied on a stream of its own.

    The computation waits for a copy before its memory on the GPU is given back; a block takes longer than a copy.
    `record_stream` would hold the memory for as long as the GPU is behind the program, which is a whole pass.

    Args:
        x: the tensor.
        before: the copy that the backward pass needs next: the one made before this.
    """

    def __init__(self, x: Tensor, before: Callable[[], _HostCopy | None]) -> None:
        self.shape, self.dtype, self.device, self.before = x.shape, x.dtype, x.device, before
        self.stream = torch.Stream(x.device) if x.is_cuda else None
        self.back: Tensor | None = x.detach()  # on the device, until the next copy is made
        parts = self.back.reshape(-1).split(_PART // x.itemsize)
        # What is only counted takes no memory on the host either.
        host = "meta" if x.is_meta else "cpu"
        self.parts = [
            torch.empty_like(part[:0] if x.is_meta else part, device=host, pin_memory=x.is_cuda) for part in parts
        ]
        self._copy(zip(self.parts, parts, strict=True))

    def release(self) -> None:
        """Give the memory on the device back."""
        if self.back is not None:
            self._wait()
            self.back = None

    def fetch(self) -> None:
        """Begin to copy it back, unless it is there."""
        if self.back is None:
            self.back = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            parts = self.back.view(-1).split(_PART // self.back.itemsize)
            self._copy(zip(parts, self.parts, strict=True))

    def tensor(self) -> Tensor:
        """It, on its device; the next one begins to be copied."""
        self.fetch()
        self._wait()
        following = self.before()
        if following is not None:
            following.fetch()
        assert self.back is not None
        back, self.back = self.back, None
        return back

    def __del__(self) -> None:
        self.release()  # a backward pass may have broken off during a copy

    def _wait(self) -> None:
        """Let the computation wait for the copy."""
        if self.stream is not None:
            torch.accelerator.current_stream(self.device).wait_stream(self.stream)

    def _copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        if self.device.type == "meta":
            return
        if self.stream is None:
            for target, source in pairs:
                target.copy_(source)
            return
        self.stream.wait_stream(torch.accelerator.current_stream(self.device))
        with self.stream:
            for target, source in pairs:
                target.copy_(source, non_blocking=True)


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


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep self-attention; repeating attention over a few hundred text tokens is cheap."""
    del context
    if operator in _ATTENTION:
        query, key = (kwargs.get(name, args[i] if i < len(args) else None) for i, name in enumerate(("query", "key")))
        if query is not None and key is not None and query.shape[-2] == key.shape[-2]:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
