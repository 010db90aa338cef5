"""Experts on disk: PEFT's files, bit for bit, and one clear line when they do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, PeftModel

from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.models.backbones import denoiser_of
from luve_lightning.models.experts import (
    activate,
    add_expert,
    expert_names,
    expert_parameters,
    load_expert,
    route_by_sigma,
    save_expert,
    train_only,
)
from luve_lightning.models.experts.layer import custom_modules
from tests.helpers.tiny_wan import HFE, LFE, inputs, output, randomise, tiny_transformer

EVERYWHERE = replace(HFE, place=("attention", "cross_attention", "feed_forward"), filter=None, alpha=1.5)


def saved(folder: Path, **experts: Any) -> WanTransformer3DModel:
    """A transformer whose experts are under `folder`, by name."""
    transformer = tiny_transformer()
    for name, config in experts.items():
        add_expert(transformer, name, config)
        randomise(transformer, name)
        save_expert(transformer, name, folder / name)
    return transformer


@pytest.mark.parametrize("config", [LFE, HFE, EVERYWHERE], ids=["lfe", "hfe", "everywhere"])
def test_loads_what_was_saved(config: Any, tmp_path: Path) -> None:
    first = saved(tmp_path, expert=config)
    second = tiny_transformer()
    assert load_expert(second, tmp_path / "expert") == "expert"
    assert second.expert_state.configs["expert"] == config
    assert not any(p.requires_grad for p in second.parameters())
    with torch.no_grad():
        assert torch.equal(output(second, inputs()), output(first, inputs()))
        assert not torch.equal(output(second, inputs()), output(tiny_transformer(), inputs()))


def test_two_experts_with_names_of_one_stem(tmp_path: Path) -> None:
    """PEFT looks for the name within the names of weights."""
    first = saved(tmp_path, lfe=LFE, lfe2=replace(LFE, rank=2, band=SigmaBand(0, 0.5)))
    second = tiny_transformer()
    for name in ("lfe2", "lfe"):
        load_expert(second, tmp_path / name)
    assert expert_names(second) == ["lfe2", "lfe"]
    for transformer in (first, second):
        route_by_sigma(transformer, torch.tensor([0.9, 0.1]))
    with torch.no_grad():
        assert torch.equal(output(second, inputs()), output(first, inputs()))


def test_a_float32_expert_on_a_bfloat16_base_keeps_its_bits(tmp_path: Path) -> None:
    first = saved(tmp_path, lfe=LFE)
    second = tiny_transformer().to(torch.bfloat16)
    load_expert(second, tmp_path / "lfe", "renamed")
    for got, want in zip(expert_parameters(second, "renamed"), expert_parameters(first, "lfe"), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


def test_loading_leaves_the_trained_expert_trainable(tmp_path: Path) -> None:
    saved(tmp_path, hfe=HFE)
    transformer = tiny_transformer()
    add_expert(transformer, "lfe", LFE)
    load_expert(transformer, tmp_path / "hfe")
    assert all(p.requires_grad for p in expert_parameters(transformer, "lfe"))
    assert not any(p.requires_grad for p in expert_parameters(transformer, "hfe"))
    train_only(transformer, None)
    load_expert(transformer, tmp_path / "hfe", "again")
    assert not any(p.requires_grad for p in transformer.parameters())


def test_pefts_own_loader_reads_it(tmp_path: Path) -> None:
    first = saved(tmp_path, lfe=LFE)
    config = LoraConfig.from_pretrained(tmp_path / "lfe")
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 8, {"attn1"})
    config._register_custom_module(custom_modules(denoiser_of(first)))
    model = PeftModel.from_pretrained(tiny_transformer(), tmp_path / "lfe", config=config)
    for index, block in enumerate(model.base_model.model.blocks):
        for part in ("lora_A", "lora_B"):
            want = getattr(first.blocks[index].attn1, part)["lfe"].weight
            assert torch.equal(getattr(block.attn1, part)["default"].weight, want)
    with pytest.raises(ValueError, match="was not made by add_expert or load_expert"):
        output(model, inputs())  # without its filter it must not pretend


def test_saving_again_replaces(tmp_path: Path) -> None:
    transformer = saved(tmp_path, lfe=LFE)
    randomise(transformer, "lfe", scale=1)
    save_expert(transformer, "lfe", tmp_path / "lfe")
    again = tiny_transformer()
    load_expert(again, tmp_path / "lfe")
    activate(transformer, "lfe")
    with torch.no_grad():
        assert torch.equal(output(again, inputs()), output(transformer, inputs()))
    names = {"adapter_config.json", "adapter_model.safetensors", "expert.json"}
    assert {file.name for file in (tmp_path / "lfe").iterdir()} == names


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_a_weight(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    weights.pop("base_model.model.blocks.1.attn1.lora_B.weight")
    safetensors.torch.save_file(weights, folder / "adapter_model.safetensors")


def with_a_nan(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.blocks.1.attn1.lora_B.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "sizes", "message"),
    [
        (lambda f: shutil.rmtree(f), {}, "expert.json is missing"),
        (lambda f: (f / "adapter_config.json").unlink(), {}, "adapter_config.json is missing"),
        (lambda f: (f / "expert.json").write_text("{"), {}, "expert.json: not JSON"),
        (lambda f: edit(f / "expert.json", format=2), {}, "format 2, expected 1"),
        (lambda f: edit(f / "expert.json", band={"lo": 0}), {}, "lacks or misnames"),
        (lambda f: edit(f / "expert.json", place=["feed_forward"]), {}, "is for modules .'attn1'., expert.json for"),
        (lambda f: edit(f / "adapter_config.json", use_dora=True), {}, "use_dora is True"),
        (lambda f: edit(f / "adapter_config.json", r=0), {}, "expert rank 0"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 20), {}, "not a safetensors file"),
        (lambda f: edit(f / "expert.json", band={"low": 1, "high": 0}), {}, r"lfe: expert.json or .*: a band of sig"),
        (with_a_nan, {}, r"blocks.1.attn1.lora_B.weight holds values that are not numbers"),
        (without_a_weight, {}, "blocks.1.attn1.lora_B.weight is missing"),
        (lambda f: None, {"num_layers": 3}, r"\(3 blocks\): .*blocks.2.attn1.lora_A.weight is missing"),
        (lambda f: None, {"num_layers": 1}, "blocks.1.attn1.lora_A.weight is too many"),
        (
            lambda f: None,
            {"num_attention_heads": 1},
            r"blocks.0.attn1.lora_A.weight has shape \(4, 24\), expected \(4, 12\)",
        ),
    ],
)
def test_says_what_does_not_fit(
    damage: Callable[[Path], Any], sizes: dict[str, int], message: str, tmp_path: Path
) -> None:
    saved(tmp_path, lfe=LFE)
    damage(tmp_path / "lfe")
    transformer = tiny_transformer(**sizes)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_expert(transformer, tmp_path / "lfe")
    assert "\n" not in str(error.value)
    assert not any("lora" in name for name, _ in transformer.named_parameters())


def test_refuses_an_existing_and_an_unknown_name(tmp_path: Path) -> None:
    transformer = saved(tmp_path, lfe=LFE)
    with pytest.raises(ValueError, match="'lfe': the transformer has an adapter of this name already"):
        load_expert(transformer, tmp_path / "lfe")
    with pytest.raises(ValueError, match="no expert 'hfe' here: its experts are lfe"):
        save_expert(transformer, "hfe", tmp_path / "hfe")
