"""LoRAs under other programs' names: each is read back, by us and by those programs' own rules."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import WanPipeline
from safetensors import safe_open

from luve_lightning.cascade.lora_files import read_lora
from luve_lightning.cascade.lora_loading import load_lora
from luve_lightning.cli.convert import LoraNames, write_lora
from luve_lightning.models.backbones.wan_denoiser import WanDenoiser
from luve_lightning.models.experts import add_expert, save_expert
from tests.helpers.tiny_luve import EXPERTS, PLAIN
from tests.helpers.tiny_wan import load_transformer, prediction
from tests.helpers.wan_files import own_config, own_weights, write_weights

NAMES: tuple[LoraNames, ...] = ("comfyui", "diffsynth", "diffusers", "peft")
SCALES = {"attn1.to_q": 0.5, "ffn.net.0.proj": 3.0}
"""By layer: rank 4 and alpha 2, and rank 2 with alpha 6."""


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """PEFT's two files, with a pattern for the feed-forward's rank and alpha."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for block in range(2):
        for name, rank, out in (("attn1.to_q", 4, 24), ("ffn.net.0.proj", 2, 32)):
            key = f"base_model.model.blocks.{block}.{name}"
            tensors[f"{key}.lora_A.weight"] = 0.5 * torch.randn(rank, 24, generator=generator)
            tensors[f"{key}.lora_B.weight"] = 0.5 * torch.randn(out, rank, generator=generator)
    folder = tmp_path / "lora"
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": list(SCALES),
        "rank_pattern": {"ffn.net.0.proj": 2}, "alpha_pattern": {"ffn.net.0.proj": 6},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(backbone: Path, lora: Path) -> Any:
    """The LoRA added to the weights by hand: W + scale * B A."""
    transformer = load_transformer(backbone).eval()
    tensors = safetensors.torch.load_file(lora / "adapter_model.safetensors")
    for key, a in tensors.items():
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            scale = next(scale for end, scale in SCALES.items() if name.endswith(end))
            transformer.get_submodule(name).weight.data += scale * tensors[key.replace("lora_A", "lora_B")] @ a
    return transformer


def target(folder: Path, names: str) -> Path:
    return folder / ("converted" if names == "peft" else "converted.safetensors")


@pytest.mark.parametrize("names", NAMES)
def test_a_converted_lora_is_the_same_lora(tiny_backbone: Path, lora: Path, tmp_path: Path, names: LoraNames) -> None:
    want = prediction(merged(tiny_backbone, lora))
    done = write_lora(lora, target(tmp_path, names), names, tiny_backbone)
    assert (done.summary.layers, done.summary.ranks, done.summary.scales) == (4, [2, 4], [0.5, 3.0])
    transformer = load_transformer(tiny_backbone).eval()
    before = prediction(transformer)
    summary = load_lora([transformer], read_lora(target(tmp_path, names)), "again", None)
    assert summary.layers == 4
    torch.testing.assert_close(prediction(transformer), want, rtol=1e-5, atol=1e-5)
    assert (want - before).abs().max() > 0.05
    # Any of them can be converted again.
    second = tmp_path / "second.safetensors"
    write_lora(target(tmp_path, names), second, "comfyui", tiny_backbone)
    other = load_transformer(tiny_backbone).eval()
    load_lora([other], read_lora(second), "again", None)
    torch.testing.assert_close(prediction(other), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", ["comfyui", "diffusers", "peft"])
def test_diffusers_itself_reads_it(tiny_backbone: Path, lora: Path, tmp_path: Path, names: LoraNames) -> None:
    """By its own loading, without ours; PEFT's layout by PEFT's."""
    write_lora(lora, target(tmp_path, names), names, tiny_backbone)
    transformer = load_transformer(tiny_backbone).eval()
    if names == "peft":
        from peft import PeftModel

        transformer = PeftModel.from_pretrained(transformer, str(target(tmp_path, names))).eval()
    else:
        pipeline = WanPipeline(None, None, None, None, transformer)
        pipeline.load_lora_weights(str(tmp_path), weight_name="converted.safetensors")
    torch.testing.assert_close(prediction(transformer), prediction(merged(tiny_backbone, lora)), rtol=1e-5, atol=1e-5)


def test_names_and_scales_in_the_file(tiny_backbone: Path, lora: Path, tmp_path: Path) -> None:
    source = safetensors.torch.load_file(lora / "adapter_model.safetensors")
    a, b = (source[f"base_model.model.blocks.1.ffn.net.0.proj.lora_{half}.weight"] for half in "AB")
    write_lora(lora, tmp_path / "comfyui.safetensors", "comfyui", tiny_backbone)
    comfyui = safetensors.torch.load_file(tmp_path / "comfyui.safetensors")
    key = "diffusion_model.blocks.1.ffn.0"
    assert torch.equal(comfyui[f"{key}.lora_down.weight"], a)
    assert torch.equal(comfyui[f"{key}.lora_up.weight"], b)
    assert comfyui[f"{key}.alpha"].item() == 6
    assert comfyui["diffusion_model.blocks.0.self_attn.q.alpha"].item() == 2
    write_lora(lora, tmp_path / "diffsynth.safetensors", "diffsynth", tiny_backbone)
    diffsynth = safetensors.torch.load_file(tmp_path / "diffsynth.safetensors")
    # Older versions read no alpha: W + B A.
    assert {re.sub(r".*lora_", "lora_", name) for name in diffsynth} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
    }
    assert torch.equal(diffsynth["blocks.1.ffn.0.lora_A.default.weight"], 3 * a)
    assert torch.equal(diffsynth["blocks.1.ffn.0.lora_B.default.weight"], b)


def test_an_adaptations_lora_needs_no_backbone(tiny_backbone: Path, lora: Path, tmp_path: Path) -> None:
    """It lies in its transformer's folder; the attention it was trained with stays in the header."""
    export = tmp_path / "export"
    (export / "transformer").mkdir(parents=True)
    (export / "transformer" / "config.json").write_bytes((tiny_backbone / "transformer/config.json").read_bytes())
    lora.rename(export / "transformer" / "lora")
    file = export / "transformer" / "lora" / "adapter_model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, metadata={"luve_attention": '{"name": "X"}'})
    for number, source in enumerate((export, export / "transformer", file.parent, file)):
        done = write_lora(source, tmp_path / f"{number}.safetensors", "comfyui")
        assert done.attention == {"name": "X"}
        with safe_open(tmp_path / f"{number}.safetensors", framework="pt") as written:
            assert json.loads(written.metadata()["luve_attention"]) == {"name": "X"}
        tensors = safetensors.torch.load_file(tmp_path / f"{number}.safetensors")
        assert sum("lora_down" in key for key in tensors) == 4


def test_the_backbone_may_be_a_single_file(tiny_backbone: Path, lora: Path, tmp_path: Path) -> None:
    """Wan's own names, with the width of a head in a config.json beside it; its weights are not read."""
    transformer = load_transformer(tiny_backbone)
    file = write_weights(tmp_path / "wan" / "wan.safetensors", own_weights(transformer))
    (tmp_path / "wan" / "config.json").write_text(json.dumps(own_config(transformer)))
    for number, backbone in enumerate((file, tiny_backbone)):
        write_lora(lora, tmp_path / f"{number}.safetensors", "comfyui", backbone)
    first, second = (safetensors.torch.load_file(tmp_path / f"{number}.safetensors") for number in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["lfe", "hfe"])
def test_experts_say_why_they_are_no_loras(tiny_backbone: Path, tmp_path: Path, name: str) -> None:
    place = "attention" if name == "lfe" else "feed_forward"
    for experts, why in (
        (EXPERTS, rf"its {'low' if name == 'lfe' else 'high'}-pass filter acts on the tokens between A and B"),
        (PLAIN, f"though it has no filter: it adds B A x to the output of the whole {place}"),
    ):
        transformer = load_transformer(tiny_backbone)
        add_expert(transformer, name, experts[name])
        save_expert(transformer, name, tmp_path / "expert")
        for source in (tmp_path / "expert", tmp_path / "expert" / "adapter_model.safetensors"):
            with pytest.raises(ValueError, match=why):
                write_lora(source, tmp_path / "x.safetensors", "comfyui", tiny_backbone)
    assert not (tmp_path / "x.safetensors").exists()


def test_mistakes(tiny_backbone: Path, lora: Path, tmp_path: Path) -> None:
    new = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="say which transformer it is for: --backbone FOLDER"):
        write_lora(lora, new, "comfyui")
    with pytest.raises(ValueError, match=r"expected a \.safetensors file, got .*/x; only PEFT's layout is a folder"):
        write_lora(lora, tmp_path / "x", "comfyui", tiny_backbone)
    with pytest.raises(ValueError, match="expected a folder for PEFT's two files"):
        write_lora(lora, new, "peft", tiny_backbone)
    with pytest.raises(FileNotFoundError, match=r"nothing: no such file or folder"):
        write_lora(tmp_path / "nothing", new, "comfyui", tiny_backbone)
    half = {"blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 24)}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="without its other half"):
        write_lora(tmp_path / "half.safetensors", new, "comfyui", tiny_backbone)
    tensors = safetensors.torch.load_file(lora / "adapter_model.safetensors")
    tensors["base_model.model.blocks.0.attn1.to_q.diff_b"] = torch.ones(24)
    (tmp_path / "biased").mkdir()
    safetensors.torch.save_file(tensors, tmp_path / "biased" / "lora.safetensors")
    (tmp_path / "biased" / "adapter_config.json").write_bytes((lora / "adapter_config.json").read_bytes())
    with pytest.raises(ValueError, match=r"only A and B can be converted, it holds more, for instance .*diff_b"):
        write_lora(tmp_path / "biased", new, "comfyui", tiny_backbone)
    assert not new.exists()
    new.write_text("mine")
    with pytest.raises(FileExistsError, match=r"x\.safetensors exists already"):
        write_lora(lora, new, "comfyui", tiny_backbone)
    assert new.read_text() == "mine"


def test_it_knows_every_layer_of_an_adaptation(tiny_backbone: Path) -> None:
    """Wan's names of what an adaptation trains."""
    denoiser = WanDenoiser(load_transformer(tiny_backbone))
    targets = tuple(f".{name}" for name in denoiser.lora_targets)
    names = [name for name, _ in denoiser.blocks[0][1].named_modules() if f".{name}".endswith(targets)]
    original = {denoiser.original_name(f"blocks.0.{name}") for name in names}
    wanted = {f"blocks.0.{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"}
    assert original == wanted | {"blocks.0.ffn.0", "blocks.0.ffn.2"}
