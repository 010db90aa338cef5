"""Updates that no LoRA layer holds, in every layout: they act as when added by hand, or are refused by name."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoKrConfig, get_peft_model
from torch import Tensor

from luve_lightning.cascade import LuVePipeline
from luve_lightning.cascade.lora_layers import parameter_of
from luve_lightning.cascade.lora_names import parse_name
from luve_lightning.models.backbones import denoiser_of
from tests.cascade.test_lora_layers import example, halves, output, written
from tests.helpers.tiny_luve import SMALL, seeded, tiny_luve
from tests.helpers.tiny_wan import load_transformer

STEPS: dict[str, Any] = {**SMALL, "steps": 1, "guidance": 1.0}
Update = dict[str, Tensor]
"""What is added to parameters, by diffusers' names."""

# Parameters of the tiny backbone beside the weights of linear layers, by diffusers' names, and Wan's own.
OTHERS = {
    "blocks.0.attn1.norm_q.weight": "blocks.0.self_attn.norm_q.diff",
    "blocks.1.attn2.norm_k.weight": "blocks.1.cross_attn.norm_k.diff",
    "blocks.1.norm2.weight": "blocks.1.norm3.diff",
    "blocks.1.norm2.bias": "blocks.1.norm3.diff_b",
    "blocks.0.scale_shift_table": "blocks.0.modulation.diff",
    "scale_shift_table": "head.modulation.diff",
    "patch_embedding.weight": "patch_embedding.diff",
    "patch_embedding.bias": "patch_embedding.diff_b",
    "proj_out.bias": "head.head.diff_b",
    "condition_embedder.time_proj.bias": "time_projection.1.diff_b",
}
LINEAR = {
    "blocks.0.attn1.to_q.weight": "blocks.0.self_attn.q",
    "blocks.1.ffn.net.0.proj.weight": "blocks.1.ffn.0",
    "blocks.1.ffn.net.2.weight": "blocks.1.ffn.2",
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return 0.2 * torch.randn(shape, generator=seeded(seed))


def differences(transformer: Any, names: Any, seed: int = 0) -> Update:
    return {name: randn(*parameter_of(transformer, name).shape, seed=seed + n) for n, name in enumerate(names)}


def comfyui(transformer: Any) -> tuple[Update, Update]:
    update = differences(transformer, [*OTHERS, *LINEAR])
    keys = OTHERS | {name: f"{own}.diff" for name, own in LINEAR.items()}
    return {f"diffusion_model.{keys[name]}": tensor for name, tensor in update.items()}, update


def lightx2v(transformer: Any) -> tuple[Update, Update]:
    tensors, update = comfyui(transformer)
    return {key.replace(".modulation.diff", ".diff_m"): tensor for key, tensor in tensors.items()}, update


def diffusers_names(transformer: Any) -> tuple[Update, Update]:
    update = differences(transformer, [*OTHERS, *LINEAR])
    ends = ((r"\.weight$", ".diff"), (r"\.bias$", ".diff_b"), (r"table$", "table.diff"))
    tensors = {}
    for name, tensor in update.items():
        for old, new in ends:
            name = re.sub(old, new, name)
        tensors[f"transformer.{name}"] = tensor
    return tensors, update


def kohya(transformer: Any) -> tuple[Update, Update]:
    """LyCORIS' full and norm modules, in the names of kohya's trainers."""
    tensors, update = comfyui(transformer)
    result = {}
    for key, tensor in tensors.items():
        layer, part = key.removeprefix("diffusion_model.").rsplit(".", 1)
        if "norm" in layer:
            part = {"diff": "w_norm", "diff_b": "b_norm"}[part]
        result[f"lora_unet_{layer.replace('.', '_')}.{part}"] = tensor
    return result, update


def lokr(*, low_rank: bool, alpha: float | None, style: str = "diffusion_model.{}") -> Callable[..., Any]:
    def write(transformer: Any) -> tuple[Update, Update]:
        tensors, update = {}, {}
        for name, own in LINEAR.items():
            out, width = parameter_of(transformer, name).shape
            key = style.format(own) if "." in style else style.format(own.replace(".", "_"))
            first, second = randn(4, 2), randn(out // 4, width // 2, seed=1)
            if low_rank:
                a, b = randn(out // 4, 3, seed=2), randn(3, width // 2, seed=3)
                tensors |= {f"{key}.lokr_w1": first, f"{key}.lokr_w2_a": a, f"{key}.lokr_w2_b": b}
                second = a @ b
            else:
                tensors |= {f"{key}.lokr_w1": first, f"{key}.lokr_w2": second}
            if alpha is not None:
                tensors[f"{key}.alpha"] = torch.tensor(alpha)
            # The definition, element by element: W[a * p + b, c * q + d] = w1[a, c] * w2[b, d].
            scale = alpha / 3 if low_rank and alpha is not None else 1.0
            blocks = [torch.cat([first[a, c] * second for c in range(2)], 1) for a in range(4)]
            update[name] = scale * torch.cat(blocks)
        return tensors, update

    return write


def loha(transformer: Any) -> tuple[Update, Update]:
    tensors, update = {}, {}
    for name, own in LINEAR.items():
        out, width = parameter_of(transformer, name).shape
        key = f"lycoris_{own.replace('.', '_')}"
        parts = [randn(out, 3), randn(3, width, seed=1), randn(out, 3, seed=2), randn(3, width, seed=3)]
        ends = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        tensors |= {f"{key}.{end}": part for end, part in zip(ends, parts, strict=True)}
        tensors[f"{key}.alpha"] = torch.tensor(1.5)
        update[name] = 0.5 * (parts[0] @ parts[1]) * (parts[2] @ parts[3])
    return tensors, update


def tucker(transformer: Any) -> tuple[Update, Update]:
    """LoCon of a convolution with its kernel in the middle, LoKr and LoHa of LyCORIS' with a core."""
    out, width, *kernel = parameter_of(transformer, "patch_embedding.weight").shape
    down, mid, up = randn(3, width, 1, 1, 1), randn(3, 3, *kernel, seed=1), randn(out, 3, 1, 1, 1, seed=2)
    key = "lora_unet_patch_embedding"
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up}
    tensors[f"{key}.alpha"] = torch.tensor(6.0)
    update = torch.zeros(out, width, *kernel)
    for i in range(3):
        for j in range(3):
            pairs = up[:, i].flatten()[:, None] * down[j].flatten()[None]
            update += 2.0 * pairs[:, :, None, None, None] * mid[i, j]
    return tensors, {"patch_embedding.weight": update}


def loha_of_a_convolution(transformer: Any) -> tuple[Update, Update]:
    out, width, *kernel = parameter_of(transformer, "patch_embedding.weight").shape
    cores = [randn(3, 3, *kernel, seed=n) for n in (1, 2)]
    factors = [(randn(3, out, seed=3 + n), randn(3, width, seed=5 + n)) for n in (0, 1)]
    key, tensors, update = "lora_unet_patch_embedding", {}, torch.ones(out, width, *kernel)
    for n, (core, (a, b)) in enumerate(zip(cores, factors, strict=True), 1):
        tensors |= {f"{key}.hada_t{n}": core, f"{key}.hada_w{n}_a": a, f"{key}.hada_w{n}_b": b}
        whole = torch.zeros(out, width, *kernel)
        for i in range(3):
            for j in range(3):
                whole += (a[i][:, None] * b[j][None])[:, :, None, None, None] * core[i, j]
        update *= whole
    return tensors, {"patch_embedding.weight": update}


def lokr_of_a_convolution(transformer: Any) -> tuple[Update, Update]:
    """The kernel lies in the columns of the second factor's second half."""
    out, width, *kernel = parameter_of(transformer, "patch_embedding.weight").shape
    cells = torch.Size(kernel).numel()
    first, a, b = randn(2, 2), randn(out // 2, 3, seed=1), randn(3, width // 2 * cells, seed=2)
    key = "diffusion_model.patch_embedding"
    tensors = {f"{key}.lokr_w1": first, f"{key}.lokr_w2_a": a, f"{key}.lokr_w2_b": b, f"{key}.alpha": torch.tensor(3.0)}
    second = (a @ b).reshape(out // 2, width // 2, *kernel)
    blocks = [torch.cat([first[i, j] * second for j in range(2)], 1) for i in range(2)]
    return tensors, {"patch_embedding.weight": torch.cat(blocks)}


def mixed(transformer: Any) -> tuple[Update, Update]:
    """What LightX2V extracts: LoRA layers, differences of biases beside them, and of what has no matrix."""
    found = halves(transformer, {"blocks.0.attn1.to_k": 2, "blocks.0.ffn.net.2": 3})
    tensors = written(found, "ComfyUI", {"blocks.0.attn1.to_k": 4.0, "blocks.0.ffn.net.2": 3.0})
    update = differences(transformer, ["blocks.0.attn1.to_k.bias", *OTHERS])
    keys = OTHERS | {"blocks.0.attn1.to_k.bias": "blocks.0.self_attn.k.diff_b"}
    tensors |= {f"diffusion_model.{keys[name]}": tensor for name, tensor in update.items()}
    for name, (a, b) in found.items():
        update[f"{name}.weight"] = (2.0 if name.endswith("to_k") else 1.0) * b @ a
    return tensors, update


LAYOUTS: dict[str, Callable[..., tuple[Update, Update]]] = {
    "full differences, ComfyUI": comfyui,
    "full differences, LightX2V": lightx2v,
    "full differences, diffusers' names": diffusers_names,
    "full differences, kohya and LyCORIS": kohya,
    "LoKr of full factors, whose alpha counts for nothing": lokr(low_rank=False, alpha=7.0),
    "LoKr": lokr(low_rank=True, alpha=6.0),
    "LoKr without alpha, LyCORIS": lokr(low_rank=True, alpha=None, style="lycoris_{}"),
    "LoHa, LyCORIS": loha,
    "LoCon with a middle": tucker,
    "LoHa of a convolution": loha_of_a_convolution,
    "LoKr of a convolution": lokr_of_a_convolution,
    "LoRA and differences, LightX2V": mixed,
}


def by_hand(transformer: Any, *updates: tuple[float, Update]) -> Any:
    other = copy.deepcopy(transformer)
    for strength, update in updates:
        for name, tensor in update.items():
            parameter_of(other, name).data += strength * tensor
    return other


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def pipeline(tiny_backbone: Path) -> LuVePipeline:
    return tiny_luve(tiny_backbone)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_acts_as_its_update_by_hand(pipeline: LuVePipeline, layout: str) -> None:
    transformer = pipeline.transformer
    tensors, update = LAYOUTS[layout](transformer)
    before, saved = output(transformer), {k: v.clone() for k, v in transformer.state_dict().items()}
    want, half = (output(by_hand(transformer, (strength, update))) for strength in (1.0, 0.5))
    pipeline.load_lora_weights(tensors, "one")
    got = output(transformer)
    close(got, want)
    assert (got - before).abs().max() > 1e-3
    in_layers = {f"{key.split('.lora_A')[0]}.weight" for key in transformer.state_dict() if "lora_A" in key}
    for name in update.keys() - in_layers:
        torch.testing.assert_close(parameter_of(transformer, name) - saved[name], update[name], atol=1e-6, rtol=1e-5)
    pipeline.set_adapters("one", 0.5)
    close(output(transformer), half)
    with torch.no_grad():
        given = example(transformer) | {"attention_kwargs": {"scale": 2.0}}
        close(transformer(**given, return_dict=False)[0], want)
    close(output(transformer), half)
    pipeline.unload_lora_weights()
    assert torch.equal(output(transformer), before)
    now = transformer.state_dict()
    assert now.keys() == saved.keys()
    assert all(torch.equal(now[key], saved[key]) for key in saved)


@pytest.mark.parametrize("config", [LoKrConfig, LoHaConfig])
def test_the_files_of_peft(tiny_backbone: Path, tmp_path: Path, config: Any) -> None:
    """PEFT is the reference, and gives a scale also to a LoKr of full factors."""
    for number, more in enumerate(({}, {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"net.2": 9}})):
        settings = config(r=3, alpha=5, target_modules=["to_q", "net.2"], init_weights=False, **more)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            source = get_peft_model(load_transformer(tiny_backbone).eval(), settings)
        source.save_pretrained(tmp_path / str(number))
        pipeline = tiny_luve(tiny_backbone)
        summary = pipeline.load_lora_weights(tmp_path / str(number))
        close(output(pipeline.transformer), output(source.base_model.model))
        assert summary.kinds == {config.__name__[:4]: 6}
    (tmp_path / "1" / "adapter_config.json").unlink()
    assert tiny_luve(tiny_backbone).load_lora_weights(tmp_path / "1").assumed


def test_the_magnitudes_of_lycoris(pipeline: LuVePipeline) -> None:
    """W' = m (W + B A) / |W + B A|, the norm of each output's row; magnitudes of inputs are refused."""
    transformer, name = pipeline.transformer, "blocks.0.ffn.net.0.proj"
    found = halves(transformer, {name: 2})
    magnitudes = 1 + randn(32, 1).abs()
    tensors = written(found, "kohya", {name: 4.0}) | {"lora_unet_blocks_0_ffn_0.dora_scale": magnitudes}
    weight, (a, b) = transformer.get_submodule(name).weight.clone(), found[name]
    whole = weight + 2.0 * b @ a
    other = by_hand(
        transformer, (1.0, {f"{name}.weight": magnitudes * whole / whole.norm(dim=1, keepdim=True) - weight})
    )
    summary = pipeline.load_lora_weights(tensors)
    got = output(transformer)
    pipeline.unload_lora_weights()
    close(got, output(other))
    assert summary.dora
    for shape in ((1, 24), (32,), (32, 1, 2)):
        tensors["lora_unet_blocks_0_ffn_0.dora_scale"] = torch.ones(shape)
        with pytest.raises(ValueError, match=r"dora_scale has shape .*: magnitudes of inputs are not honoured"):
            pipeline.load_lora_weights(tensors)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("diffusion_model.blocks.0.self_attn.q.diff", (24, 20), r"\.diff: gives shape \(24, 20\), .* takes \(24, 24\)"),
        ("diffusion_model.blocks.0.norm2.diff", (20,), r"gives shape \(20,\), blocks\.0\.norm2\.weight"),
        ("diffusion_model.blocks.0.norm1.diff", (24,), r"blocks\.0\.norm1 of this transformer has no weight"),
        ("diffusion_model.blocks.0.self_attn.norm_q.diff_b", (24,), "norm_q of this transformer has no bias"),
        ("diffusion_model.blocks.0.attn1.diff", (24,), r"blocks\.0\.attn1 of this transformer has no weight"),
        ("diffusion_model.blocks.0.ffn.0.diff_m", (1, 6, 24), "1 of its 1 layer: not in this transformer"),
        ("diffusion_model.blocks.0.diff_m", (6, 24), r"diff_m: gives shape \(6, 24\), .* takes \(1, 6, 24\)"),
        ("diffusion_model.blocks.0.modulation.lokr_w1", (1, 6), "blocks.0.scale_shift_table is an incomplete LoKr"),
        ("diffusion_model.patch_embedding.lora_mid.weight", (3, 3, 1, 2, 2), "lora_mid.weight without its other half"),
    ],
)
def test_what_does_not_fit_is_named(pipeline: LuVePipeline, key: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        pipeline.load_lora_weights({key: torch.zeros(shape)})
    assert "\n" not in str(error.value)


def test_low_rank_parts_of_other_shapes_are_named(pipeline: LuVePipeline) -> None:
    tensors, _ = LAYOUTS["LoKr"](pipeline.transformer)
    key = "diffusion_model.blocks.0.self_attn.q"
    for changes, message in (
        ({f"{key}.lokr_w1": torch.zeros(3, 2)}, r"lokr_w1, .*q\.lokr_w2_a, .* gives shape \(18, 24\), .* \(24, 24\)"),
        ({f"{key}.lokr_w2_b": torch.zeros(2, 12)}, "shapes do not fit each other"),
        ({f"{key}.diff": torch.zeros(24, 24)}, "has both a LoKr and a weight difference of the same weight"),
        ({f"{key}.dora_scale": torch.ones(24, 1)}, "without its other half"),
        ({f"{key}.oft_blocks": torch.zeros(2, 2)}, "1 of its 13 tensors: no parts of a LoRA, cannot be honoured"),
        ({"diffusion_model.blocks.0.modulation.lora_A.weight": torch.zeros(1, 6),
          "diffusion_model.blocks.0.modulation.lora_B.weight": torch.zeros(1, 1)},
         "blocks.0.scale_shift_table is not a linear layer but a Parameter"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message) as error:
            pipeline.load_lora_weights(tensors | changes)
        assert "\n" not in str(error.value)


WRAPPERS = ("base_model.model.", "pipe.dit.", "model.", "diffusion_model.", "transformer.", "_orig_mod.", "module.")


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_never_taken_in_part(pipeline: LuVePipeline, data: Any) -> None:
    """Any part of any file, in any names: all of it acts as its update by hand, or its keys are named."""
    transformer = pipeline.transformer
    tensors, update = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](transformer)
    tensors, update = subset(transformer, tensors, update, data)
    prefix = "".join(data.draw(st.lists(st.sampled_from(WRAPPERS), max_size=3)))
    tensors = {prefix + re.sub(r"^(diffusion_model|transformer)\.", "", key): t for key, t in tensors.items()}
    broken = data.draw(st.sampled_from(["", "", "half", "stranger", "elsewhere", "shape", "twice", "nan"]))
    factors = [key for key in tensors if not re.search(r"\.(alpha|diff\w*|\w_norm)$", key)]
    key = data.draw(st.sampled_from(sorted(factors if broken == "half" and factors else tensors)))
    if broken == "half" and factors:
        del tensors[key]
    elif broken == "stranger":
        tensors[f"{key}.more"] = torch.zeros(2)
    elif broken == "elsewhere":
        tensors[re.sub(r"blocks([._])\d", r"blocks\g<1>77", key, count=1) + ("" if "blocks" in key else "_9.diff")] = (
            tensors[key]
        )
    elif broken == "shape":
        tensors[key] = torch.zeros(7, 5)
    elif broken == "twice":
        tensors[f"module.{key}"] = tensors[key]
    elif broken == "nan":
        tensors[key] = tensors[key] * float("nan")
    else:
        broken = ""
    before = output(transformer)
    if broken:
        with pytest.raises(ValueError, match=r"^LoRA weights: ") as error:
            pipeline.load_lora_weights(tensors)
        parsed = {key: parse_name(key) for key in tensors}
        named = set(parsed) | {name.layer for name in parsed.values() if name is not None}
        assert any(name in str(error.value) for name in named), error.value
        assert torch.equal(output(transformer), before), "nothing of it was taken"
        return
    pipeline.load_lora_weights(tensors)
    got = output(transformer)
    pipeline.unload_lora_weights()
    close(got, output(by_hand(transformer, (1.0, update))))
    assert torch.equal(output(transformer), before)


def subset(transformer: Any, tensors: Update, update: Update, data: Any) -> tuple[Update, Update]:
    """Some of a file's parameters, with the tensors for them."""
    module = {name: re.sub(r"\.(weight|bias)$", "", name) for name in update}
    chosen = data.draw(st.lists(st.sampled_from(sorted(set(module.values()))), min_size=1, unique=True))
    original = denoiser_of(transformer).original_name
    spelled = {
        spelling.replace(".", "_")
        for name in chosen
        for spelling in (name, original(name), original(name).replace("modulation", "diff_m"))
    }

    def layer(key: str) -> str:
        bare = re.sub(r"^(diffusion_model\.|transformer\.|lora_unet_|lycoris_)", "", key)
        bare = bare if bare.endswith("diff_m") else re.sub(r"\.(lora_\w+\.weight|[a-z_0-9]+)$", "", bare)
        return bare.replace(".", "_")

    return (
        {key: tensor for key, tensor in tensors.items() if layer(key) in spelled},
        {name: tensor for name, tensor in update.items() if module[name] in chosen},
    )
