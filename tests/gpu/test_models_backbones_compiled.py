"""Compiled blocks against eager ones on a GPU: forward, gradients, inference, with what training recomputes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from luve_lightning.analysis.model_parts import cast_weights
from luve_lightning.models.backbones import denoiser_of
from luve_lightning.models.experts import activate, expert_parameters
from tests.helpers.gpu import BF16, DEVICE, FLOAT32, assert_rounds_like, error
from tests.helpers.wide_wan import ATTENTIONS, LONG, wide_inputs, wide_transformer

BACKEND = "inductor" if DEVICE.type == "cuda" else "aot_eager"
WAYS: dict[str, dict[str, Any]] = {
    "nothing": {"recompute": "nothing"},
    "kept": {"recompute": "all_but_attention", "keep_attention": 1, "offload": True},
    "chunks": {"recompute": "blocks", "chunks": 3},
}


@pytest.fixture(scope="module", autouse=True)
def forget_graphs() -> Iterator[None]:
    """One module's tests share graphs; the next file's are others."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(
    kind: str, device: torch.device, half: bool, compiled: bool, way: str, expert: str | None = None
) -> list[Tensor]:
    """Loss and gradients of the second of two steps, whose noise levels differ."""
    transformer = wide_transformer(ATTENTIONS[kind], () if expert is None else (expert,)).train()
    if half and expert is not None:
        cast_weights(transformer, torch.bfloat16)
        for parameter in expert_parameters(transformer, expert):
            parameter.data = parameter.data.float()
    denoiser = denoiser_of(transformer.to(device))
    denoiser.set_recompute(**WAYS[way])
    if compiled:
        denoiser.compile_blocks(BACKEND)
    trained = [p for p in transformer.parameters() if p.requires_grad]
    latents, timestep, text = (x.to(device) for x in wide_inputs(1, LONG))
    found: list[Tensor] = []
    for level in (timestep, timestep - 300):
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            velocity = denoiser.velocity(latents.to(denoiser.dtype), level, text.to(denoiser.dtype))
        loss = (velocity.float() - latents).square().mean()
        found = [loss.detach(), *torch.autograd.grad(loss, trained)]
    return found


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize(
    ("kind", "way", "expert"),
    [
        # Those with a replaced attention share graphs: it runs between them.
        pytest.param("windows", "nothing", None, id="windows"),
        pytest.param("windows", "kept", None, id="windows, attention kept in one block, inputs on the host"),
        pytest.param("tiles", "kept", None, id="tiles, likewise"),
        pytest.param("dense", "chunks", None, id="dense, recomputed, the feed-forward in chunks"),
        pytest.param("tiles", "kept", "lfe", id="tiles, attention kept in one block, an expert"),
    ],
)
def test_a_compiled_step_is_the_eager_one(device: torch.device, kind: str, way: str, expert: str | None) -> None:
    exact = step(kind, device, False, False, way, expert)
    plain = step(kind, device, True, False, way, expert)
    got = step(kind, device, True, True, way, expert)
    assert len(got) == len(exact)
    assert_rounds_like(got, plain, exact)


@pytest.mark.usefixtures("exact_float32")
def test_a_compiled_step_in_float32(device: torch.device) -> None:
    """The transformer's own attention inside the graph, as where nothing is replaced."""
    exact = step("own", device, False, False, "nothing")
    assert error(step("own", device, False, True, "kept"), exact) < FLOAT32


def test_a_compiled_pass_in_inference_mode(device: torch.device) -> None:
    """With each expert and without one, in bfloat16, as `luve generate` runs it."""
    transformer = wide_transformer(ATTENTIONS["tiles"], ("lfe", "hfe"))
    cast_weights(transformer, torch.bfloat16)
    denoiser = denoiser_of(transformer.to(device))
    latents, timestep, text = (x.to(device) for x in wide_inputs(1, LONG))

    def outputs() -> list[Tensor]:
        found = []
        for expert in ("lfe", "hfe", None):
            activate(transformer, expert)
            with torch.inference_mode():
                found.append(denoiser.velocity(latents.bfloat16(), timestep, text.bfloat16()))
        return found

    want = outputs()
    denoiser.compile_blocks(BACKEND)
    for got, eager in zip(outputs(), want, strict=True):
        # Both round some ten times a block, and three blocks in a row, in other places.
        assert error(got, eager) < 3 * BF16
    assert error(want[0], want[2]) > 10 * BF16, "an expert changes what is compared"
