"""What a LoRA file is, by its names and shapes alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from luve_lightning.cascade.lora_files import LoraFile, read_lora
from luve_lightning.cascade.lora_names import describe_lora, parse_name

A, B = torch.zeros(4, 24), torch.zeros(32, 4)


@pytest.mark.parametrize(
    ("key", "part", "layer", "underscored"),
    [
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", "A", "blocks.0.attn1.to_q", False),
        ("blocks.0.ffn.2.lora_B.default.weight", "B", "blocks.0.ffn.2", False),
        ("model.diffusion_model._orig_mod.blocks.0.x.lora_down.weight", "A", "blocks.0.x", False),
        ("base_model.model.pipe.dit.blocks.0._orig_mod.x.lora_B.bias", "bias", "blocks.0.x", False),
        ("lora_unet__blocks_0_self_attn_q.alpha", "alpha", "blocks_0_self_attn_q", True),
        ("diffusion_model.lora_unet_blocks.0.self_attn.q.lokr_w1", "lokr_w1", "blocks.0.self_attn.q", True),
        ("lycoris_blocks_0_attn1_to_q.hada_w2_b", "hada_w2_b", "blocks_0_attn1_to_q", True),
        ("lora_unet_transformer_blocks_0_attn1_to_q.alpha", "alpha", "transformer_blocks_0_attn1_to_q", True),
        ("transformer.transformer_blocks.0.attn1.to_q.alpha", "alpha", "transformer_blocks.0.attn1.to_q", False),
        ("diffusion_model.blocks.0.diff_m", "diff_m", "blocks.0", False),
        ("diffusion_model.blocks.0.norm3.diff_b", "diff_b", "blocks.0.norm3", False),
        ("x.dora_scale", "dora_scale", "x", False),
    ],
)
def test_names_taken_apart(key: str, part: str, layer: str, underscored: bool) -> None:
    found = parse_name(key)
    assert found is not None
    assert (found.part, found.layer, found.underscored) == (part, layer, underscored)


@pytest.mark.parametrize(
    "key", ["alpha", "x.weight", "x.oft_blocks", "x.set_weight", "x.a1.weight", "x.diff.more", "x.lokr_t1"]
)
def test_names_that_are_no_part_of_an_update(key: str) -> None:
    assert parse_name(key) is None


def halves(layer: str) -> dict[str, Tensor]:
    return {f"{layer}.lora_down.weight": A, f"{layer}.lora_up.weight": B}


def test_a_summary_says_what_is_there() -> None:
    tensors = halves("lora_unet_blocks_0_ffn_0") | halves("lora_unet_blocks_3_ffn_0")
    tensors |= {f"lora_unet_blocks_{n}_ffn_0.alpha": torch.tensor(2.0 + n) for n in (0, 3)}
    tensors |= {"lora_unet_blocks_3_ffn_0.diff_b": torch.zeros(32), "lora_unet_blocks_3_norm3.diff": torch.zeros(24)}
    tensors |= {f"lora_unet_blocks_1_ffn_0.lokr_w{n}": torch.zeros(4, 4) for n in (1, 2)}
    found = describe_lora(LoraFile("weights", tensors))
    assert found.writers == ["kohya's trainers, musubi-tuner"]
    assert found.kinds == {"LoRA": 2, "LoKr": 1, "bias difference": 1, "weight difference": 1}
    assert (found.layers, found.blocks, found.ranks, found.scales) == (4, 3, [4], [0.5, 1.0, 1.25])
    assert found.scale_from == "its alpha tensors, 1 without one"
    assert (found.unknown, found.refused) == ([], "")
    assert json.loads(json.dumps(found.record())) == found.record()


def test_a_summary_says_where_the_scale_comes_from(tmp_path: Path) -> None:
    found = describe_lora(LoraFile("weights", halves("base_model.model.blocks.0.ffn.0")))
    assert (found.writers, found.scales, found.scale_from) == (["PEFT"], [1.0], "nothing in the file: taken as 1")
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v.clone() for k, v in halves("base_model.model.blocks.0.ffn.0").items()}, file)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = describe_lora(read_lora(file))
    assert (found.scales, found.scale_from) == ([0.5], str(tmp_path / "adapter_config.json"))
    found = describe_lora(LoraFile("weights", {"x.diff": A}))
    assert (found.scales, found.scale_from) == ([], "no scale: differences act at 1")


@pytest.mark.parametrize(
    ("tensors", "refused"),
    [
        ({"blocks.0.x.lora_A.weight": A}, "blocks.0.x.lora_A.weight without its other half"),
        (halves("x") | {"x.oft_blocks": A}, "1 tensor not part of a LoRA, for instance x.oft_blocks"),
        (halves("x") | {"x.lokr_w1": A, "x.lokr_w2": A}, "x has both a LoRA and a LoKr of the same weight"),
        (halves("x") | {"x.diff": A}, "x has both a LoRA and a weight difference of the same weight"),
        ({"x.alpha": A}, "x.alpha scales nothing"),
        ({"x.lokr_w1": A}, "x is an incomplete LoKr: it has only x.lokr_w1"),
        ({"x.lokr_w1": A, "x.lokr_w2_b": A}, "x is an incomplete LoKr"),
        ({"x.lokr_w1": A, "x.lokr_w1_a": A, "x.lokr_w1_b": A, "x.lokr_w2": A}, "x is an incomplete LoKr"),
        ({"x.lokr_w1": A, "x.lokr_w2": A, "x.lokr_t2": A}, "x is an incomplete LoKr"),
        ({"x.hada_w1_a": A, "x.hada_w1_b": A, "x.hada_w2_a": A}, "x is an incomplete LoHa"),
        (
            {"x.hada_w1_a": B, "x.hada_w1_b": A, "x.hada_w2_a": B[:, :2], "x.hada_w2_b": A[:2]},
            "the factors of x have different ranks: x.hada_w1_b, x.hada_w2_b",
        ),
        ({"x.diff": A, "x.dora_scale": B}, "has both|without its other half"),
    ],
)
def test_a_summary_says_why_a_file_is_refused(tensors: dict[str, Tensor], refused: str) -> None:
    found = describe_lora(LoraFile("weights", tensors))
    assert re.search(refused, found.refused), found.refused
    assert "\n" not in found.refused


def test_something_else_has_no_layers() -> None:
    found = describe_lora(LoraFile("weights", {"blocks.0.attn1.to_q.weight": A}))
    assert (found.layers, found.unknown) == (0, ["blocks.0.attn1.to_q.weight"])


def test_a_kohya_file_without_its_alphas_is_refused(tmp_path: Path) -> None:
    """Its header says at which scale it was trained; a converter's file, with names of dots, has it in the weights."""
    header = {"ss_network_dim": "4", "ss_network_alpha": "1.0", "ss_network_module": "networks.lora_wan"}
    file = tmp_path / "lora.safetensors"
    save_file({k: v.clone() for k, v in halves("lora_unet_blocks_0_ffn_0").items()}, file, metadata=header)
    assert "no tensor lora_unet_blocks_0_ffn_0.alpha" in describe_lora(read_lora(file)).refused
    save_file({k: v.clone() for k, v in halves("diffusion_model.blocks.0.ffn.0").items()}, file, metadata=header)
    assert describe_lora(read_lora(file)).refused == ""
    for other in ({"ss_network_dim": "Dynamic", "ss_network_alpha": "1"}, {"ss_network_dim": "0"}, {}):
        save_file({k: v.clone() for k, v in halves("lora_unet_blocks_0_ffn_0").items()}, file, metadata=other)
        assert describe_lora(read_lora(file)).refused == ""
