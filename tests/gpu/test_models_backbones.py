"""The transformer with its attentions and experts, and the text encoder, on a GPU against a CPU."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luve_lightning.analysis.model_parts import cast_weights
from luve_lightning.models.backbones import denoiser_of, load_backbone
from luve_lightning.models.experts import activate, expert_parameters
from tests.helpers.gpu import FLOAT32, assert_rounds_like, coarse, error
from tests.helpers.wide_wan import ATTENTIONS, LONG, SHORT, wide_inputs, wide_transformer


def velocity(transformer: Any, inputs: list[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """In inference mode, as a pipeline runs it."""
    transformer = deepcopy(transformer)
    cast_weights(transformer, dtype)
    latents, timestep, text = (x.to(device) for x in inputs)
    with torch.inference_mode():
        return denoiser_of(transformer.to(device)).velocity(latents.to(dtype), timestep, text.to(dtype))


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize(("batch", "size"), [(3, SHORT), (1, LONG)], ids=["short", "long"])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_it_gives_what_the_cpu_gives(device: torch.device, kind: str, batch: int, size: tuple[int, int, int]) -> None:
    """With each expert and without one; long clips with one, to save time."""
    transformer = wide_transformer(ATTENTIONS[kind], ("lfe", "hfe"))
    inputs, cpu = wide_inputs(batch, size), torch.device("cpu")
    outputs = []
    for expert in (None, "lfe", "hfe") if size == SHORT else ("lfe",):
        activate(transformer, expert)
        exact = velocity(transformer, inputs, cpu, torch.float32)
        plain = velocity(transformer, inputs, cpu, torch.bfloat16)
        assert error(velocity(transformer, inputs, device, torch.float32), exact) < FLOAT32
        got = velocity(transformer, inputs, device, torch.bfloat16)
        assert got.dtype == torch.bfloat16
        assert_rounds_like(got, plain, exact)
        outputs.append(exact)
    assert all(error(other, outputs[0]) > 0.05 for other in outputs[1:]), "an expert changes what is compared"


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("expert", [None, "lfe", "hfe"])
@pytest.mark.parametrize("kind", ["own", "windows"])
def test_gradients_are_the_cpus(device: torch.device, kind: str, expert: str | None) -> None:
    """In bfloat16 as training is: the frozen base in it, under autocast where all weights train."""
    experts = () if expert is None else (expert,)

    def step(where: torch.device, half: bool) -> list[Tensor]:
        transformer = wide_transformer(ATTENTIONS[kind], experts).train()
        if half and expert is not None:
            cast_weights(transformer, torch.bfloat16)
            for parameter in expert_parameters(transformer, expert):
                parameter.data = parameter.data.float()
        denoiser = denoiser_of(transformer.to(where))
        trained = [p for p in transformer.parameters() if p.requires_grad]
        latents, timestep, text = (x.to(where) for x in wide_inputs(3))
        with torch.autocast(where.type, torch.bfloat16, enabled=half):
            found = denoiser.velocity(latents.to(denoiser.dtype), timestep, text.to(denoiser.dtype))
        loss = (found.float() - latents).square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, trained)]

    exact, plain = step(torch.device("cpu"), False), step(torch.device("cpu"), True)
    assert error(step(device, False), exact) < FLOAT32
    assert_rounds_like(step(device, True), plain, exact)


@torch.inference_mode()
@pytest.mark.usefixtures("exact_float32")
def test_captions_are_embedded_as_on_the_cpu(device: torch.device, tiny_backbone: Path) -> None:
    captions = ["a red boat sails", "", "coloured squares drift to the left " * 3]
    text = load_backbone(tiny_backbone).text()
    coarse(text.encoder)
    exact = text(captions)
    plain = deepcopy(text).bfloat16()(captions)
    assert error(deepcopy(text).to(device)(captions), exact) < FLOAT32
    got = text.to(device).bfloat16()(captions)
    assert_rounds_like(got, plain, exact)
    assert not got[1, 2:].any(), "padding is zero"
