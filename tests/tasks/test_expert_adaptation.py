"""The resolution adaptation: all weights or a LoRA, on one process or sharded over two, and what is exported."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open

from luve_lightning.callbacks import EMA, AtomicCheckpointIO, Export
from luve_lightning.cascade.lora_files import read_lora
from luve_lightning.cascade.lora_loading import load_lora
from luve_lightning.models.attention.dense import Dense
from luve_lightning.models.attention.windows import Windows
from luve_lightning.models.backbones import load_backbone
from luve_lightning.tasks import AdaptationTask
from tests.helpers.attending import FrameAttention, LearnedFrameAttention
from tests.helpers.processes import run_processes
from tests.helpers.resumable import Run
from tests.helpers.tiny_flow import World, adapt, make_trainer
from tests.helpers.tiny_wan import load_transformer, prediction
from tests.helpers.wan_files import own_config, own_weights, write_weights


@pytest.mark.parametrize("rank", [0, 3], ids=["all weights", "lora"])
def test_the_export_gives_what_the_trained_model_gives(world: World, tmp_path: Path, rank: int) -> None:
    torch.manual_seed(0)
    task = world.adaptation(lora_rank=rank, lr=3e-2, recompute="blocks")
    base = load_transformer(world.backbone)
    before = prediction(task.transformer)
    assert torch.equal(before, prediction(base)), "a new LoRA is nothing"
    linear_in_blocks = sum(isinstance(m, torch.nn.Linear) for m in base.blocks.modules())
    trained = sum(p.requires_grad for p in task.parameters())
    assert trained == (2 * linear_in_blocks if rank else len(list(base.parameters())))
    make_trainer(tmp_path, max_steps=3, callbacks=[Export(tmp_path)]).fit(task, world.data())
    after = prediction(task.transformer)
    assert (after - before).abs().max() > 1e-2
    exported = load_transformer(tmp_path)
    torch.testing.assert_close(prediction(exported), after, rtol=1e-4, atol=1e-5)
    assert exported.state_dict().keys() == base.state_dict().keys(), "adapters are merged, not saved beside"
    assert set(exported.config) - {"_name_or_path"} == set(base.config) - {"_name_or_path"}
    lora = tmp_path / "transformer" / "lora"
    assert lora.is_dir() == bool(rank)
    if rank:
        summary = load_lora([base], read_lora(lora), "again", None)
        assert (summary.ranks, summary.scales, summary.layers) == ([rank], [1.0], linear_in_blocks)
        torch.testing.assert_close(prediction(base), after, rtol=1e-5, atol=1e-6)
    # The base of the experts: a task takes the folder as it is.
    assert torch.equal(prediction(world.adaptation().transformer), before)


def test_named_layers_have_other_ranks_of_the_same_scale(world: World, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ranks = {"attn1.to_q": 1, "blocks.1.ffn.net.2": 5}
    task = world.adaptation(lora_rank=2, lora_ranks=ranks, lr=3e-2)
    found = {name: p.shape[0] for name, p in task.transformer.named_parameters() if "lora_A" in name}
    for name, rank in found.items():
        assert rank == next((other for end, other in ranks.items() if f"{end}.lora_A" in name), 2)
    assert sorted(found.values()) == [1, 1] + [2] * (len(found) - 3) + [5]
    make_trainer(tmp_path, max_steps=3, callbacks=[Export(tmp_path)]).fit(task, world.data())
    after, base = prediction(task.transformer), load_transformer(world.backbone)
    torch.testing.assert_close(prediction(load_transformer(tmp_path)), after, rtol=1e-4, atol=1e-5)
    summary = load_lora([base], read_lora(tmp_path / "transformer" / "lora"), "again", None)
    assert (sorted(summary.ranks), summary.scales) == ([1, 2, 5], [1.0])
    torch.testing.assert_close(prediction(base), after, rtol=1e-5, atol=1e-6)


def test_a_later_export_removes_the_lora_of_an_earlier_one(world: World, tmp_path: Path) -> None:
    for rank in (2, 0):
        export = Export(tmp_path)
        make_trainer(tmp_path, max_steps=1, callbacks=[export]).fit(world.adaptation(lora_rank=rank), world.data())
        assert (tmp_path / "transformer" / "lora").exists() == bool(rank)


def test_a_lora_says_which_attention_it_was_trained_with(world: World, tmp_path: Path) -> None:
    world.adaptation(lora_rank=2, attention=FrameAttention()).export(tmp_path, None)
    with safe_open(tmp_path / "transformer/lora/adapter_model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["luve_attention"]) == FrameAttention().record()


def test_it_starts_from_a_file_of_wans_own_names_as_from_its_folder(world: World, tmp_path: Path) -> None:
    """In half precision: what is converted lies in memory of its own, where kernels give the same last bits."""
    folder = load_backbone(world.backbone).denoiser()
    folder.save(tmp_path / "half", torch.half)
    transformer = load_transformer(tmp_path / "half")
    file = write_weights(
        tmp_path / "wan.safetensors",
        own_weights(transformer, "pipe.dit.", torch.half),
        {"config": json.dumps(own_config(transformer))},
    )
    for name, backbone in (("file", file), ("folder", tmp_path / "half")):
        task = replace(world, backbone=backbone).adaptation(lr=3e-2)
        make_trainer(tmp_path, max_steps=2, callbacks=[Export(tmp_path / name)]).fit(task, world.data())
    exported = WanTransformer3DModel.from_pretrained(tmp_path / "file", subfolder="transformer")
    assert torch.equal(prediction(exported), prediction(load_transformer(tmp_path / "folder")))
    assert not torch.equal(prediction(exported), prediction(transformer))
    expert = replace(world, backbone=file).expert()
    assert torch.equal(prediction(expert.transformer), prediction(transformer)), "a new expert changes nothing"


def test_experts_are_trained_with_the_attention_of_their_base(world: World, tmp_path: Path) -> None:
    task = world.adaptation(attention=FrameAttention())
    task.export(tmp_path, None)
    expert = replace(world, backbone=tmp_path).expert()
    got = prediction(expert.transformer)
    assert torch.equal(got, prediction(task.transformer))
    assert not torch.allclose(got, prediction(world.adaptation().transformer), atol=1e-4)


@pytest.mark.parametrize("rank", [0, 3], ids=["all weights", "lora"])
def test_an_attentions_own_parameters_are_trained_and_exported(world: World, tmp_path: Path, rank: int) -> None:
    """Whole even beside a LoRA, averaged like the rest; a second adaptation goes on with them."""
    torch.manual_seed(0)
    task = world.adaptation(lora_rank=rank, lr=3e-2, attention=LearnedFrameAttention())
    ema = EMA(0.5)
    make_trainer(tmp_path, max_steps=2, callbacks=[ema, Export(tmp_path)]).fit(task, world.data())
    own = {name: x for name, x in task.named_parameters() if ".branch." in name}
    assert len(own) == len(task.denoiser.blocks)
    assert all(x.requires_grad and x.any() for x in own.values())
    assert own.keys() <= ema.average.keys()
    with ema.averaged(task):
        want = prediction(task.transformer)
    exported = replace(world, backbone=tmp_path)
    assert not (tmp_path / "transformer" / "lora").exists(), "it would lack the attention's parameters"
    again = exported.adaptation()
    assert again.denoiser.attention == LearnedFrameAttention()
    torch.testing.assert_close(prediction(again.transformer), want, rtol=1e-4, atol=1e-5)
    other = exported.adaptation(attention=LearnedFrameAttention(2))
    assert all(branch.weight.any() for branch in other.denoiser.branches.values())
    expert = exported.expert()
    trained = {name for name, x in expert.named_parameters() if x.requires_grad}
    assert trained
    assert not any("branch" in name for name in trained)


def test_another_attention_than_an_experts_is_asked_for_by_name(world: World, tmp_path: Path) -> None:
    framed = world.expert(attention=FrameAttention())
    framed.export(tmp_path, None)
    with pytest.raises(ValueError, match=r"trained with the attention FrameAttention.*, the transformer has Dense"):
        world.expert(init_from=str(tmp_path))
    for attention in (FrameAttention(), FrameAttention(2), Dense()):
        task = world.expert(init_from=str(tmp_path), attention=attention)
        assert task.denoiser.attention == attention
    want = prediction(world.adaptation().transformer)
    torch.testing.assert_close(prediction(world.adaptation(attention=Dense()).transformer), want)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_transformer(folder / "export").state_dict()


@pytest.fixture(scope="module")
def windowed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One step with windows and their own parameters, under FSDP2 on two processes."""
    task = {"world": world, "sharded": True, "attention": Windows(((1, 2, 2),), linear=True)}
    run = Run(tmp_path_factory.mktemp("windowed") / "fsdp", steps=1, processes=2, task=task)
    assert run_processes(run, adapt) == [0, 0], (run.folder / "output-0.txt").read_text()
    return run


@pytest.mark.slow
def test_sharded_an_attentions_own_parameters_are_trained_and_exported(windowed: Run, tmp_path: Path) -> None:
    """FSDP2 on two processes; the run goes on from its checkpoint."""
    run = windowed.with_(folder=tmp_path / "fsdp")
    shutil.copytree(windowed.folder, run.folder)
    first = load_backbone(run.folder / "export").denoiser()
    own = {name: branch.projection for name, branch in first.branches.items()}
    assert len(own) == len(first.blocks)
    assert all(weight.any() for weight in own.values())
    assert run_processes(run.with_(steps=2, resume="last"), adapt) == [0, 0]
    second = load_backbone(run.folder / "export").denoiser()
    assert all(not torch.equal(branch.projection, own[name]) for name, branch in second.branches.items())


def test_a_process_that_only_helps_to_export_waits_until_its_gpu_has_sent_all(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(AdaptationTask, "global_rank", 1)
    monkeypatch.setattr(AdaptationTask, "device", torch.device("cuda", 1))
    world.adaptation().export(tmp_path / "export", None)
    assert waited == [torch.device("cuda", 1)]
    assert not (tmp_path / "export").exists()


@pytest.mark.slow
def test_sharded_over_two_processes_it_is_the_same_training(world: World, tmp_path: Path) -> None:
    """FSDP2 against DDP; and a sharded run that stops after a step goes on where it was."""
    whole = Run(tmp_path / "ddp", steps=2, processes=2, task={"world": world, "sharded": False})
    assert run_processes(whole, adapt) == [0, 0]
    sharded = whole.with_(folder=tmp_path / "fsdp", task={"world": world, "sharded": True})
    assert run_processes(sharded.with_(steps=1), adapt) == [0, 0]
    kept = AtomicCheckpointIO().load_checkpoint(sharded.last)
    assert len(kept["state_dict"]) == len(weights(sharded.folder)), "one file holds all shards"
    after_one = weights(sharded.folder)
    assert run_processes(sharded.with_(resume="last"), adapt) == [0, 0]
    assert (sharded.folder / "step.txt").read_text() == "2"
    # A checkpoint of 17 GB that is replaced while it is mapped keeps its place on the disk.
    assert [(sharded.folder / f"mapped-{rank}.txt").read_text() for rank in (0, 1)] == ["", ""]
    want, got = weights(whole.folder), weights(sharded.folder)
    base = load_transformer(world.backbone).state_dict()
    assert any(not torch.equal(got[name], after_one[name]) for name in got)
    update, reference = (torch.cat([(w[n] - base[n]).flatten() for n in base]) for w in (got, want))
    assert torch.nn.functional.cosine_similarity(update, reference, dim=0) > 0.999
    torch.testing.assert_close(update.norm(), reference.norm(), rtol=1e-3, atol=0)


@pytest.mark.slow
def test_sharded_a_lora_is_merged_and_saved_whole(world: World, tmp_path: Path) -> None:
    """FSDP2 on two processes: the LoRA on the base gives what the merged transformer gives."""
    run = Run(tmp_path / "fsdp", steps=2, processes=2, task={"world": world, "sharded": True, "lora_rank": 3})
    assert run_processes(run, adapt) == [0, 0], (run.folder / "output-0.txt").read_text()
    base = load_transformer(world.backbone)
    before = prediction(base)
    load_lora([base], read_lora(run.folder / "export" / "transformer" / "lora"), "again", None)
    merged = prediction(load_transformer(run.folder / "export"))
    assert (merged - before).abs().max() > 5e-5
    torch.testing.assert_close(prediction(base), merged, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiled_on_two_processes_it_is_the_same_training(world: World, windowed: Run, tmp_path: Path) -> None:
    """DDP and FSDP2, with the blocks' inputs offloaded, against eager FSDP2."""
    want, base = weights(windowed.folder), load_transformer(world.backbone).state_dict()
    reference = torch.cat([(want[name] - base[name]).flatten() for name in base])
    for sharded in (False, True):
        options = windowed.task | {"sharded": sharded, "compile": "aot_eager", "offload": True}
        run = windowed.with_(folder=tmp_path / f"compiled-{sharded}", task=options)
        assert run_processes(run, adapt) == [0, 0], (run.folder / "output-0.txt").read_text()
        got = weights(run.folder)
        update = torch.cat([(got[name] - base[name]).flatten() for name in base])
        assert torch.nn.functional.cosine_similarity(update, reference, dim=0) > 0.999
        torch.testing.assert_close(update.norm(), reference.norm(), rtol=1e-3, atol=0)


def test_mistakes(world: World) -> None:
    with pytest.raises(ValueError, match=r"lora_rank: expected 0 .* or a rank, got -1"):
        world.adaptation(lora_rank=-1)
    for rank, ranks, message in (
        (0, {"to_q": 1}, "lora_ranks: expected none, because lora_rank 0 trains all weights"),
        (2, {"to_q": 0}, "lora_ranks.to_q: expected at least 1, got 0"),
        (2, {"to_queries": 1}, "lora_ranks.to_queries: no linear layer of the blocks has a name that ends so"),
        (2, {"attn1.to.q": 1}, "lora_ranks.attn1.to.q: no linear layer"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            world.adaptation(lora_rank=rank, lora_ranks=ranks)
    with pytest.raises(ValueError, match="recompute: expected 'nothing'"):
        world.adaptation(recompute="everything")
    with pytest.raises(ValueError, match="export_dtype: expected float32, float16 or bfloat16, got 'int8'"):
        AdaptationTask(str(world.backbone), export_dtype="int8")
