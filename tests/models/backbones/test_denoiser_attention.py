"""A transformer whose self-attention is replaced: copied, recomputed, given experts, saved and loaded."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from luve_lightning.models.attention import Attention
from luve_lightning.models.attention.tiles import Tiles
from luve_lightning.models.attention.windows import Windows
from luve_lightning.models.backbones import Recompute, denoiser_of, load_backbone
from luve_lightning.models.experts import activate, add_expert, expert_parameters, load_expert, save_expert
from tests.helpers.attending import FrameAttention, LearnedFrameAttention
from tests.helpers.tiny_wan import HFE, LFE, inputs, load_transformer, output, randomise, tiny_transformer

KINDS = [
    LearnedFrameAttention(),
    Windows(((1, 4, 2), (2, 1, 1)), linear=True),
    Windows(((1, 2, 1),), ways="alternate", dense_layers=(1,)),
    Tiles((1, 4, 2), (1, 1, 2), linear=True),
]


def replaced(attention: Attention, dtype: torch.dtype = torch.float32, learned: bool = True) -> WanTransformer3DModel:
    """A transformer with an attention whose parameters are not zero."""
    transformer = tiny_transformer().to(dtype)
    denoiser = denoiser_of(transformer)
    denoiser.use_attention(attention)
    if learned:
        generator = torch.Generator().manual_seed(3)
        for branch in denoiser.branches.values():
            for parameter in branch.parameters():
                parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter)
    return transformer


@pytest.mark.parametrize("attention", KINDS, ids=repr)
@pytest.mark.parametrize("expert", [False, True], ids=["all weights", "expert"])
def test_recomputation_changes_no_gradient(attention: Attention, expert: bool) -> None:
    """Of all weights, the attention's own among them, or of experts around it and in the other places."""

    def gradients(recompute: Recompute) -> dict[str, Tensor]:
        transformer = replaced(attention)
        if expert:
            add_expert(transformer, "lfe", LFE)
            add_expert(transformer, "hfe", HFE)
            randomise(transformer, "lfe", "hfe")
            activate(transformer, {"lfe": [True, False], "hfe": [False, True]})
            for name in ("lfe", "hfe"):
                for parameter in expert_parameters(transformer, name):
                    parameter.requires_grad_(True)
        denoiser_of(transformer).set_recompute(recompute)
        output(transformer, inputs()).square().mean().backward()
        found = {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}
        assert all(grad is not None and grad.any() for name, grad in found.items() if "branch" in name or expert)
        return {name: grad for name, grad in found.items() if grad is not None}

    want = gradients("nothing")
    choices: tuple[Recompute, ...] = ("blocks", "all_but_attention")
    for recompute in choices:
        got = gradients(recompute)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], grad) for name, grad in want.items()), recompute


@pytest.mark.parametrize("attention", KINDS, ids=repr)
@torch.no_grad()
def test_a_batch_is_its_samples_and_a_copy_is_its_own(attention: Attention) -> None:
    transformer = replaced(attention)
    add_expert(transformer, "lfe", LFE)
    randomise(transformer, "lfe")
    three = inputs(3)
    want = output(transformer, three)
    alone = [output(transformer, {name: x[i : i + 1] for name, x in three.items()}) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), want)
    half = replaced(attention, torch.bfloat16)
    plain = output(replaced(attention), three)
    error = output(half, inputs(3, dtype=torch.bfloat16)).float() - plain
    assert 0 < error.square().mean() < 0.02 * plain.square().mean()

    copy = deepcopy(transformer)
    for branch in denoiser_of(copy).branches.values():
        for parameter in branch.parameters():
            parameter.zero_()
    activate(copy, None)
    assert torch.equal(output(transformer, three), want)
    denoiser_of(copy).use_attention(None)
    assert torch.equal(output(transformer, three), want)
    assert not torch.equal(output(copy, three), want)


@torch.no_grad()
def test_parameters_stay_where_they_fit_the_next_attention(tmp_path: Path) -> None:
    """A second adaptation, or another setting asked for by name, does not begin from zero again."""
    transformer = replaced(LearnedFrameAttention())
    denoiser = denoiser_of(transformer)
    before = {name: branch.weight.clone() for name, branch in denoiser.branches.items()}
    denoiser.use_attention(LearnedFrameAttention(2))
    assert all(torch.equal(branch.weight, before[name]) for name, branch in denoiser.branches.items())
    denoiser.save(tmp_path, torch.float32)
    denoiser.use_attention(FrameAttention())
    assert not denoiser.branches
    want = output(transformer, inputs())
    denoiser.save(tmp_path, torch.float32)  # into the same folder, where the parameters of the one before lie
    assert torch.equal(output(load_transformer(tmp_path), inputs()), want)
    denoiser.use_attention(LearnedFrameAttention())
    assert not any(branch.weight.any() for branch in denoiser.branches.values())


def test_parameters_that_diffusers_alone_did_not_load_are_missed(tmp_path: Path) -> None:
    denoiser_of(replaced(LearnedFrameAttention())).save(tmp_path, torch.float32)
    denoiser = denoiser_of(WanTransformer3DModel.from_pretrained(tmp_path))
    latents, text = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 3, denoiser.text_dim)
    with pytest.raises(ValueError, match="the transformer's attention has parameters, which were not loaded"):
        denoiser.velocity(latents, torch.tensor([500.0]), text)
    denoiser.copy().velocity(latents, torch.tensor([500.0]), text)
    load_backbone(tmp_path).denoiser().velocity(latents, torch.tensor([500.0]), text)


@torch.no_grad()
def test_a_hub_id_brings_its_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = replaced(LearnedFrameAttention())
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("a" * 40)
    denoiser_of(transformer).save(snapshot / "transformer", torch.float32)
    (snapshot / "model_index.json").write_text(
        '{"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}'
    )
    refs = tmp_path / "hub" / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    for module in ("huggingface_hub.constants", "diffusers.utils.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(output(load_transformer("some/model"), inputs()), output(transformer, inputs()))
    shutil.rmtree(snapshot / "transformer")
    denoiser_of(replaced(FrameAttention())).save(snapshot / "transformer", torch.float32)
    assert torch.equal(output(load_transformer("some/model"), inputs()), output(replaced(FrameAttention()), inputs()))


@torch.no_grad()
def test_an_expert_is_loaded_on_the_attention_that_it_was_trained_with(tmp_path: Path) -> None:
    """Another one must be allowed; a file without one, as saved for dense attention, means dense."""

    def saved(transformer: Any, name: str) -> Path:
        add_expert(transformer, name, LFE)
        randomise(transformer, name)
        save_expert(transformer, name, tmp_path / name)
        return tmp_path / name

    dense, framed = saved(tiny_transformer(), "dense"), saved(replaced(FrameAttention()), "framed")
    assert "attention" not in json.loads((dense / "expert.json").read_text())
    load_expert(replaced(FrameAttention()), framed)
    message = r"expert.json: the expert was trained with the attention {}.*, the transformer has {}"
    for folder, transformer, trained, own in (
        (dense, replaced(FrameAttention()), "Dense", "FrameAttention"),
        (framed, tiny_transformer(), "FrameAttention", "Dense"),
        (framed, replaced(FrameAttention(2)), "FrameAttention", r"FrameAttention\(frames=2\):"),
    ):
        with pytest.raises(ValueError, match=message.format(trained, own)) as error:
            load_expert(transformer, folder)
        assert "\n" not in str(error.value)
        assert not hasattr(transformer, "peft_config"), "it is left unchanged"
        assert load_expert(transformer, folder, any_attention=True) == folder.name
    file = framed / "expert.json"
    file.write_text(file.read_text().replace("FrameAttention", "Unknown"))
    with pytest.raises(ValueError, match=r"expert.json: attention 'Unknown': expected one of "):
        load_expert(replaced(FrameAttention()), framed)
    load_expert(tiny_transformer(), framed, any_attention=True)
