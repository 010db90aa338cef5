"""LuVePipeline on disk, and other people's LoRAs in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luve_lightning.cascade import LuVePipeline
from luve_lightning.models.attention.dense import Dense
from luve_lightning.models.backbones import denoiser_of
from luve_lightning.models.experts import expert_names, save_expert
from luve_lightning.models.vluer import VLUer
from tests.helpers.attending import LearnedFrameAttention
from tests.helpers.tiny_luve import EXPERTS, PLAIN, PROMPT, add_experts, seeded, tiny_luve
from tests.helpers.tiny_wan import load_transformer, randomise, tiny_transformer

RUN: dict[str, Any] = {
    "height": 64, "width": 96, "num_frames": 5, "steps": 2, "skip_steps": 0, "guidance": 2.0,
    "output_type": "latent",
}  # fmt: skip


def weights(pipeline: LuVePipeline) -> dict[str, Tensor]:
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}


def assert_same(a: LuVePipeline, b: LuVePipeline) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert torch.equal(tensor, right[key]), key
        assert tensor.dtype == right[key].dtype, key


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("refiner", [False, True])
def test_an_attention_is_saved_loaded_and_replaced_by_name(tiny_backbone: Path, tmp_path: Path, refiner: bool) -> None:
    """With its parameters, whoever loads the transformer, and with experts of the same or, if asked for, another."""
    pipeline = tiny_luve(tiny_backbone, refiner=refiner)
    denoiser = denoiser_of(pipeline.refinement_transformer)
    denoiser.use_attention(LearnedFrameAttention())
    for branch in denoiser.branches.values():
        nn.init.normal_(branch.weight, std=0.3)
    add_experts(denoiser.module, EXPERTS)
    want = pipeline(PROMPT, **RUN, generator=seeded()).frames
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(pipeline(PROMPT, **RUN, generator=seeded()).frames, want)

    def video(**options: Any) -> Tensor:
        loaded = LuVePipeline.from_pretrained(tmp_path, **options)
        loaded.set_progress_bar_config(disable=True)
        frames: Tensor = loaded(PROMPT, **RUN, generator=seeded()).frames
        return frames

    assert torch.equal(video(), want)
    assert torch.equal(video(use_safetensors=True), want)  # an option with which diffusers loads every part
    assert torch.equal(video(attention=LearnedFrameAttention()), want)
    dense = video(attention=Dense())
    assert not torch.allclose(dense, want, atol=1e-3)
    experts = {name: tmp_path / "experts" / name for name in EXPERTS}
    with pytest.raises(ValueError, match=r"trained with the attention LearnedFrameAttention.*, the transformer has D"):
        LuVePipeline.from_pretrained(tmp_path, experts=experts, refiner=tiny_backbone)
    other = {"refiner": tiny_backbone, "attention": LearnedFrameAttention()}
    assert expert_names(LuVePipeline.from_pretrained(tmp_path, experts=experts, **other).refiner) == ["lfe", "hfe"]
    # Saved again with dense attention, nothing of it is left.
    again = LuVePipeline.from_pretrained(tmp_path, attention=Dense())
    again.save_pretrained(tmp_path)
    assert torch.equal(video(), dense)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_is_missing_or_does_not_fit_is_one_line(tiny_backbone: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    tiny_luve(tiny_backbone).save_pretrained(saved)
    (tmp_path / "empty").mkdir()
    for options, message in (
        ({"backbone": tmp_path / "nowhere"}, "backbone .*nowhere: no such folder"),
        ({"backbone": "nobody/nothing"}, "backbone nobody/nothing: no such folder, and its .* from the hub"),
        ({"backbone": tmp_path / "empty"}, r"no model_index\.json there"),
        ({"vluer": tmp_path / "empty"}, r"vluer .*: no config\.json there; expected a folder saved by VLUer"),
        ({"experts": tmp_path / "empty"}, r"experts .*: no expert there; expected folders such as lfe/ and hfe/"),
        ({"experts": {"lfe": tmp_path / "empty"}}, r"no expert in .*: expert\.json is missing"),
        ({"refiner": tmp_path / "empty"}, r"nor transformer/config\.json"),
        ({"shift": 0.0}, "shift: expected a number greater than 0"),
        ({"shift": float("inf")}, "shift: expected a number greater than 0"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
            LuVePipeline.from_pretrained(**{"backbone": saved} | options)
        assert "\n" not in str(error.value)
    VLUer(latent_channels=4, channels=4, pairs=1, hidden=4, query_channels=4).save_pretrained(tmp_path / "four")
    with pytest.raises(ValueError, match="the VLUer takes 4 latent channels, the VAE has 16"):
        LuVePipeline.from_pretrained(saved, vluer=tmp_path / "four")
    (saved / "transformer" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"backbone .*saved: no transformer/config\.json there"):
        LuVePipeline.from_pretrained(saved)
    parts = tiny_luve(tiny_backbone).components
    with pytest.raises(ValueError, match=r"the backbone is a Wan2\.2 one"):
        LuVePipeline(**parts | {"transformer_2": tiny_transformer()})


def test_a_plain_lora_expert_is_saved_as_one(tiny_backbone: Path, tmp_path: Path) -> None:
    pipeline = tiny_luve(tiny_backbone, {"plain": replace(PLAIN["lfe"], place="cross_attention")})
    randomise(pipeline.transformer, "plain")
    pipeline.save_pretrained(tmp_path)
    assert_same(pipeline, LuVePipeline.from_pretrained(tmp_path))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def without_one(file: Path) -> None:
    tensors = load_file(file)
    del tensors[sorted(tensors)[-1]]
    save_file(tensors, file, metadata={"format": "pt"})


def with_another(file: Path) -> None:
    save_file(load_file(file) | {"strange": torch.zeros(2)}, file, metadata={"format": "pt"})


def with_nan(file: Path) -> None:
    weights = load_file(file)
    name = next(name for name, weight in weights.items() if weight.dtype == torch.float32 and weight.numel() > 3)
    weights[name].view(-1)[3] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})


def without_values(file: Path) -> None:
    file.write_text("{}")


def nested(file: Path) -> None:
    file.write_text("[" * 100_000)


def a_list(file: Path) -> None:
    file.write_text("[1, 2]")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("vluer/diffusion_pytorch_model.safetensors", cut, "/vluer: cannot be loaded: "),
        ("vluer/diffusion_pytorch_model.safetensors", without_one, "/vluer: 1 weight missing, for instance "),
        ("vluer/diffusion_pytorch_model.safetensors", with_another, "/vluer: 1 weight not this model's, for"),
        ("vluer/config.json", without_values, r"/vluer/config\.json: no configuration of diffusers"),
        ("wan/text_encoder/model.safetensors", cut, "/wan: cannot load its text_encoder/: SafetensorError: "),
        ("wan/text_encoder/model.safetensors", without_one, "/wan: its text_encoder/: 2 weights missing, for in"),
        ("wan/text_encoder/config.json", without_values, r"/wan: its text_encoder/: \d+ weights missing, for"),
        ("wan/tokenizer/tokenizer.json", cut, "/wan: cannot load its tokenizer/: JSONDecodeError: "),
        ("wan/tokenizer/tokenizer.json", nested, "/wan: cannot load its tokenizer/: RecursionError: "),
        ("wan/tokenizer/tokenizer_config.json", without_values, "/wan: its tokenizer/ has no padding token"),
        ("wan/transformer/diffusion_pytorch_model.safetensors", cut, "/wan: cannot load its transformer/: "),
        ("wan/transformer/diffusion_pytorch_model.safetensors", without_one, "/wan: its transformer/: 1 weight miss"),
        ("wan/transformer/diffusion_pytorch_model.safetensors", with_nan, "/wan: its transformer/: 1 weight with"),
        ("wan/vae/diffusion_pytorch_model.safetensors", with_nan, "/wan: its vae/: 1 weight with values that are not"),
        ("vluer/diffusion_pytorch_model.safetensors", with_nan, "/vluer: 1 weight with values that are not finite, f"),
        ("wan/vae/diffusion_pytorch_model.safetensors", without_one, "/wan: its vae/: 1 weight missing"),
        ("wan/scheduler/scheduler_config.json", a_list, r"scheduler_config\.json: expected a JSON object, got a list"),
        ("wan/model_index.json", nested, r"/wan/model_index\.json: not JSON: "),
        ("experts/lfe/expert.json", Path.unlink, "no expert in .*/lfe: expert.json is missing"),
        ("experts/lfe/expert.json", nested, r"expert\.json: not JSON: "),
    ],
)  # fmt: skip
def test_damaged_models_are_one_line(
    tiny_cascade: Path, tmp_path: Path, part: str, damage: Callable[[Path], None], message: str
) -> None:
    """Libraries fill in random numbers for what is missing, or raise whatever their parsers raise."""
    for name in ("wan", "vluer", "experts"):
        shutil.copytree(tiny_cascade / name, tmp_path / name)
    damage(tmp_path / part)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        LuVePipeline.from_pretrained(tmp_path / "wan", tmp_path / "vluer", tmp_path / "experts")
    assert "\n" not in str(error.value)


def test_a_scheduler_without_flow_sigmas_is_refused(tiny_cascade: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_cascade / "wan", tmp_path / "wan")
    config = tmp_path / "wan" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "UniPCMultistepScheduler"}))
    with pytest.raises(ValueError, match="its scheduler/ is UniPCMultistepScheduler without use_flow_sigmas"):
        LuVePipeline.from_pretrained(tmp_path / "wan")
