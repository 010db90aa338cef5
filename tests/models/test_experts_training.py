"""Training experts: checkpointing, compilation, 16 bits and several processes change no gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from luve_lightning.models.experts import (
    activate,
    add_expert,
    expert_parameters,
    load_expert,
    route_by_sigma,
    train_only,
)
from tests.helpers.expert_processes import data_parallel_step, gradients, prepared, sharded_save
from tests.helpers.processes import run_processes
from tests.helpers.resumable import Run
from tests.helpers.tiny_wan import HFE, LFE, inputs, output, tiny_transformer

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def keep_attention(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op == ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def all_but_attention(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Recompute everything except what attention gave."""
    contexts = partial(create_selective_checkpoint_contexts, keep_attention)
    result: Tensor = checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
    return result


def two_passes(transformer: WanTransformer3DModel) -> list[Tensor]:
    """Gradients of the sum of two passes with other grids and other choices, and a third choice before backward."""
    train_only(transformer, None)
    for name in ("lfe", "hfe"):
        for parameter in expert_parameters(transformer, name):
            parameter.requires_grad_(True).grad = None
    activate(transformer, "lfe")
    first = output(transformer, inputs(size=(2, 12, 10)))
    route_by_sigma(transformer, torch.tensor([0.9, 0.2]))
    second = output(transformer, inputs(size=(2, 10, 12)))
    activate(transformer, None)
    (first.square().mean() + second.square().mean()).backward()
    return [p.grad for name in ("lfe", "hfe") for p in expert_parameters(transformer, name) if p.grad is not None]


@pytest.mark.parametrize("function", [None, all_but_attention], ids=["plain", "selective"])
def test_checkpointing_changes_no_gradient(function: Callable[..., Tensor] | None) -> None:
    """Two grids of one token count before one backward; what each pass used is recomputed."""
    want = two_passes(prepared())
    transformer = prepared()
    transformer.enable_gradient_checkpointing(function)
    got = two_passes(transformer)
    assert len(want) == len(got) == 8
    for g, w in zip(got, want, strict=True):
        assert w.abs().max() > 1e-6
        torch.testing.assert_close(g, w)


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    eager, compiled = prepared(num_layers=1), prepared(num_layers=1)
    run = torch.compile(compiled, backend="eager", fullgraph=True)
    with torch.no_grad():
        for choice in ("lfe", "hfe", {"lfe": [True, False], "hfe": [False, True]}):
            activate(eager, choice)
            activate(compiled, choice)
            torch.testing.assert_close(output(run, inputs()), output(eager, inputs()))
        torch.testing.assert_close(output(run, inputs(size=(3, 6, 8))), output(eager, inputs(size=(3, 6, 8))))


@pytest.mark.slow
def test_compiled_blocks_train_with_checkpointing() -> None:
    want = two_passes(prepared())
    transformer = prepared()
    transformer.enable_gradient_checkpointing()
    transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    for g, w in zip(two_passes(transformer), want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["bfloat16 expert", "float32 expert"])
def test_a_bfloat16_base(dtype: torch.dtype | None) -> None:
    exact = prepared()
    with torch.no_grad():
        want = output(exact, inputs())
    transformer = tiny_transformer().to(torch.bfloat16)
    arguments = inputs(dtype=torch.bfloat16)
    with torch.no_grad():
        base = output(transformer, arguments)
    add_expert(transformer, "lfe", LFE, dtype)
    with torch.no_grad():
        assert torch.equal(output(transformer, arguments), base)
    for new, old in zip(expert_parameters(transformer, "lfe"), expert_parameters(exact, "lfe"), strict=True):
        assert new.dtype == (dtype or torch.bfloat16)
        new.data.copy_(old)
    got = output(transformer, arguments)
    assert got.dtype == torch.bfloat16
    # What bfloat16 does to the whole transformer is the measure, the correction is several times as large.
    assert (got - want).abs().mean() < 0.3 * (base - want).abs().mean()
    got.float().square().mean().backward()
    output(exact, inputs()).square().mean().backward()
    for gradient, w in zip(gradients(transformer), gradients(exact), strict=True):
        assert torch.nn.functional.cosine_similarity(gradient.float().flatten(), w.flatten(), dim=0) > 0.99


def test_autocast_filters_in_float32() -> None:
    """A high-pass of a large mean, which bfloat16 products would turn into noise."""
    transformer = tiny_transformer()
    add_expert(transformer, "hfe", HFE)
    layer = transformer.blocks[0].ffn
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output(transformer, inputs())
        call = layer.expert_call
        hidden = layer.hidden(torch.full((1, 60, 24), 50.0), "hfe", call.experts["hfe"], call)
    assert hidden.dtype == torch.bfloat16
    assert hidden.abs().max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("function", [data_parallel_step, sharded_save])
def test_two_processes_give_the_gradients_of_one(function: Any, tmp_path: Path) -> None:
    run = Run(tmp_path, processes=2)
    assert run_processes(run, function) == [0, 0], (tmp_path / "output-0.txt").read_text()
    transformer = prepared()
    output(transformer, inputs()).square().mean().backward()
    for rank in range(2):
        for got, want in zip(torch.load(tmp_path / f"gradients-{rank}.pt"), gradients(transformer), strict=True):
            torch.testing.assert_close(got, want)
    if function is sharded_save:
        copy = tiny_transformer()
        load_expert(copy, tmp_path / "lfe")
        for got, want in zip(expert_parameters(copy, "lfe"), expert_parameters(transformer, "lfe"), strict=True):
            assert torch.equal(got, want)
