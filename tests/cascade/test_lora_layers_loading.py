"""Other people's LoRAs in a pipeline, beside experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig
from torch import Tensor

from luve_lightning.cascade import LuVePipeline
from luve_lightning.cascade.lora_files import LoraFile, read_lora
from luve_lightning.cascade.lora_names import describe_lora
from luve_lightning.cascade.stages import generate_motion, refine
from luve_lightning.models.experts import expert_names
from tests.helpers.tiny_luve import EXPERTS, PLAIN, PROMPT, SMALL, add_experts, noise, seeded, tiny_luve

RUN: dict[str, Any] = {
    "height": 64, "width": 96, "num_frames": 5, "steps": 2, "skip_steps": 0, "guidance": 2.0,
    "output_type": "latent",
}  # fmt: skip
STEPS: dict[str, Any] = {**SMALL, "steps": 1, "guidance": 1.0}


def lora_weights(seed: int = 0, scale: float = 0.3) -> dict[str, Tensor]:
    """Of the tiny backbone's transformer, 24 wide with a feed-forward of 32, in diffusers' names."""
    generator, found = seeded(seed), {}
    widths = {f"{attention}.{part}": (24, 24) for attention in ("attn1", "attn2") for part in PARTS}
    widths |= {"ffn.net.0.proj": (24, 32), "ffn.net.2": (32, 24)}
    for block in range(2):
        for name, (width_in, width_out) in widths.items():
            for part, shape in (("lora_A", (4, width_in)), ("lora_B", (width_out, 4))):
                key = f"transformer.blocks.{block}.{name}.{part}.weight"
                found[key] = scale * torch.randn(shape, generator=generator)
    return found


PARTS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
ORIGINAL = {
    **{f"attn1.{theirs}": f"self_attn.{part}" for theirs, part in PARTS.items()},
    **{f"attn2.{theirs}": f"cross_attn.{part}" for theirs, part in PARTS.items()},
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "transformer.": "",
}


def renamed(found: dict[str, Tensor], *changes: tuple[str, str], prefix: str = "") -> dict[str, Tensor]:
    result = {}
    for key, tensor in found.items():
        for old, new in (*ORIGINAL.items(), *changes):
            key = key.replace(old, new)
        result[prefix + key] = tensor
    return result


def kohya(found: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for key, tensor in renamed(found).items():
        layer, part, _ = key.rsplit(".", 2)
        name = "lora_unet_" + layer.replace(".", "_")
        result[f"{name}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = tensor
        result[f"{name}.alpha"] = torch.tensor(4.0)  # as the rank: a factor of one
    return result


STYLES: dict[str, Any] = {
    "diffusers": lambda found: found,
    "diffusers without prefix": lambda found: {k.removeprefix("transformer."): v for k, v in found.items()},
    "comfyui": lambda found: renamed(found, ("lora_A", "lora_down"), ("lora_B", "lora_up"), prefix="diffusion_model."),
    "original": lambda found: renamed(found, prefix="diffusion_model."),
    "diffsynth": lambda found: renamed(found, (".weight", ".default.weight")),
    "peft": lambda found: renamed(found, prefix="base_model.model."),
    "kohya": kohya,
}  # fmt: skip


def merged(pipeline: LuVePipeline, found: dict[str, Tensor], scale: float = 1.0) -> LuVePipeline:
    """The LoRA added to the weights by hand: W + B A."""
    for transformer in pipeline.transformers:
        for key, a in found.items():
            if "lora_A" in key:
                layer = transformer.get_submodule(key.removeprefix("transformer.").removesuffix(".lora_A.weight"))
                layer.weight.data += scale * found[key.replace("lora_A", "lora_B")] @ a
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_loras_of_every_style(tiny_backbone: Path, tmp_path: Path, style: str) -> None:
    """In a transformer with experts: their layers wrap the modules that the LoRA's names go through."""
    found = lora_weights()
    safetensors.torch.save_file(STYLES[style](found), tmp_path / "lora.safetensors")
    pipeline = tiny_luve(tiny_backbone, EXPERTS, trained=False)
    before = generate_motion(pipeline, PROMPT, **STEPS, generator=seeded())
    pipeline.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="ultra")
    got = generate_motion(pipeline, PROMPT, **STEPS, generator=seeded())
    want = generate_motion(merged(tiny_luve(tiny_backbone), found), PROMPT, **STEPS, generator=seeded())
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    assert (got - before).abs().max() > 0.05
    assert pipeline.get_list_adapters()["transformer"] == ["lfe", "hfe", "ultra"]
    pipeline.unload_lora_weights()
    assert torch.equal(generate_motion(pipeline, PROMPT, **STEPS, generator=seeded()), before)
    assert expert_names(pipeline.transformer) == ["lfe", "hfe"]


@pytest.mark.parametrize(("rank", "scale"), [(8, 0.25), (2, 0.5)])
@pytest.mark.parametrize("attentions", [("self_attn",), ("self_attn", "cross_attn")])
def test_ultrawans_file_loads_whole_at_its_makers_scale(
    tiny_backbone: Path, tmp_path: Path, rank: int, scale: float, attentions: tuple[str, ...]
) -> None:
    """ultrawan-1k.ckpt and ultrawan-4k.ckpt (arXiv 2506.13691): DiffSynth-Studio 1.1's names, without a scale.

    Its trainer saves what PEFT injected into the transformer, for the targets q, k, v, o, ffn.0 and ffn.2, as a
    pickle of nothing else. The makers' inference loads them with `load_lora(..., lora_alpha=0.25)` at 1K and 0.5 at
    4K, which DiffSynth-Studio adds as W + lora_alpha * B A, whatever the rank (64 and 16).
    """
    widths = {f"{a}.{part}": (24, 24) for a in attentions for part in "qkvo"} | {"ffn.0": (24, 32), "ffn.2": (32, 24)}
    generator, file = seeded(1), {}
    for block in range(2):
        for layer, (width_in, width_out) in widths.items():
            name = f"blocks.{block}.{layer}"
            file[f"{name}.lora_A.default.weight"] = 0.3 * torch.randn(rank, width_in, generator=generator)
            file[f"{name}.lora_B.default.weight"] = 0.3 * torch.randn(width_out, rank, generator=generator)
    torch.save(file, tmp_path / "ultrawan.ckpt")
    pipeline = tiny_luve(tiny_backbone)
    summary = pipeline.load_lora_weights(replace(read_lora(tmp_path / "ultrawan.ckpt"), given_scale=scale))
    assert (summary.layers, summary.ranks, summary.scales) == (2 * len(widths), [rank], [scale])
    own = {theirs: ours for ours, theirs in ORIGINAL.items()}
    ours = {}
    for key, tensor in file.items():
        block, layer = key.split(".lora_")[0].split(".", 2)[1:]
        ours[f"transformer.blocks.{block}.{own[layer]}.{key.split('.')[-3]}.weight"] = tensor
    got = generate_motion(pipeline, PROMPT, **STEPS, generator=seeded())
    want = generate_motion(merged(tiny_luve(tiny_backbone), ours, scale), PROMPT, **STEPS, generator=seeded())
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


def test_a_scale_is_given_where_the_file_says_none() -> None:
    halves = {f"blocks.0.self_attn.q.lora_{half}.default.weight": torch.ones(2, 2) for half in "AB"}
    diff = {"diffusion_model.blocks.0.norm3.diff": torch.ones(2)}
    alpha = {"blocks.0.self_attn.q.alpha": torch.tensor(2.0)}
    for tensors, scale, message in (
        (halves, 0.25, ""),
        (halves, 0.0, "LoRA x: lora_scale: expected a number other than 0, got 0.0"),
        (halves | alpha, 0.25, "lora_scale 0.25 is for a file that says no scale; here it is its alpha tensors"),
        (diff, 0.25, "lora_scale 0.25 is for a file that says no scale; here it is no scale: differences act at 1"),
    ):
        found = describe_lora(LoraFile("x", tensors, given_scale=scale))
        assert message in found.refused
        assert bool(message) == bool(found.refused)
    trained = describe_lora(LoraFile("x", halves, trained_scale=0.5, given_scale=0.25))
    assert trained.refused.endswith("here it is its header")


@pytest.mark.slow
@pytest.mark.parametrize("experts", [EXPERTS, PLAIN])
def test_loras_and_experts_act_together(tiny_backbone: Path, experts: Any) -> None:
    """The same video as of experts around a transformer with the LoRA merged in; the order of loading is the same."""
    found = lora_weights()
    base = merged(tiny_luve(tiny_backbone), found)
    add_experts(base.transformer, experts)
    want = base(PROMPT, **RUN, generator=seeded())
    first = tiny_luve(tiny_backbone)
    first.load_lora_weights(dict(found))
    add_experts(first.transformer, experts)
    second = tiny_luve(tiny_backbone, experts)
    second.load_lora_weights(dict(found))
    alone = tiny_luve(tiny_backbone, experts)(PROMPT, **RUN, generator=seeded())
    for pipeline in (first, second):
        got = pipeline(PROMPT, **RUN, generator=seeded())
        torch.testing.assert_close(got.frames, want.frames, atol=2e-4, rtol=1e-3)
        assert got.experts_used == want.experts_used
        assert (got.frames - alone.frames).abs().max() > 0.05
        pipeline.unload_lora_weights()
        assert torch.equal(pipeline(PROMPT, **RUN, generator=seeded()).frames, alone.frames)


@pytest.mark.slow
def test_one_transformer_or_both(tiny_backbone: Path) -> None:
    def stages(pipeline: LuVePipeline) -> dict[str, Tensor]:
        found: dict[str, Tensor] = pipeline(PROMPT, **RUN, generator=seeded(), keep_stages=True).stages
        refined = refine(pipeline, noise(1, 16, 2, 4, 6), PROMPT, skip_steps=1, steps=2, generator=seeded())
        return {"motion": found["motion"], "refined": refined}

    without = stages(tiny_luve(tiny_backbone, EXPERTS, refiner=True))
    for into, touched in (("transformer", {"motion"}), ("refiner", {"refined"}), ("both", {"motion", "refined"})):
        pipeline = tiny_luve(tiny_backbone, EXPERTS, refiner=True)
        pipeline.load_lora_weights(lora_weights(), "one", into=into)
        got = stages(pipeline)
        assert {name for name in got if not torch.equal(got[name], without[name])} == touched


def test_strength_and_choice_are_diffusers(tiny_backbone: Path) -> None:
    found, other = lora_weights(), lora_weights(seed=1)
    pipeline = tiny_luve(tiny_backbone, EXPERTS)
    pipeline.load_lora_weights(dict(found), "one")
    half = generate_motion(merged(tiny_luve(tiny_backbone), found, 0.5), PROMPT, **STEPS, generator=seeded())
    got = generate_motion(pipeline, PROMPT, **STEPS, attention_kwargs={"scale": 0.5}, generator=seeded())
    torch.testing.assert_close(got, half, atol=1e-4, rtol=1e-3)
    pipeline.load_lora_weights(dict(other), "two")
    pipeline.set_adapters("two")
    want = generate_motion(merged(tiny_luve(tiny_backbone), other), PROMPT, **STEPS, generator=seeded())
    torch.testing.assert_close(
        generate_motion(pipeline, PROMPT, **STEPS, generator=seeded()), want, atol=1e-4, rtol=1e-3
    )
    pipeline.set_adapters(["one", "two"], [0.5, 1.0])
    want = generate_motion(
        merged(merged(tiny_luve(tiny_backbone), other), found, 0.5), PROMPT, **STEPS, generator=seeded()
    )
    torch.testing.assert_close(
        generate_motion(pipeline, PROMPT, **STEPS, generator=seeded()), want, atol=1e-4, rtol=1e-3
    )
    # The experts are chosen by the stages all the same.
    used = pipeline(PROMPT, **RUN, generator=seeded()).experts_used
    assert [use.expert for use in used] == [None, None, "lfe", "hfe"]


def test_alpha_scales_a_comfyui_lora(tiny_backbone: Path) -> None:
    found = lora_weights()
    named = renamed(found, ("lora_A", "lora_down"), ("lora_B", "lora_up"), prefix="diffusion_model.")
    named |= {k.replace("lora_down.weight", "alpha"): torch.tensor(2.0) for k in named if "lora_down" in k}
    pipeline = tiny_luve(tiny_backbone)
    pipeline.load_lora_weights(named)
    want = generate_motion(merged(tiny_luve(tiny_backbone), found, 2 / 4), PROMPT, **STEPS, generator=seeded())
    torch.testing.assert_close(
        generate_motion(pipeline, PROMPT, **STEPS, generator=seeded()), want, atol=1e-4, rtol=1e-3
    )


def test_a_lora_saved_by_diffusers_keeps_its_alpha(tiny_backbone: Path, tmp_path: Path) -> None:
    source = tiny_luve(tiny_backbone)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False)
    source.transformer.add_adapter(config, "mine")
    source.transformer.save_lora_adapter(tmp_path, adapter_name="mine")
    want = generate_motion(source, PROMPT, **STEPS, generator=seeded())
    for experts in ({}, EXPERTS):
        pipeline = tiny_luve(tiny_backbone, experts)
        pipeline.load_lora_weights(tmp_path)
        torch.testing.assert_close(generate_motion(pipeline, PROMPT, **STEPS, generator=seeded()), want)


def test_a_lora_that_does_not_fit_is_one_line(tiny_backbone: Path, tmp_path: Path) -> None:
    found = lora_weights()
    deeper = found | {k.replace("blocks.1", "blocks.29"): v for k, v in found.items()}
    wider = {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in found.items()}
    for pipeline in (tiny_luve(tiny_backbone), tiny_luve(tiny_backbone, EXPERTS)):
        for given, message in (
            (deeper, r"LoRA weights: 10 of its 30 layers: not in .* of 2 blocks, for instance blocks\.29\.attn1"),
            (wider, r"LoRA weights: \S+attn1\.to_q\.lora_A\.weight has shape \(4, 48\), .* takes \(4, 24\)"),
            ({"transformer.proj_out.weight": torch.zeros(2)}, "LoRA weights: holds no weights of a LoRA"),
        ):
            with pytest.raises(ValueError, match=message) as error:
                pipeline.load_lora_weights(dict(given))
            assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match="into: expected both, transformer or refiner, got 'vae'"):
            pipeline.load_lora_weights(found, into="vae")
        pipeline.load_lora_weights(dict(found), "kept")
        with pytest.raises(ValueError, match="the LoRA 'kept' is loaded, which a saved pipeline does not keep"):
            pipeline.save_pretrained(tmp_path)
