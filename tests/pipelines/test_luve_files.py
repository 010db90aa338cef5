"""LuVePipeline on disk, and other people's LoRAs in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import WanPipeline
from peft import LoraConfig
from torch import Tensor, nn

from luve_lightning.models.experts import expert_names, save_expert
from luve_lightning.models.transformer import load_transformer
from luve_lightning.models.vluer import VLUer
from luve_lightning.pipelines import LuVePipeline
from tests.helpers.tiny_luve import EXPERTS, PLAIN, PROMPT, SMALL, add_experts, noise, seeded, tiny_luve
from tests.helpers.tiny_wan import randomise, tiny_transformer

RUN: dict[str, Any] = {
    "height": 64, "width": 96, "num_frames": 5, "num_inference_steps": 2, "skip_steps": 0, "guidance": 2.0,
    "output_type": "latent",
}  # fmt: skip
STEPS: dict[str, Any] = {**SMALL, "num_inference_steps": 1, "guidance": 1.0}


def weights(pipeline: LuVePipeline) -> dict[str, Tensor]:
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {
        f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()
    }


def assert_same(a: LuVePipeline, b: LuVePipeline) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert torch.equal(tensor, right[key]), key
        assert tensor.dtype == right[key].dtype, key


@pytest.mark.parametrize("refiner", [False, True])
def test_round_trip(tiny_backbone: Path, tmp_path: Path, refiner: bool) -> None:
    pipeline = tiny_luve(tiny_backbone, EXPERTS, refiner=refiner)
    before = weights(pipeline)
    pipeline.save_pretrained(tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(pipeline).items())
    assert {path.name for path in (tmp_path / "experts").iterdir()} == {"lfe", "hfe"}
    loaded = LuVePipeline.from_pretrained(tmp_path)
    assert_same(pipeline, loaded)
    assert (loaded.refiner is None) is not refiner
    assert expert_names(loaded.refinement_transformer) == ["hfe", "lfe"]
    assert loaded.scheduler.config.flow_shift == 5
    assert not any(p.requires_grad for part in loaded.transformers for p in part.parameters())
    loaded.set_progress_bar_config(disable=True)
    videos = [p(PROMPT, **RUN, generator=seeded()) for p in (pipeline, loaded)]
    assert torch.equal(videos[0].frames, videos[1].frames)
    assert videos[0].experts_used == videos[1].experts_used
    # Without experts/, the folder is one of diffusers' own.
    wan = WanPipeline.from_pretrained(tmp_path).transformer.state_dict()
    base = load_transformer(tiny_backbone).state_dict()
    assert wan.keys() == base.keys()
    assert all(torch.equal(tensor, base[key]) for key, tensor in wan.items())
    # Experts of an earlier save do not come back.
    tiny_luve(tiny_backbone, {"lfe": EXPERTS["lfe"]}).save_pretrained(tmp_path)
    again = LuVePipeline.from_pretrained(tmp_path)
    assert expert_names(again.refinement_transformer) == ["lfe"]


def test_round_trip_in_bfloat16(tiny_backbone: Path, tmp_path: Path) -> None:
    tiny_luve(tiny_backbone, EXPERTS).save_pretrained(tmp_path / "a")
    half = LuVePipeline.from_pretrained(tmp_path / "a", torch_dtype=torch.bfloat16)
    assert half.transformer.dtype == half.text_encoder.dtype == torch.bfloat16
    assert half.transformer.blocks[0].norm2.weight.dtype == torch.float32  # what diffusers keeps there
    assert half.vae.dtype == half.vluer.dtype == torch.float32
    assert half.transformer.blocks[0].attn1.lora_A["lfe"].weight.dtype == torch.float32
    half.save_pretrained(tmp_path / "b")
    assert_same(half, LuVePipeline.from_pretrained(tmp_path / "b", torch_dtype=torch.bfloat16))
    everywhere = LuVePipeline.from_pretrained(tmp_path / "b", dtype={"default": torch.bfloat16})
    assert everywhere.vae.dtype == everywhere.vluer.dtype == torch.bfloat16
    half.set_progress_bar_config(disable=True)
    latents = half(PROMPT, **RUN, generator=seeded()).frames
    assert latents.dtype == torch.float32
    whole = tiny_luve(tiny_backbone, EXPERTS)(PROMPT, **RUN, generator=seeded()).frames
    assert 0 < (latents - whole).abs().mean() < 0.05 * whole.std()


def test_from_a_backbone_with_parts_from_elsewhere(tiny_backbone: Path, tmp_path: Path) -> None:
    """What a user has after training: a backbone, an adapted transformer, a VLUer and the experts' exports."""
    source = tiny_luve(tiny_backbone, EXPERTS, refiner=True)
    WanPipeline(
        **{n: getattr(source, n) for n in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    ).save_pretrained(tmp_path / "wan")
    source.vluer.save_pretrained(tmp_path / "vluer")
    tiny_luve(tiny_backbone, refiner=True).refiner.save_pretrained(tmp_path / "adapted")
    for name in EXPERTS:
        save_expert(source.refiner, name, tmp_path / "experts" / name)
    parts = {"vluer": tmp_path / "vluer", "refiner": tmp_path / "adapted"}
    whole = LuVePipeline.from_pretrained(tmp_path / "wan", **parts, experts=tmp_path / "experts")
    want = source(PROMPT, **RUN, generator=seeded()).frames
    whole.set_progress_bar_config(disable=True)
    assert torch.equal(whole(PROMPT, **RUN, generator=seeded()).frames, want)
    named = LuVePipeline.from_pretrained(
        tmp_path / "wan", **parts, experts={"low": str(tmp_path / "experts" / "lfe")}, shift=3.0
    )
    assert expert_names(named.refiner) == ["low"]
    assert named.scheduler.config.flow_shift == 3
    single = LuVePipeline.from_pretrained(tmp_path / "wan", experts=tmp_path / "experts" / "hfe")
    assert expert_names(single.transformer) == ["hfe"]
    assert single.vluer is None
    objects = LuVePipeline.from_pretrained(tmp_path / "wan", vluer=source.vluer, refiner=source.refiner)
    assert objects.refiner is source.refiner


def test_what_is_missing_or_does_not_fit_is_one_line(tiny_backbone: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    tiny_luve(tiny_backbone).save_pretrained(saved)
    (tmp_path / "empty").mkdir()
    for options, message in (
        ({"backbone": tmp_path / "nowhere"}, "backbone .*nowhere: no such folder"),
        ({"backbone": "nobody/nothing"}, "backbone nobody/nothing: no such folder, and its .* from the hub"),
        ({"backbone": tmp_path / "empty"}, r"no model_index\.json there"),
        ({"vluer": tmp_path / "empty"}, r"vluer .*: no config\.json there; expected a folder saved by VLUer"),
        (
            {"experts": tmp_path / "empty"},
            r"experts .*: no expert there; expected folders such as lfe/ and hfe/",
        ),
        ({"experts": {"lfe": tmp_path / "empty"}}, r"no expert in .*: expert\.json is missing"),
        ({"refiner": tmp_path / "empty"}, r"no transformer/config\.json there"),
        ({"shift": 0.0}, "shift: expected a number greater than 0"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
            LuVePipeline.from_pretrained(**{"backbone": saved} | options)
        assert "\n" not in str(error.value)
    VLUer(latent_channels=4, channels=4, pairs=1, hidden=4, query_channels=4).save_pretrained(
        tmp_path / "four"
    )
    with pytest.raises(ValueError, match="the VLUer takes 4 latent channels, the VAE has 16"):
        LuVePipeline.from_pretrained(saved, vluer=tmp_path / "four")
    (saved / "transformer" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"backbone .*saved: cannot load its "):
        LuVePipeline.from_pretrained(saved)
    parts = tiny_luve(tiny_backbone).components
    with pytest.raises(ValueError, match=r"the backbone is a Wan2\.2 one"):
        LuVePipeline(**parts | {"transformer_2": tiny_transformer()})


# LoRAs


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
                layer = transformer.get_submodule(
                    key.removeprefix("transformer.").removesuffix(".lora_A.weight")
                )
                layer.weight.data += scale * found[key.replace("lora_A", "lora_B")] @ a
    return pipeline


@pytest.mark.parametrize("style", STYLES)
def test_loras_of_every_style(tiny_backbone: Path, tmp_path: Path, style: str) -> None:
    """In a transformer with experts: their layers wrap the modules that the LoRA's names go through."""
    found = lora_weights()
    safetensors.torch.save_file(STYLES[style](found), tmp_path / "lora.safetensors")
    pipeline = tiny_luve(tiny_backbone, EXPERTS, trained=False)
    before = pipeline.generate_motion(PROMPT, **STEPS, generator=seeded())
    pipeline.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="ultra")
    got = pipeline.generate_motion(PROMPT, **STEPS, generator=seeded())
    want = merged(tiny_luve(tiny_backbone), found).generate_motion(PROMPT, **STEPS, generator=seeded())
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    assert (got - before).abs().max() > 0.05
    assert pipeline.get_list_adapters()["transformer"] == ["lfe", "hfe", "ultra"]
    pipeline.unload_lora_weights()
    assert torch.equal(pipeline.generate_motion(PROMPT, **STEPS, generator=seeded()), before)
    assert expert_names(pipeline.transformer) == ["lfe", "hfe"]


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


def test_one_transformer_or_both(tiny_backbone: Path) -> None:
    def stages(pipeline: LuVePipeline) -> dict[str, Tensor]:
        found: dict[str, Tensor] = pipeline(PROMPT, **RUN, generator=seeded(), keep_stages=True).stages
        refined = pipeline.refine(
            noise(1, 16, 2, 4, 6), PROMPT, skip_steps=1, num_inference_steps=2, generator=seeded()
        )
        return {"motion": found["motion"], "refined": refined}

    without = stages(tiny_luve(tiny_backbone, EXPERTS, refiner=True))
    for into, touched in (
        ("transformer", {"motion"}),
        ("refiner", {"refined"}),
        ("both", {"motion", "refined"}),
    ):
        pipeline = tiny_luve(tiny_backbone, EXPERTS, refiner=True)
        pipeline.load_lora_weights(lora_weights(), "one", into=into)
        got = stages(pipeline)
        assert {name for name in got if not torch.equal(got[name], without[name])} == touched


def test_strength_and_choice_are_diffusers(tiny_backbone: Path) -> None:
    found, other = lora_weights(), lora_weights(seed=1)
    pipeline = tiny_luve(tiny_backbone, EXPERTS)
    pipeline.load_lora_weights(dict(found), "one")
    half = merged(tiny_luve(tiny_backbone), found, 0.5).generate_motion(PROMPT, **STEPS, generator=seeded())
    got = pipeline.generate_motion(PROMPT, **STEPS, attention_kwargs={"scale": 0.5}, generator=seeded())
    torch.testing.assert_close(got, half, atol=1e-4, rtol=1e-3)
    pipeline.load_lora_weights(dict(other), "two")
    pipeline.set_adapters("two")
    want = merged(tiny_luve(tiny_backbone), other).generate_motion(PROMPT, **STEPS, generator=seeded())
    torch.testing.assert_close(
        pipeline.generate_motion(PROMPT, **STEPS, generator=seeded()), want, atol=1e-4, rtol=1e-3
    )
    pipeline.set_adapters(["one", "two"], [0.5, 1.0])
    want = merged(merged(tiny_luve(tiny_backbone), other), found, 0.5).generate_motion(
        PROMPT, **STEPS, generator=seeded()
    )
    torch.testing.assert_close(
        pipeline.generate_motion(PROMPT, **STEPS, generator=seeded()), want, atol=1e-4, rtol=1e-3
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
    want = merged(tiny_luve(tiny_backbone), found, 2 / 4).generate_motion(PROMPT, **STEPS, generator=seeded())
    torch.testing.assert_close(
        pipeline.generate_motion(PROMPT, **STEPS, generator=seeded()), want, atol=1e-4, rtol=1e-3
    )


def test_a_lora_saved_by_diffusers_keeps_its_alpha(tiny_backbone: Path, tmp_path: Path) -> None:
    source = tiny_luve(tiny_backbone)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False)
    source.transformer.add_adapter(config, "mine")
    source.transformer.save_lora_adapter(tmp_path, adapter_name="mine")
    want = source.generate_motion(PROMPT, **STEPS, generator=seeded())
    for experts in ({}, EXPERTS):
        pipeline = tiny_luve(tiny_backbone, experts)
        pipeline.load_lora_weights(tmp_path)
        torch.testing.assert_close(pipeline.generate_motion(PROMPT, **STEPS, generator=seeded()), want)


def test_a_lora_that_does_not_fit_is_one_line(tiny_backbone: Path, tmp_path: Path) -> None:
    found = lora_weights()
    deeper = found | {k.replace("blocks.1", "blocks.29"): v for k, v in found.items()}
    wider = {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in found.items()}
    for pipeline in (tiny_luve(tiny_backbone), tiny_luve(tiny_backbone, EXPERTS)):
        for given, message in (
            (
                deeper,
                r"LoRA weights: 10 of its 30 layers are not in .* of 2 blocks, for instance blocks\.29\.attn1",
            ),
            (wider, r"LoRA weights: blocks\.0\.attn1\.to_q\.lora_A has shape \(4, 48\), .* in_features 24"),
            (renamed(found, prefix="lora_unet_"), "LoRA weights: diffusers cannot convert it: "),
            ({"transformer.proj_out.weight": torch.zeros(2)}, "LoRA weights: holds no weights of a LoRA"),
        ):
            with pytest.raises(ValueError, match=message) as error:
                pipeline.load_lora_weights(dict(given))
            assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match="into: expected both, transformer or refiner, got 'vae'"):
            pipeline.load_lora_weights(found, into="vae")
        pipeline.load_lora_weights(dict(found), "kept")
        with pytest.raises(
            ValueError, match="the LoRA 'kept' is loaded, which a saved pipeline does not keep"
        ):
            pipeline.save_pretrained(tmp_path)


def test_a_plain_lora_expert_is_saved_as_one(tiny_backbone: Path, tmp_path: Path) -> None:
    pipeline = tiny_luve(tiny_backbone, {"plain": replace(PLAIN["lfe"], place="cross_attention")})
    randomise(pipeline.transformer, "plain")
    pipeline.save_pretrained(tmp_path)
    assert_same(pipeline, LuVePipeline.from_pretrained(tmp_path))
