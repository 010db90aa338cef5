"""Experts on a real, tiny WanTransformer3DModel: what they compute, and for which sample."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from luve_lightning.functional.frequency import FrequencyFilter
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.models.experts import (
    ExpertConfig,
    activate,
    add_expert,
    expert_names,
    expert_parameters,
    route_by_sigma,
    train_only,
)
from tests.helpers.tiny_wan import HFE, LFE, inputs, output, randomise, tiny_transformer

GRID = (2, 6, 5)  # of `inputs()`
CROSS = ExpertConfig(("attention", "cross_attention"), 2, 1.0, FrequencyFilter("low", 0.3, ("t", "h"), "gaussian"))


def with_experts(**experts: ExpertConfig) -> WanTransformer3DModel:
    """A transformer with trained-looking experts, lfe and hfe if none is named."""
    transformer = tiny_transformer()
    for name, config in (experts or {"lfe": LFE, "hfe": HFE}).items():
        add_expert(transformer, name, config)
        randomise(transformer, name)
    return transformer


def recorded(transformer: WanTransformer3DModel, module: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Inputs and outputs of a wrapped module of each block, and outputs of its expert layer, in one pass."""
    seen: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])

    def of_base(_: Any, args: Any, result: Tensor) -> None:
        seen[0].append(args[0])
        seen[1].append(result)

    layers = [getattr(block, module) for block in transformer.blocks]
    handles = [layer.base_layer.register_forward_hook(of_base) for layer in layers]
    handles += [layer.register_forward_hook(lambda _, __, result: seen[2].append(result)) for layer in layers]
    with torch.no_grad():
        output(transformer, inputs())
    for handle in handles:
        handle.remove()
    return seen


def test_new_experts_change_no_bit() -> None:
    transformer = tiny_transformer()
    with torch.no_grad():
        base = output(transformer, inputs())
        add_expert(transformer, "lfe", LFE)
        add_expert(transformer, "hfe", HFE)
        mixed = {"lfe": torch.tensor([True, False]), "hfe": torch.tensor([0.5, 1.0])}
        for choice in (None, "lfe", "hfe", mixed):
            activate(transformer, choice)
            assert torch.equal(output(transformer, inputs()), base)


def filtered_by_fourier(tokens: torch.Tensor, chosen: FrequencyFilter) -> torch.Tensor:
    """`filter_tokens` by the Fourier transform: the definition."""
    values, gain, dims = tokens.unflatten(1, GRID), tokens.new_ones(()), []
    for dim, (axis, length) in enumerate(zip("thw", GRID, strict=True), start=1):
        if axis in chosen.axes:
            gain = gain * chosen.response(length).float().view([length if d == dim else 1 for d in range(5)])
            dims.append(dim)
    gain = 1 - gain if chosen.band == "high" else gain
    return torch.fft.ifftn(torch.fft.fftn(values, dim=dims) * gain, dim=dims).real.flatten(1, 3)


@pytest.mark.parametrize(
    ("config", "module"),
    [(LFE, "attn1"), (HFE, "ffn"), (CROSS, "attn1"), (CROSS, "attn2"), (replace(LFE, filter=None), "attn1")],
)
def test_adds_a_lora_of_the_filtered_input(config: ExpertConfig, module: str) -> None:
    """y = module(x) + alpha / rank * B(A(filter(x))): filtered first, by the Fourier transform."""
    transformer = with_experts(expert=config)
    for block, x, base, got in zip(transformer.blocks, *recorded(transformer, module), strict=True):
        layer = getattr(block, module)
        a, b = layer.lora_A["expert"].weight, layer.lora_B["expert"].weight
        filtered = x if config.filter is None else filtered_by_fourier(x, config.filter)
        want = base + config.alpha / config.rank * (filtered @ a.T @ b.T)
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
        assert (got - base).abs().mean() > 1e-3


@pytest.mark.parametrize(("name", "module"), [("lfe", "attn1"), ("hfe", "ffn")])
def test_nothing_beyond_the_cutoff_reaches_b(name: str, module: str) -> None:
    """The spectrum of what B multiplies: none above an ideal low-pass's cutoff, none below a high-pass's."""
    transformer = with_experts()
    activate(transformer, name)
    x = recorded(transformer, module)[0][0]
    layer = getattr(transformer.blocks[0], module)
    with torch.no_grad():
        hidden = layer.hidden(x, name, layer.expert_call.experts[name], layer.expert_call)
    power = torch.fft.fftn(hidden.double().unflatten(1, GRID), dim=(2, 3)).abs().square().sum((0, 1, 4))
    h, w = (torch.fft.fftfreq(n).abs() * 2 for n in GRID[1:])
    below = (h[:, None] <= 0.5) & (w <= 0.5)
    inside, outside = (power[below], power[~below]) if name == "lfe" else (power[~below], power[below])
    assert inside.sum() > 1
    assert outside.sum() < 1e-12 * inside.sum()


def test_each_sample_gets_the_expert_of_its_sigma() -> None:
    transformer = with_experts()
    arguments = inputs(batch=4)
    with torch.no_grad():
        alone = {}
        for name in ("lfe", "hfe", None):
            activate(transformer, name)
            alone[name] = output(transformer, arguments)
        route_by_sigma(transformer, torch.tensor([1.0, 0.8749, 0.875, 0.0]))
        routed = output(transformer, arguments)
    for sample, name in enumerate(("lfe", "hfe", "lfe", "hfe")):
        torch.testing.assert_close(routed[sample], alone[name][sample])
        assert not torch.allclose(routed[sample], alone[None][sample], atol=1e-3)


def test_a_sigma_outside_every_band_is_the_bases() -> None:
    transformer = with_experts(narrow=replace(LFE, band=SigmaBand(0.4, 0.6)))
    with torch.no_grad():
        route_by_sigma(transformer, 0.7)
        got = output(transformer, inputs())
        activate(transformer, None)
        assert torch.equal(got, output(transformer, inputs()))


def test_weights_scale_the_correction() -> None:
    transformer = with_experts(hfe=HFE)
    corrections = []
    for weight in (1.0, 0.5):
        activate(transformer, {"hfe": torch.tensor([weight, weight])})
        _, base, got = recorded(transformer, "ffn")
        corrections.append(got[0] - base[0])
    torch.testing.assert_close(corrections[1], corrections[0] / 2, atol=1e-6, rtol=1e-4)


def test_an_unused_expert_costs_nothing() -> None:
    transformer = with_experts()

    def flops(choice: Any) -> int:
        activate(transformer, choice)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            output(transformer, inputs())
        return int(counter.get_total_flops())

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output(tiny_transformer(), inputs())
    base = counter.get_total_flops()
    assert flops(None) == flops({"lfe": [False, False], "hfe": torch.zeros(2)}) == base
    assert base < flops("hfe") == flops({"lfe": [False, False], "hfe": [True, False]})


def test_pefts_own_switches_choose_too() -> None:
    transformer = with_experts()
    with torch.no_grad():
        activate(transformer, "lfe")
        low = output(transformer, inputs())
        activate(transformer, None)
        base = output(transformer, inputs())
        transformer.set_adapter("lfe")
        assert torch.equal(output(transformer, inputs()), low)
        transformer.disable_adapters()
        assert torch.equal(output(transformer, inputs()), base)
        transformer.enable_adapters()
        assert torch.equal(output(transformer, inputs()), low)
        transformer.delete_adapters("lfe")
        assert expert_names(transformer) == ["hfe"]
        activate(transformer, None)
        assert torch.equal(output(transformer, inputs()), base)


def test_a_plain_lora_on_the_base_stays_active() -> None:
    """PEFT switches adapters off when another one is added, silently."""
    transformer = tiny_transformer()
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "adaptation")
    with torch.no_grad():
        adapted = output(transformer, inputs())
        add_expert(transformer, "lfe", LFE)
        assert torch.equal(output(transformer, inputs()), adapted)


def test_a_copy_has_its_own_experts() -> None:
    transformer = with_experts()
    activate(transformer, "lfe")
    twin = copy.deepcopy(transformer)
    activate(twin, "hfe")
    randomise(twin, "lfe", scale=1)
    with torch.no_grad():
        got = output(transformer, inputs())
        assert not torch.equal(got, output(twin, inputs()))
        activate(twin, "lfe")
        assert not torch.equal(got, output(twin, inputs(size=(2, 10, 12))))
        assert torch.equal(got, output(transformer, inputs()))


def test_only_the_chosen_expert_is_trainable() -> None:
    transformer = with_experts()

    def trainable() -> set[str]:
        return {name for name, p in transformer.named_parameters() if p.requires_grad}

    assert len(trainable()) == 4
    assert all("lora" in name and "hfe" in name for name in trainable())
    activate(transformer, "lfe")
    assert all("hfe" in name for name in trainable())
    train_only(transformer, "lfe")
    assert len(trainable()) == 4
    assert all("lfe" in name for name in trainable())
    train_only(transformer, None)
    assert not trainable()


def add_to(transformer: Any, name: str = "x", **changes: Any) -> None:
    add_expert(transformer, name, replace(LFE, **changes))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda t: add_to(t, rank=0), "expert rank 0: expected an integer >= 1"),
        (lambda t: add_to(t, alpha=-1.0), "expert alpha -1.0"),
        (lambda t: add_to(t, place="norm"), "expert place 'norm': expected one or more of attention"),
        (lambda t: add_to(t, place=()), "expert place"),
        (lambda t: add_to(t, "lfe"), "'lfe': the transformer has an adapter of this name already"),
        (lambda t: add_to(t, "a.b"), "expert name 'a.b'"),
        (lambda t: add_to(t, "lora_A"), "expert name 'lora_A'"),
        (lambda t: add_to(torch.nn.Linear(2, 2)), "got Linear"),
        (lambda t: add_to(t.to(torch.float8_e4m3fn)), "the transformer is quantised .torch.float8_e4m3fn"),
        (lambda t: activate(t, "x"), "no expert 'x' here: its experts are lfe, hfe"),
        (lambda t: activate(t, {"lfe": [1.0], "x": [1.0]}), "no expert 'x'"),
        (lambda t: activate(t, {"lfe": [True], "hfe": [True, False]}), r"different sizes: \[1, 2\]"),
        (lambda t: activate(t, {"lfe": [float("nan"), 1.0]}), "one finite number per sample"),
        (lambda t: expert_parameters(t, "x"), "no expert 'x'"),
        (lambda t: train_only(t, "x"), "no expert 'x'"),
        (lambda t: activate(tiny_transformer(), "lfe"), "its experts are none"),
        (lambda t: route_by_sigma(t, torch.tensor([0.5]).bfloat16()), "bfloat16"),
        (lambda t: route_by_sigma(t, torch.tensor(0.5).bfloat16()), "bfloat16"),
        (lambda t: route_by_sigma(t, torch.zeros(2, 2)), "one per sample"),
        (lambda t: route_by_sigma(t, float("nan")), "sigma is nan"),
        (lambda t: t.fuse_lora(), "cannot be merged"),
        (lambda t: t.blocks[0].attn1(torch.zeros(1, 2, 24)), "outside its transformer's forward pass"),
    ],
)
def test_says_what_is_wrong(action: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        action(with_experts())
    assert "\n" not in str(error.value)


def test_refuses_weights_for_another_batch() -> None:
    transformer = with_experts()
    activate(transformer, {"lfe": [True, False, True]})
    with pytest.raises(ValueError, match="lfe was activated for a batch of 3, the transformer was given 2"):
        output(transformer, inputs())


def test_refuses_dora() -> None:
    from luve_lightning.models.backbones import denoiser_of
    from luve_lightning.models.experts.layer import custom_modules

    config = LoraConfig(r=2, target_modules=["attn1"], use_dora=True)
    config._register_custom_module(custom_modules(denoiser_of(tiny_transformer())))
    with pytest.raises(ValueError, match="expert dora: DoRA, bias and dropout"):
        tiny_transformer().add_adapter(config, "dora")
