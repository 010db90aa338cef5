"""Files of one piece: what their headers tell, and the transformer in them against the same one from its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from luve_lightning.model_folders import KnownWeights, WeightsHeader, read_header
from luve_lightning.models.attention.windows import Windows
from luve_lightning.models.backbones import load_backbone, recognise
from luve_lightning.models.backbones.wan import WanBackbone
from luve_lightning.models.backbones.wan_denoiser import WanDenoiser
from luve_lightning.models.backbones.wan_files import load_transformer
from tests.helpers.attending import LearnedFrameAttention
from tests.helpers.tiny_wan import inputs, output, tiny_transformer
from tests.helpers.tiny_wan import load_transformer as from_folder
from tests.helpers.wan_files import own_config, own_name, own_weights, write_weights

WHOLE_HEADS = {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 1}
PREFIXES = (
    "",
    "model.",
    "diffusion_model.",
    "model.diffusion_model.",
    "pipe.dit.",
    "transformer.",
    "_orig_mod.",
    "module._orig_mod.",
    "base_model.model.pipe.dit.",
)


def known(path: Path) -> KnownWeights:
    found = recognise(read_header(path))
    assert found is not None
    return found


def refusal(path: Path, weights: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    found = known(write_weights(path / "file.safetensors", weights, metadata)).refusal
    assert found is not None
    assert "\n" not in found
    return found


def from_file(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_transformer(read_header(path), known(path), dtype)


def assert_same(transformer: Any, expected: Any, dtype: torch.dtype) -> None:
    weights, others = transformer.state_dict(), expected.state_dict()
    assert {n: x.dtype for n, x in weights.items()} == {n: x.dtype for n, x in others.items()}
    assert all(torch.equal(x, others[name]) for name, x in weights.items())
    with torch.no_grad():
        assert torch.equal(output(transformer, inputs(dtype=dtype)), output(expected, inputs(dtype=dtype)))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_gives_the_transformer_of_the_folder_to_the_bit(tmp_path: Path, prefix: str) -> None:
    transformer = tiny_transformer(**WHOLE_HEADS)
    tiny_transformer(**WHOLE_HEADS).half().save_pretrained(tmp_path / "folder")
    file = write_weights(tmp_path / "wan.safetensors", own_weights(transformer, prefix, torch.half))
    found = known(file)
    assert (found.family, found.part, found.layout, found.refusal) == ("wan", "transformer", "original", None)
    assert found.prefix == prefix.replace("_orig_mod.", "")
    assert {key: transformer.config[key] for key in found.sizes} == found.sizes | {"patch_size": (1, 2, 2)}
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(from_file(file, dtype), from_folder(tmp_path / "folder", dtype), dtype)
    write_weights(file, own_weights(transformer, prefix))
    assert_same(from_file(file), transformer, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_weights_of_another_dtype_are_widened_as_a_folders_are(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = own_weights(tiny_transformer(**WHOLE_HEADS), dtype=dtype)
    rounded = tiny_transformer(**WHOLE_HEADS)
    rounded.load_state_dict({name: x.to(dtype).float() for name, x in rounded.state_dict().items()})
    assert_same(from_file(write_weights(tmp_path / "a.safetensors", weights)), rounded, torch.float32)


def test_names_of_diffusers_and_of_compiled_modules_are_taken(tmp_path: Path) -> None:
    transformer = tiny_transformer(**WHOLE_HEADS)
    file = write_weights(tmp_path / "diffusers.safetensors", transformer.state_dict())
    assert known(file).layout == "diffusers"
    assert_same(from_file(file), transformer, torch.float32)
    inside = {n.replace("blocks.0.", "blocks.0._orig_mod."): x for n, x in own_weights(transformer).items()}
    assert_same(from_file(write_weights(tmp_path / "compiled.safetensors", inside)), transformer, torch.float32)


def test_a_shard_or_the_index_stands_for_all_shards(tmp_path: Path) -> None:
    transformer = tiny_transformer(**WHOLE_HEADS)
    weights = list(own_weights(transformer).items())
    names = [f"diffusion_pytorch_model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        save_file(dict(weights[i::3]), tmp_path / name)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: names[i % 3] for i, (key, _) in enumerate(weights)}}))
    for file in (tmp_path / names[1], index):
        assert_same(from_file(file), transformer, torch.float32)
    (tmp_path / names[2]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{names[2]}: no such file; {names[0]} is one of 3 shards"):
        read_header(tmp_path / names[0])


def test_other_heads_stand_in_a_configuration_beside_the_file_or_in_its_header(tmp_path: Path) -> None:
    transformer = tiny_transformer(rope_max_seq_len=1024)  # 2 heads of 12
    weights = own_weights(transformer)
    assert "has width 24, which is no multiple of heads of 128; another head width" in refusal(tmp_path, weights)
    file, beside = tmp_path / "file.safetensors", tmp_path / "config.json"
    beside.write_text(json.dumps(own_config(transformer)))
    assert_same(from_file(file), transformer, torch.float32)
    beside.write_text(transformer.to_json_string())
    assert_same(from_file(file), transformer, torch.float32)
    beside.write_text('{"_class_name": "LoRA", "num_heads": 4}')
    assert "has width 24" in str(known(file).refusal), "of something else"
    header = {"config": json.dumps(own_config(transformer))}
    assert_same(from_file(write_weights(file, weights, header)), transformer, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "says num_layers 3, but the weights' shapes say 2"),
        ({"num_heads": 7}, "has width 24, which is no multiple of the 7 heads"),
        ({"eps": "1e-6"}, "says eps '1e-6': no value of a Wan transformer's"),
        ({"rope_max_seq_len": [1024]}, "says rope_max_seq_len [1024]: no value"),
        ({"luve_attention": "windows"}, "says luve_attention 'windows': no value"),
        ({"dim": 48}, "says another width than the weights' shapes, 24"),
    ],
)
def test_a_configuration_of_another_model_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    transformer = tiny_transformer()
    config = {"config": json.dumps(own_config(transformer) | change)}
    assert message in refusal(tmp_path, own_weights(transformer), config)


def test_what_is_missing_foreign_or_of_another_shape_is_named(tmp_path: Path) -> None:
    whole = own_weights(tiny_transformer(**WHOLE_HEADS))
    for name, told in (
        ("blocks.0.cross_attn.norm_k.weight", "1 weight missing, for instance blocks.0.attn2.norm_k.weight"),
        ("head.modulation", "1 weight missing, for instance scale_shift_table"),
        ("patch_embedding.weight", "a part of a Wan transformer only: patch_embedding.weight (as diffusers names it)"),
    ):
        assert told in refusal(tmp_path, {key: x for key, x in whole.items() if key != name})
    extra = {"fps_embedding.weight": torch.zeros(2, 2)}
    assert "1 weight not those of a Wan transformer, for instance fps_embed" in refusal(tmp_path, whole | extra)
    twice = {"vae.blocks.0.modulation": torch.zeros(1)}
    under = own_weights(tiny_transformer(**WHOLE_HEADS), "model.")
    assert "for instance vae.blocks.0.modulation" in refusal(tmp_path, under | twice)
    longer = whole | {"blocks.0.ffn.0.bias": torch.zeros(33)}
    assert "for instance blocks.0.ffn.0.bias: expected (32,), got (33,)" in refusal(tmp_path, longer)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    weights = own_weights(tiny_transformer(**WHOLE_HEADS))
    file = write_weights(tmp_path / "wan.safetensors", weights)
    weights["blocks.0.ffn.0.bias"][2] = 3e38  # large, and finite
    weights["blocks.0.ffn.0.bias"][3] = 3e38
    from_file(write_weights(file, weights))
    weights["blocks.0.ffn.0.weight"][2, 3] = value
    with pytest.raises(ValueError, match=r"1 weight with values that are not finite, for instance blocks\.0\.ffn\.net"):
        from_file(write_weights(file, weights))


SHAPES = {own_name(n): tuple(x.shape) for n, x in tiny_transformer(**WHOLE_HEADS).state_dict().items()}
some_names = st.sets(st.sampled_from(sorted(SHAPES)), max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    prefix=st.lists(st.sampled_from(["model.", "diffusion_model.", "pipe.dit.", "_orig_mod."]), max_size=3).map(
        "".join
    ),
    dropped=some_names,
    moved=some_names,
    longer=some_names,
    extra=st.sampled_from([None, "blocks.0.ffn.4.weight", "blocks.7.modulation", "vae.conv1.weight", "scaled_fp8"]),
)
def test_a_file_is_taken_whole_or_not_at_all(
    prefix: str, dropped: set[str], moved: set[str], longer: set[str], extra: str | None
) -> None:
    shapes = {name: (shape[0] + (name in longer), *shape[1:]) for name, shape in SHAPES.items() if name not in dropped}
    placed = {("other." if name in moved else prefix) + name: shape for name, shape in shapes.items()}
    placed |= {prefix + extra: (1,)} if extra else {}
    header = WeightsHeader(Path("a"), (Path("a"),), placed, dict.fromkeys(placed, "F32"), {})
    found = recognise(header)
    if dropped | moved | longer or extra:
        assert found is None or found.refusal
    else:
        assert found is not None
        assert found.refusal is None
        assert sorted(found.names.values()) == sorted(placed)


def test_transformers_for_other_tasks_are_refused_by_what_they_are(tmp_path: Path) -> None:
    image = own_weights(tiny_transformer(**WHOLE_HEADS, in_channels=36, out_channels=16))
    assert "takes 36 latent channels and gives 16, as for image to video" in refusal(tmp_path, image)
    whole = own_weights(tiny_transformer(**WHOLE_HEADS), "model.diffusion_model.")
    for name, task in (
        ("img_emb.proj.0.weight", "image to video"),
        ("vace_blocks.0.after_proj.bias", "VACE"),
        ("face_adapter.fuser_blocks.0.linear1_kv.weight", "Wan-Animate"),
    ):
        more = {f"model.diffusion_model.{name}": torch.zeros(2)}
        assert f"for another task ({task}); expected one for text to video" in refusal(tmp_path, whole | more)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    whole = own_weights(tiny_transformer(**WHOLE_HEADS), dtype=torch.float8_e4m3fn)
    for name in ("scaled_fp8", "blocks.0.ffn.0.scale_weight"):
        told = refusal(tmp_path, whole | {name: torch.ones(1)})
        assert f"quantised weights with scales beside them, for instance {name}" in told
    integers = whole | {"blocks.0.ffn.0.weight": torch.zeros(32, 128, dtype=torch.int8)}
    assert "weights in I8, for instance blocks.0.ffn.0.weight" in refusal(tmp_path, integers)


def test_other_parts_are_known_but_not_taken(tmp_path: Path) -> None:
    vae = {"decoder.middle.0.residual.0.gamma": torch.zeros(2), "conv1.weight": torch.zeros(2)}
    assert refusal(tmp_path, vae) == "holds Wan's VAE, which is taken from vae/ of a diffusers pipeline folder"
    text = {"token_embedding.weight": torch.zeros(2), "blocks.0.ffn.gate.0.weight": torch.zeros(2)}
    assert "text_encoder/ of a diffusers pipeline folder" in refusal(tmp_path, text)
    lora = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}
    assert recognise(read_header(write_weights(tmp_path / "lora.safetensors", lora))) is None


def test_what_is_no_safetensors_file_is_told_by_what_it_is(tmp_path: Path) -> None:
    whole = write_weights(tmp_path / "whole.safetensors", own_weights(tiny_transformer(**WHOLE_HEADS))).read_bytes()
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.pth")
    for name, content, message in (
        ("cut.safetensors", whole[:-1], "cut short"),
        ("header.safetensors", whole[:100], "cut short"),
        ("text.safetensors", b"not weights at all", "not a safetensors file"),
        ("empty.safetensors", b"", "empty"),
        ("q4.gguf", b"GGUF\3\0\0\0", "GGUF"),
        ("pickle.pth", None, r"a pickle of PyTorch \(\.pth\), which is not read; expected a"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            read_header(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: no such file"):
        read_header(tmp_path / "none.safetensors")


def test_the_tests_own_names_are_those_that_wan_uses() -> None:
    names = [own_name(name) for name in tiny_transformer().state_dict()]
    assert {"head.modulation", "head.head.weight", "time_projection.1.bias", "text_embedding.2.weight"} <= set(names)
    block = {name.removeprefix("blocks.1.") for name in names if name.startswith("blocks.1.")}
    attention = {f"{part}.{end}" for part in "qkvo" for end in ("weight", "bias")} | {"norm_q.weight", "norm_k.weight"}
    sites = {f"{site}.{name}" for site in ("self_attn", "cross_attn") for name in attention}
    rest = {"modulation", "norm3.weight", "norm3.bias", "ffn.0.weight", "ffn.0.bias", "ffn.2.weight", "ffn.2.bias"}
    assert block == sites | rest


def test_a_file_stands_where_a_transformers_folder_does(tmp_path: Path) -> None:
    transformer = tiny_transformer(**WHOLE_HEADS)
    file = write_weights(tmp_path / "wan.safetensors", own_weights(transformer, "model.diffusion_model.", torch.half))
    backbone = load_backbone(file)
    assert isinstance(backbone, WanBackbone)
    denoiser = backbone.denoiser()
    assert (denoiser.channels, denoiser.text_dim, denoiser.heads, denoiser.patch) == (4, 8, 1, (1, 2, 2))
    rebuilt = backbone.from_config("transformer", backbone.config("transformer"))
    shapes = [{n: x.shape for n, x in module.state_dict().items()} for module in (rebuilt, denoiser.module)]
    assert shapes[0] == shapes[1]
    denoiser.use_attention(Windows(cuts=((1, 2, 2), (1, 1, 1))))
    denoiser.save(tmp_path / "saved", torch.float32)
    again = load_backbone(tmp_path / "saved").denoiser()
    assert again.attention == denoiser.attention
    assert_same(again.module, denoiser.module, torch.float32)
    lacking: tuple[tuple[str, Callable[[], object]], ...] = (
        ("vae", backbone.latent_space),
        ("vae", backbone.size_rules),
        ("tokenizer", backbone.text),
        ("text_encoder", backbone.text_encoder),
    )
    for part, ask in lacking:
        with pytest.raises(FileNotFoundError, match=f"wan.safetensors: holds a transformer, but no {part}/; expected"):
            ask()
    with pytest.raises(FileNotFoundError, match=r"no scheduler/scheduler_config\.json there"):
        backbone.schedule()


def test_a_configuration_that_names_an_attention_brings_it(tmp_path: Path) -> None:
    """As in the folder that an adaptation with it was exported to, where the file is named instead."""
    denoiser = WanDenoiser(tiny_transformer())
    for attention in (Windows(cuts=((1, 2, 2),)), LearnedFrameAttention()):
        denoiser.use_attention(attention)
        for branch in denoiser.branches.values():
            for parameter in branch.parameters():
                torch.nn.init.normal_(parameter)
        denoiser.save(tmp_path / "folder", torch.float32)
        loaded = load_backbone(tmp_path / "folder" / "diffusion_pytorch_model.safetensors").denoiser()
        assert loaded.attention == attention
        x = inputs()
        with torch.no_grad():
            got, expected = (d.velocity(*x.values()) for d in (loaded, denoiser))
        assert torch.equal(got, expected)


def test_a_folder_of_wans_own_layout_is_a_transformers_folder(tmp_path: Path) -> None:
    transformer = tiny_transformer(rope_max_seq_len=1024)
    (tmp_path / "config.json").write_text(json.dumps(own_config(transformer)))
    with pytest.raises(ValueError, match=r"expected one file of weights or its shards \(\.safetensors\), found none"):
        load_backbone(tmp_path).denoiser()
    weights = list(own_weights(transformer).items())
    for i in (0, 1):
        save_file(dict(weights[i::2]), tmp_path / f"diffusion_pytorch_model-{i + 1:05d}-of-00002.safetensors")
    assert_same(load_backbone(tmp_path).denoiser().module, transformer, torch.float32)
    save_file(dict(weights), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"found .*-00002-of-00002\.safetensors, other\.safetensors"):
        load_backbone(tmp_path).denoiser()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"lora_unet_blocks_0_self_attn_q.lora_down.weight": (4, 8)}, "holds a LoRA, for instance lora_unet_blocks"),
        ({"blocks.0.norm3.diff_b": (4,)}, "holds a LoRA, for instance blocks.0.norm3.diff_b"),
        ({"encoder.conv_first.weight": (4, 8)}, "holds nothing that a family of backbones knows, for instance encoder"),
        ({"decoder.middle.0.residual.0.gamma": (4,)}, "holds Wan's VAE"),
        ({"shared.weight": (4, 4), "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (4,)}, "text encoder"),
        ({"blocks.0.self_attn.q.weight": (4, 4)}, "a part of a Wan transformer only: patch_embedding.weight"),
    ],
)
def test_a_backbone_of_something_else_is_one_line(
    tmp_path: Path, weights: dict[str, tuple[int, ...]], message: str
) -> None:
    file = write_weights(tmp_path / "file.safetensors", {name: torch.zeros(shape) for name, shape in weights.items()})
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone(file)
    assert str(caught.value).startswith(f"backbone {file}: ")
    assert "\n" not in str(caught.value)


def test_a_damaged_backbone_file_is_one_line(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.safetensors", b"prompts", "not a safetensors file"),
        ("b.pth", b"PK\3\4", "pickle"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"backbone .*{name}: .*{message}"):
            load_backbone(tmp_path / name)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
def test_weights_of_the_wanted_dtype_stay_in_the_file_where_kernels_read_them_alike(tmp_path: Path) -> None:
    """A header's length shifts all that follows; the same weights at an odd address would give other last bits."""
    transformer, stayed = tiny_transformer(**WHOLE_HEADS), set()
    for length in range(8, 72, 8):
        header = {"note": "x" * length}
        file = write_weights(tmp_path / f"{length}.safetensors", own_weights(transformer), header)
        assert_same(loaded := from_file(file), transformer, torch.float32)
        lines = [
            line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))
        ]
        mapped = [tuple(int(end, 16) for end in ends.split("-")) for ends in lines]
        stayed |= {any(low <= p.data_ptr() < high for low, high in mapped) for p in loaded.parameters()}
    assert stayed == {True, False}
