"""A LoRA's additions to weights: at any strength, beside others and experts, and gone without a trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from luve_lightning.cascade import LuVePipeline
from luve_lightning.cascade.lora_layers import parameter_of
from tests.cascade.test_lora_layers import example, output
from tests.cascade.test_lora_loading_layouts import by_hand, close, comfyui, lokr, mixed
from tests.helpers.tiny_luve import EXPERTS, PROMPT, add_experts, seeded, tiny_luve


@pytest.fixture(scope="module")
def pipeline(tiny_backbone: Path) -> LuVePipeline:
    return tiny_luve(tiny_backbone)


def test_several_loras_at_their_strengths(pipeline: LuVePipeline) -> None:
    transformer = pipeline.transformer
    before = output(transformer)
    (first, one), (second, two) = comfyui(transformer), lokr(low_rank=True, alpha=6.0)(transformer)
    (third, three) = mixed(transformer)
    pipeline.load_lora_weights(first)
    pipeline.load_lora_weights(second)
    assert pipeline.get_list_adapters() == {"transformer": ["default_0", "default_1"]}
    assert pipeline.get_active_adapters() == ["default_1"], "the one that was loaded last, as with LoRA layers"
    close(output(transformer), output(by_hand(pristine(pipeline), (1.0, two))))
    pipeline.load_lora_weights(third, "third")
    pipeline.set_adapters(["default_0", "default_1", "third"], [0.5, -1.0, 2.0])
    wanted = ((0.5, one), (-1.0, two), (2.0, three))
    close(output(transformer), output(by_hand(pristine(pipeline), *wanted)))
    pipeline.disable_lora()
    assert torch.equal(output(transformer), before)
    pipeline.enable_lora()
    close(output(transformer), output(by_hand(pristine(pipeline), *wanted)))
    pipeline.delete_adapters("default_1")
    close(output(transformer), output(by_hand(pristine(pipeline), wanted[0], wanted[2])))
    with torch.no_grad():
        given = example(transformer) | {"attention_kwargs": {"scale": 0.0}}
        assert torch.equal(transformer(**given, return_dict=False)[0], before)
    with pytest.raises(ValueError, match="LoRA weights: the name 'third' is taken by another adapter"):
        pipeline.load_lora_weights(first, "third")
    transformer.unload_lora()  # diffusers' own, which tells the layers nothing
    assert torch.equal(output(transformer), before)
    pipeline.load_lora_weights(first, "third")
    pipeline.unload_lora_weights()
    assert torch.equal(output(transformer), before)


def pristine(pipeline: LuVePipeline) -> Any:
    """The transformer as it was before any LoRA."""
    transformer = pipeline.transformer
    other = type(transformer)(**{k: v for k, v in transformer.config.items() if not k.startswith("_")})
    state = {k.replace(".base_layer", ""): v for k, v in transformer.state_dict().items() if "lora_" not in k}
    other.load_state_dict(state)
    return other.eval()


@pytest.mark.slow
def test_differences_and_experts_act_together(tiny_backbone: Path) -> None:
    base = tiny_luve(tiny_backbone)
    tensors, update = mixed(base.transformer)
    base.transformer = by_hand(base.transformer, (1.0, update))
    add_experts(base.transformer, EXPERTS)
    run = {"height": 64, "width": 96, "num_frames": 5, "steps": 2, "skip_steps": 0, "output_type": "latent"}
    want = base(PROMPT, **run, generator=seeded())
    first, second = tiny_luve(tiny_backbone), tiny_luve(tiny_backbone, EXPERTS)
    first.load_lora_weights(dict(tensors))
    add_experts(first.transformer, EXPERTS)
    alone = second(PROMPT, **run, generator=seeded())
    second.load_lora_weights(dict(tensors))
    for pipeline in (first, second):
        got = pipeline(PROMPT, **run, generator=seeded())
        torch.testing.assert_close(got.frames, want.frames, atol=3e-4, rtol=1e-3)
        assert (got.frames - alone.frames).abs().max() > 0.01
        assert got.experts_used == want.experts_used
        pipeline.unload_lora_weights()
        assert torch.equal(pipeline(PROMPT, **run, generator=seeded()).frames, alone.frames)


def test_nothing_of_a_lora_is_saved(tiny_backbone: Path, tmp_path: Path) -> None:
    pipeline = tiny_luve(tiny_backbone, EXPERTS)
    transformer = pipeline.transformer
    before = {k: v.clone() for k, v in transformer.state_dict().items()}
    pipeline.load_lora_weights(comfyui(transformer)[0], "kept")
    with pytest.raises(ValueError, match="the LoRA 'kept' is loaded, which a saved pipeline does not keep"):
        pipeline.save_pretrained(tmp_path)
    now = transformer.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[key], before[key]) for key in before)
    assert not torch.equal(parameter_of(transformer, "scale_shift_table"), before["scale_shift_table"])


def test_a_copy_has_its_own_differences(pipeline: LuVePipeline) -> None:
    transformer = pipeline.transformer
    before = output(transformer)
    pipeline.load_lora_weights(comfyui(transformer)[0], "one")
    loaded, other = output(transformer), copy.deepcopy(transformer)
    other.set_adapters("one", 0.0)
    close(output(other), before)  # a copy lies elsewhere in memory, and may round differently
    assert torch.equal(output(transformer), loaded)
    pipeline.unload_lora_weights()
    other.set_adapters("one", 1.0)
    close(output(other), loaded)
    assert torch.equal(output(transformer), before)


def test_bfloat16_weights_are_rounded_once_and_restored(tiny_backbone: Path) -> None:
    pipeline = tiny_luve(tiny_backbone)
    transformer = pipeline.transformer.to(torch.bfloat16)
    before = {k: v.clone() for k, v in transformer.state_dict().items()}
    first, one = comfyui(transformer)
    pipeline.load_lora_weights(first, "one")
    pipeline.load_lora_weights({k: 1e-3 * v for k, v in first.items()}, "two")
    for strengths in ([1.0, 1.0], [0.25, 2.0]):
        pipeline.set_adapters(["one", "two"], strengths)
        for name, tensor in one.items():
            want = before[name].float() + strengths[0] * tensor + strengths[1] * (1e-3 * tensor)
            assert torch.equal(parameter_of(transformer, name), want.to(parameter_of(transformer, name).dtype)), name
    pipeline.unload_lora_weights()
    assert all(torch.equal(v, before[k]) for k, v in transformer.state_dict().items())


def test_what_cannot_be_done_is_one_line(tiny_backbone: Path) -> None:
    pipeline = tiny_luve(tiny_backbone)
    transformer = pipeline.transformer
    tensors, _ = comfyui(transformer)
    pipeline.load_lora_weights(tensors, "one")
    with pytest.raises(ValueError, match="the LoRA 'one' has full-rank differences and cannot be fused"):
        pipeline.fuse_lora()
    with pytest.raises(ValueError, match="'one' has full-rank differences, which take one strength for all layers"):
        pipeline.set_adapters(["one"], [{"blocks.0": 0.5}])
    pipeline.unload_lora_weights()
    weight = transformer.patch_embedding.weight
    transformer.patch_embedding.weight = torch.nn.Parameter(weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"cannot be added: patch_embedding\.weight is kept elsewhere"):
        pipeline.load_lora_weights(tensors, "one")
    transformer.patch_embedding.weight = torch.nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"patch_embedding\.weight is of torch\.float8_e4m3fn"):
        pipeline.load_lora_weights(tensors, "one")
