"""Compiled blocks compute the same, share their graphs, and leave self-attention to what is recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from luve_lightning.models.attention import Where
from luve_lightning.models.attention.dense import Dense
from luve_lightning.models.backbones import denoiser_of
from luve_lightning.models.experts import add_expert, expert_parameters
from tests.helpers.tiny_wan import LFE, inputs, randomise, tiny_transformer
from tests.models.backbones.test_recompute import TOKENS, WORDS, AttentionCalls

BLOCKS = 9  # more than the 8 graphs that torch keeps of one function


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class CompiledAttentionCalls(AttentionCalls):
    """Also those inside compiled graphs; the base would keep anything from being compiled."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


@dataclass(frozen=True)
class Attentive(Dense):
    """Dense attention that notes what it is told."""

    told: list[tuple[int, Any]] = field(default_factory=list)

    @property
    def needs_sigma(self) -> bool:
        return True

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, where: Where, branch: nn.Module | None = None
    ) -> Tensor:
        self.told.append((where.layer, where.sigmas))
        return super().__call__(query, key, value, where, branch)


class Graphs:
    """A backend that counts what it compiles, without code generation."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, examples: Any) -> Any:
        self.count += 1
        return aot_eager(graph, examples)


def steps(
    backend: Graphs | None, replaced: bool, expert: bool, mixed: bool, recompute: Any = "all_but_attention"
) -> tuple[list[Tensor], list[int], list[int]]:
    """Loss and gradients of the second of two steps at two noise levels, and the attentions of its two passes."""
    frozen = torch.bfloat16 if mixed and expert else torch.float32
    transformer = tiny_transformer(num_layers=BLOCKS).to(frozen).train()
    trained = list(transformer.parameters())
    if expert:
        add_expert(transformer, "lfe", LFE, torch.float32)
        randomise(transformer, "lfe")
        trained = list(expert_parameters(transformer, "lfe"))
    denoiser = denoiser_of(transformer)
    attention = Attentive()
    if replaced:
        denoiser.use_attention(attention)
    denoiser.set_recompute(recompute, chunks=3 if replaced else 1)
    if backend is not None:
        denoiser.compile_blocks(backend)
    for timestep in (250.0, 500.0):
        transformer.zero_grad(set_to_none=True)
        calls = [CompiledAttentionCalls() if backend else AttentionCalls() for _ in range(2)]
        batch = inputs(dtype=frozen) | {"timestep": torch.full((2,), timestep)}
        with calls[0], torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = denoiser.velocity(*batch.values()).float().square().mean()
        with calls[1]:
            loss.backward()
    if replaced:
        assert set(attention.told) == {(layer, (sigma, sigma)) for layer in range(BLOCKS) for sigma in (0.25, 0.5)}
    return [loss.detach(), *(p.grad for p in trained if p.grad is not None)], calls[0].keys, calls[1].keys


@pytest.mark.slow
@pytest.mark.parametrize(
    ("replaced", "expert", "mixed"),
    [
        pytest.param(False, False, False, id="own attention-all weights-float32"),
        pytest.param(False, True, False, id="own attention-expert-float32"),
        pytest.param(True, False, False, id="replaced-all weights-float32"),
        pytest.param(True, True, False, id="replaced-expert-float32"),
        pytest.param(False, False, True, id="own attention-all weights-bf16-mixed"),
        pytest.param(True, True, True, id="replaced-expert-bf16-mixed"),
    ],
)
def test_a_compiled_step_is_the_eager_one(replaced: bool, expert: bool, mixed: bool) -> None:
    graphs = Graphs()
    got, forward, again = steps(graphs, replaced, expert, mixed)
    want, _, _ = steps(None, replaced, expert, mixed)
    # Self-attention is kept, cross-attention is not.
    assert (forward, again) == ([TOKENS, WORDS] * BLOCKS, [WORDS] * BLOCKS)
    # Whatever the number of blocks; the input of an expert's first block needs no gradient, so most is compiled twice.
    assert graphs.count == ((11 if expert else 5) if replaced else (2 if expert else 1))
    if not mixed:
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)
        return
    # Both round to bfloat16, in other places: one is about as far from the exact step as the other.
    exact, _, _ = steps(None, replaced, expert, False)
    assert distance(got, exact) < 1.5 * distance(want, exact)


def distance(some: list[Tensor], others: list[Tensor]) -> float:
    squares = [((s - o).square().sum(), o.square().sum()) for s, o in zip(some, others, strict=True)]
    return float(torch.stack([a / b for a, b in squares]).mean().sqrt())


def test_a_backend_that_torch_lacks_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^compile: expected a backend of torch\.compile such as inductor, got 'indctr'"
    ):
        denoiser_of(tiny_transformer()).compile_blocks("indctr")
