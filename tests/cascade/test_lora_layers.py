"""Whatever a LoRA's keys, prefixes and scales: it acts as its update added by hand, or is refused."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from luve_lightning.cascade import LuVePipeline
from luve_lightning.cascade.lora_files import read_lora
from tests.helpers.tiny_luve import seeded, tiny_luve
from tests.helpers.tiny_wan import inputs

# The tiny backbone's linear layers: diffusers' names, and Wan's own.
LAYERS = {
    f"blocks.{block}.{ours}": f"blocks.{block}.{theirs}"
    for block in range(2)
    for ours, theirs in {
        "attn1.to_q": "self_attn.q",
        "attn1.to_k": "self_attn.k",
        "attn1.to_v": "self_attn.v",
        "attn1.to_out.0": "self_attn.o",
        "attn2.to_q": "cross_attn.q",
        "attn2.to_k": "cross_attn.k",
        "attn2.to_v": "cross_attn.v",
        "attn2.to_out.0": "cross_attn.o",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
    }.items()
} | {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
# Prefix, whether Wan's own names, names of the two halves.
STYLES = {
    "diffusers": ("transformer.", False, "lora_A.weight", "lora_B.weight"),
    "an adapter's name left in": ("transformer.", False, "lora_A.my-lora.weight", "lora_B.my-lora.weight"),
    "save_lora_adapter": ("", False, "lora_A.weight", "lora_B.weight"),
    "old diffusers": ("transformer.", False, "lora.down.weight", "lora.up.weight"),
    "PEFT of diffusers": ("base_model.model.", False, "lora_A.weight", "lora_B.weight"),
    "PEFT of Wan": ("base_model.model.", True, "lora_A.weight", "lora_B.weight"),
    "ComfyUI": ("diffusion_model.", True, "lora_down.weight", "lora_up.weight"),
    "Wan": ("diffusion_model.", True, "lora_A.weight", "lora_B.weight"),
    "DiffSynth": ("pipe.dit.", True, "lora_A.default.weight", "lora_B.default.weight"),
    "kohya": ("lora_unet_", True, "lora_down.weight", "lora_up.weight"),
    "kohya with dots": ("lora_unet_", True, "lora_down.weight", "lora_up.weight"),
    "VideoX-Fun": ("lora_unet__", True, "lora_down.weight", "lora_up.weight"),
    "VideoX-Fun with dots": ("lora_unet__", True, "lora_down.weight", "lora_up.weight"),
    "LyCORIS": ("lycoris_", False, "lora_down.weight", "lora_up.weight"),
    "OneTrainer": ("lora_transformer_", False, "lora_down.weight", "lora_up.weight"),
    "compiled": ("model.diffusion_model._orig_mod.", True, "lora_A.weight", "lora_B.weight"),
    "kohya of diffusers": ("lora_unet_", False, "lora_down.weight", "lora_up.weight"),
}  # fmt: skip
# Names with underscores for dots, of Wan's own code and of diffusers.
UNDERSCORED = {"kohya": True, "VideoX-Fun": True, "LyCORIS": False, "OneTrainer": False, "kohya of diffusers": False}

Halves = dict[str, tuple[Tensor, Tensor]]


def halves(transformer: Any, ranks: Mapping[str, int], seed: int = 0) -> Halves:
    """A and B of layers, by diffusers' names."""
    generator, found = seeded(seed), {}
    for name, rank in ranks.items():
        out, width = transformer.get_submodule(name).weight.shape
        found[name] = (
            0.3 * torch.randn(rank, width, generator=generator),
            0.3 * torch.randn(out, rank, generator=generator),
        )
    return found


def key_of(name: str, style: str) -> str:
    prefix, original, _, _ = STYLES[style]
    own = LAYERS[name] if original else name
    return prefix + (own.replace(".", "_") if style in UNDERSCORED else own)


def written(found: Halves, style: str, alphas: Mapping[str, float] | None = None) -> dict[str, Tensor]:
    _, _, down, up = STYLES[style]
    result = {}
    for name, (a, b) in found.items():
        result[f"{key_of(name, style)}.{down}"], result[f"{key_of(name, style)}.{up}"] = a, b
        if alphas is not None:
            result[f"{key_of(name, style)}.alpha"] = torch.tensor(alphas[name])
    return result


def output(transformer: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = transformer(**example(transformer), return_dict=False)[0]
    return out


def example(transformer: Any) -> dict[str, Any]:
    given = inputs(1, (1, 4, 6))
    config, generator = transformer.config, seeded(3)
    given["hidden_states"] = torch.randn(1, config.in_channels, 1, 4, 6, generator=generator)
    given["encoder_hidden_states"] = torch.randn(1, 5, config.text_dim, generator=generator)
    return given


def by_hand(transformer: Any, found: Halves, scales: Mapping[str, float]) -> Any:
    other = copy.deepcopy(transformer)
    for name, (a, b) in found.items():
        other.get_submodule(name).weight.data += scales[name] * b @ a
    return other


@pytest.fixture(scope="module")
def pipeline(tiny_backbone: Path) -> LuVePipeline:
    return tiny_luve(tiny_backbone)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """A PEFT folder; the weights' file is returned."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    if config is not None:
        given = {**LoraConfig().to_dict(), "target_modules": ["to_q"], **config}
        (folder / "adapter_config.json").write_text(json.dumps(given, default=str))
    return folder / "adapter_model.safetensors"


BREAKS = (None, None, None, "half", "full difference", "norm", "bias of what has none", "stranger", "two adapters",
          "not a number", "twice", "rank of the configuration", "alpha 0", "lokr")  # fmt: skip


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equal_to_the_update_by_hand_or_refused(pipeline: LuVePipeline, folder: Path, data: Any) -> None:
    transformer = pipeline.transformer
    ranks = data.draw(st.dictionaries(st.sampled_from(sorted(LAYERS)), st.sampled_from([1, 2, 4]), min_size=1))
    style, said = (data.draw(st.sampled_from(sorted(STYLES))), data.draw(st.sampled_from(["", "alpha", "config"])))
    found = halves(transformer, ranks)
    scales, config, alphas = dict.fromkeys(ranks, 1.0), None, None
    if said == "alpha":
        alphas = {name: data.draw(st.sampled_from([0.5, 1.0, 3.0, 8.0])) for name in ranks}
        scales = {name: alphas[name] / rank for name, rank in ranks.items()}
    elif said == "config":
        rslora, alpha = data.draw(st.booleans()), data.draw(st.sampled_from([1, 4, 16, 2.5]))
        own = {name: re.escape(key_of(name, style).removeprefix(STYLES[style][0])) for name in ranks}
        if style in UNDERSCORED:
            own = {name: re.escape(LAYERS[name] if UNDERSCORED[style] else name) for name in ranks}
        config = {"r": 4, "lora_alpha": alpha, "use_rslora": rslora}
        config["rank_pattern"] = {own[name]: rank for name, rank in ranks.items() if rank != 4}
        doubled = {name for name in sorted(ranks) if data.draw(st.booleans())}
        config["alpha_pattern"] = {own[name]: 2 * alpha for name in doubled}
        scales = {
            name: (2 * alpha if name in doubled else alpha) / (math.sqrt(rank) if rslora else rank)
            for name, rank in ranks.items()
        }
    tensors = written(found, style, alphas)
    broken = data.draw(st.sampled_from(BREAKS))
    first = next(iter(ranks))
    tensors, config = break_it(broken, tensors, config, key_of(first, style), ranks[first])
    file = write_folder(folder / "adapter", tensors, config)
    source = data.draw(st.sampled_from([file, file.parent, tensors] if config is None else [file, file.parent]))
    before = output(transformer)
    if broken is not None:
        with pytest.raises(ValueError, match=r"^LoRA |adapter_config\.json") as error:
            pipeline.load_lora_weights(source)
        assert "\n" not in str(error.value)
        assert torch.equal(output(transformer), before), "nothing of it was taken"
        return
    want = output(by_hand(transformer, found, scales))
    summary = pipeline.load_lora_weights(source)
    got = output(transformer)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    assert summary.layers == len(ranks)
    assert summary.ranks == sorted(set(ranks.values()))
    assert summary.scales == pytest.approx(sorted(set(scales.values())))
    assert torch.equal(output(transformer), before)


def break_it(
    how: str | None, tensors: dict[str, Tensor], config: dict[str, Any] | None, key: str, rank: int
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors and configuration with something that cannot be taken."""
    names = [name for name in tensors if name.startswith(f"{key}.") and not name.endswith("alpha")]
    down, up = names
    more: dict[str, Tensor] = {}
    if how == "half":
        tensors = {name: tensor for name, tensor in tensors.items() if name != up}
    elif how == "full difference":
        more = {f"{key}.diff": torch.zeros(2, 2)}
    elif how == "norm":
        more = {"diffusion_model.blocks.0.self_attn.norm_q.diff": torch.zeros(20)}
    elif how == "bias of what has none":
        more = {"diffusion_model.blocks.0.self_attn.norm_q.diff_b": torch.zeros(24)}
    elif how == "stranger":
        more = {name.replace(key, f"{key}_9"): tensors[name] for name in names}
    elif how == "two adapters":
        start, end = (tensors.pop(down), tensors.pop(up))
        ends = ("lora_A", "lora_B")
        for adapter in ("default", "other"):
            more |= {f"{key}.{part}.{adapter}.weight": half for part, half in zip(ends, (start, end), strict=True)}
    elif how == "not a number":
        more = {up: tensors[up] * float("nan")}
    elif how == "twice":
        more = {f"module.{down}": tensors[down]}
    elif how == "rank of the configuration":
        config = {"r": 3, "lora_alpha": 3}
    elif how == "alpha 0":
        more = {f"{key}.alpha": torch.tensor(0.0)}
    elif how == "lokr":
        more = {f"{key}.lokr_w1": torch.zeros(2, 2)}
    return tensors | more, config


@pytest.mark.slow
def test_a_peft_folder_is_what_peft_makes_of_it(tiny_backbone: Path, tmp_path: Path) -> None:
    """The reference is PEFT itself: patterns, rslora, biases and DoRA, saved by it and loaded here."""
    patterns = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"1.attn1.to_q": 6}}
    given: tuple[dict[str, Any], ...] = (
        {"r": 4, "lora_alpha": 16},
        {"r": 4, "lora_alpha": 16, "use_rslora": True, **patterns},
        {"r": 2, "lora_alpha": 3, "lora_bias": True},
        {"r": 2, "lora_alpha": 3, "use_dora": True},
    )
    for number, changes in enumerate(given):
        source = tiny_luve(tiny_backbone)
        config = LoraConfig(target_modules=["to_q", "net.2"], init_lora_weights=False, **changes)
        source.transformer.add_adapter(config, "mine")
        generator = seeded()
        for name, parameter in source.transformer.named_parameters():
            if "lora_" in name:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        weights = get_peft_model_state_dict(source.transformer, adapter_name="mine")
        folder = tmp_path / str(number)
        write_folder(folder, {f"base_model.model.{key}": value for key, value in weights.items()}, config.to_dict())
        pipeline = tiny_luve(tiny_backbone)
        summary = pipeline.load_lora_weights(folder)
        torch.testing.assert_close(output(pipeline.transformer), output(source.transformer))
        assert (summary.layers, summary.dora, summary.biases) == (6, number == 3, 6 if number == 2 else 0)


def test_biases_and_convolutions_are_honoured(pipeline: LuVePipeline) -> None:
    transformer, generator = pipeline.transformer, seeded()
    found = halves(transformer, {"blocks.0.attn1.to_q": 2, "blocks.1.ffn.net.2": 2})
    alphas = {"blocks.0.attn1.to_q": 4.0, "blocks.1.ffn.net.2": 1.0}
    tensors = written(found, "ComfyUI", alphas)
    bias = torch.randn(24, generator=generator)
    tensors["diffusion_model.blocks.0.self_attn.q.diff_b"] = bias
    patch = transformer.patch_embedding.weight
    a = torch.randn(2, *patch.shape[1:], generator=generator)
    b = torch.randn(len(patch), 2, 1, 1, 1, generator=generator)
    tensors |= {"diffusion_model.patch_embedding.lora_down.weight": a,
                "diffusion_model.patch_embedding.lora_up.weight": b}  # fmt: skip
    other = by_hand(transformer, found, {"blocks.0.attn1.to_q": 2.0, "blocks.1.ffn.net.2": 0.5})
    other.get_submodule("blocks.0.attn1.to_q").bias.data += bias
    other.patch_embedding.weight.data += (b.flatten(1) @ a.flatten(1)).view_as(patch)
    summary = pipeline.load_lora_weights(tensors)
    got = output(transformer)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(got, output(other), atol=1e-4, rtol=1e-3)
    assert str(summary) == "LoRA weights: 3 layers, rank 2, scales 0.5 to 2, 1 biases"


def test_what_is_refused_is_named(pipeline: LuVePipeline) -> None:
    found = written(halves(pipeline.transformer, dict.fromkeys(LAYERS, 2)), "ComfyUI")
    key = "diffusion_model.blocks.0.self_attn.q.lora_up.weight"
    for tensors, message in (
        (
            found | {f"diffusion_model.blocks.{n}.modulation.set_weight": torch.zeros(1, 6, 24) for n in range(2)},
            "2 of its 54 tensors: no parts of a LoRA, cannot be honoured, "
            "for instance diffusion_model.blocks.0.modulation.set_weight, ",
        ),
        (found | {"diffusion_model.blocks.0.diff_n": torch.zeros(2)}, "1 of its 53 tensors: .* instance .*diff_n"),
        ({k: v for k, v in found.items() if k != key}, r"self_attn\.q\.lora_down\.weight without its other half"),
        (found | {key: torch.zeros(24, 3)}, r"the halves of blocks\.0\.attn1\.to_q have ranks 2 and 3"),
        (found | {key: torch.zeros(20, 2)}, r"lora_up\.weight has shape \(20, 2\), .* takes \(24, 2\)"),
        (found | {key: torch.zeros(24, 2, dtype=torch.int8)}, r"lora_up\.weight is torch\.int8"),
        (
            {"blocks.0.attn1.lora_A.weight": torch.zeros(2, 24), "blocks.0.attn1.lora_B.weight": torch.zeros(24, 2)},
            r"blocks\.0\.attn1 is not a linear layer but a WanAttention",
        ),
        ({"lora_te_x.lora_down.weight": torch.zeros(2, 24)}, "1 of its 1 layer: not in this transformer"),
        ({}, "holds no weights of a LoRA"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^LoRA weights: .*{message}"):
            pipeline.load_lora_weights(tensors)
    assert read_lora(found).name == "weights"
