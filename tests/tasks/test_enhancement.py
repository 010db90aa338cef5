"""The cascades that only enhance: their paths beside plain formulas, what trains, resuming, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from luve_lightning.callbacks import Export
from luve_lightning.functional.interpolation import interpolate_latents
from luve_lightning.models.attention.windows import Windows
from luve_lightning.models.backbones import denoiser_of, load_backbone
from luve_lightning.models.vluer import VLUer
from luve_lightning.tasks import AdaptationTask, EnhancementTask, FlashVideoTask, LaVieTask, WaverTask
from tests.helpers.resumable import Run, difference, load_final, train
from tests.helpers.tiny_flow import World, make_trainer

KINDS: tuple[type[EnhancementTask], ...] = (FlashVideoTask, LaVieTask, WaverTask)
every_kind = pytest.mark.parametrize("kind", KINDS)


def made(world: World, kind: type[EnhancementTask], **options: Any) -> EnhancementTask:
    torch.manual_seed(0)
    return kind(str(world.backbone), export_dtype="float32", **options)


def paired(world: World, **options: Any) -> Any:
    return world.data(low_scale=2, **options)


def batch_of(world: World, size: int = 3) -> dict[str, Any]:
    data = paired(world, batch_size=size)
    data.setup("fit")
    batch: dict[str, Any] = next(iter(data.train_dataloader()))
    return batch


def plain_end(kind: type[EnhancementTask], low: Tensor, noise: Tensor, s: float) -> Tensor:
    """One sample's end of the path, or the condition of LaVie's, written out."""
    if kind is WaverTask:
        return (1 - s) * low + s * noise
    return (1 - s**2) ** 0.5 * low + s * noise


@every_kind
def test_the_path_ends_where_the_paper_says_and_its_velocity_is_the_target(
    world: World, kind: type[EnhancementTask]
) -> None:
    task, batch = made(world, kind), batch_of(world)
    clean, text = batch["latents"].float(), batch["text"]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    end, given = task.path_of(batch, noise, torch.Generator().manual_seed(2))
    draw = torch.Generator().manual_seed(2)
    least, most = task.strength
    strengths = (least + (most - least) * torch.rand(3, generator=draw)).tolist()
    low = [interpolate_latents(one[None].float(), (3, 6, 6)) for one in batch["low"]]
    other = torch.randn(clean.shape, generator=draw) if kind is LaVieTask else noise
    want = torch.cat(
        [plain_end(kind, one, other[i, None], s) for i, (one, s) in enumerate(zip(low, strengths, strict=True))]
    )
    torch.testing.assert_close(given["condition"] if kind is LaVieTask else end, want)
    assert given.keys() == ({"condition"} if kind is LaVieTask else set())
    assert kind is not LaVieTask or torch.equal(end, noise)
    # Both ends of the path, and a point between.
    sigma = torch.tensor([0.0, 1.0, 0.25])
    points = torch.stack([clean[0], end[1], 0.75 * clean[2] + 0.25 * end[2]])
    with torch.no_grad():
        predicted = task(points, sigma, text, **given)
        got = task.losses_of(clean, text, sigma, end, **given)
    torch.testing.assert_close(got, (predicted - (end - clean)).square().mean((1, 2, 3, 4)))


@every_kind
def test_validation_depends_on_the_clip_alone(world: World, kind: type[EnhancementTask]) -> None:
    task, batch = made(world, kind), batch_of(world, 2)
    together = task.fixed_losses(dict(batch))
    alone: dict[tuple[str, int], float] = {}
    for i, clip in enumerate(batch["clip_id"]):
        alone |= task.fixed_losses({"clip_id": [clip]} | {k: batch[k][i, None] for k in ("latents", "low", "text")})
    assert together == pytest.approx(alone, rel=1e-5)
    assert task.fixed_losses(dict(batch)) == together


def test_the_vluer_upsamples_where_there_is_one(world: World, tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = VLUer(channels=8, pairs=1, hidden=8, query_channels=4, decoder_layers=1, latent_channels=16)
    net.save_pretrained(tmp_path / "vluer")
    task, batch = made(world, FlashVideoTask, vluer=str(tmp_path / "vluer"), strength=(0.0, 0.0)), batch_of(world)
    end, _ = task.path_of(batch, torch.zeros_like(batch["latents"]).float(), None)
    with torch.no_grad():
        torch.testing.assert_close(end, net(batch["low"].float(), (3, 6, 6)))
    assert not any(name.startswith("vluer") for name in task._trainable_keys()), "frozen, so not in checkpoints"
    VLUer(channels=8, pairs=1, hidden=8, latent_channels=4).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other has 4 latent channels, the transformer takes 16"):
        made(world, FlashVideoTask, vluer=str(tmp_path / "other"))


@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "lora"])
def test_lavie_starts_as_its_base_to_the_bit(world: World, rank: int) -> None:
    base = AdaptationTask(str(world.backbone), lora_rank=rank)
    task, batch = made(world, LaVieTask, lora_rank=rank), batch_of(world)
    noise = torch.randn(batch["latents"].shape)
    end, given = task.path_of(batch, noise, torch.Generator())
    sigma, text = torch.tensor([0.1, 0.5, 0.9]), batch["text"]
    with torch.no_grad():
        ours = task.losses_of(batch["latents"].float(), text, sigma, end, **given)
        assert torch.equal(ours, base.losses_of(batch["latents"].float(), text, sigma, noise))


@every_kind
def test_a_lora_and_the_embedding_train_and_the_export_is_what_was_trained(
    world: World, tmp_path: Path, kind: type[EnhancementTask]
) -> None:
    windows = {"attention": Windows(((1, 1, 2),))} if kind is WaverTask else {}
    task = made(world, kind, lora_rank=2, lr=3e-2, recompute="blocks", **windows)
    trained = {name for name, p in task.transformer.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"patch_embedding.weight", "patch_embedding.bias"}
    before = task.transformer.patch_embedding.weight.detach().clone()
    make_trainer(tmp_path, max_steps=3, callbacks=[Export(tmp_path)]).fit(task, paired(world))
    moved = (task.transformer.patch_embedding.weight - before).abs().flatten(2).amax((0, 2))
    assert (moved > 1e-3).all(), "every input channel is learnt from"
    assert not (tmp_path / "transformer" / "lora").exists(), "it would lack the embedding"
    exported = load_backbone(tmp_path).denoiser()
    assert exported.conditioned == (kind is LaVieTask)
    assert exported.channels == 16
    assert exported.attention == windows.get("attention")
    assert exported.module.config.in_channels == (32 if kind is LaVieTask else 16)
    batch = batch_of(world)
    end, given = task.path_of(batch, torch.randn(batch["latents"].shape), None)
    levels = torch.full((3,), 700.0)
    with torch.no_grad():
        torch.testing.assert_close(
            exported.velocity(end, levels, batch["text"], **given),
            denoiser_of(task.transformer).velocity(end, levels, batch["text"], **given),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
    again = made(replace(world, backbone=tmp_path), kind)
    assert again.denoiser.conditioned == exported.conditioned, "a second training goes on with the same channels"


class KeepSecond(L.Callback):
    """Keeps the checkpoint of step 2."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.file)


@every_kind
def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    world: World, tmp_path: Path, kind: type[EnhancementTask]
) -> None:
    states = {}
    for name, resume in (("whole", None), ("resumed", str(tmp_path / "second.ckpt"))):
        run = Run(
            tmp_path / name, 4, resume=resume, callbacks=() if resume else (KeepSecond(tmp_path / "second.ckpt"),)
        )
        train(run, made(world, kind, lora_rank=2, lr=1e-2), paired(world, batch_size=1))
        states[name] = load_final(run)
    assert difference(states["whole"], states["resumed"]) is None


def test_what_cannot_be_is_refused_in_one_line(world: World, tmp_path: Path) -> None:
    for strength in ((0.5, 0.2), (-0.1, 1.0), (0.0, 1.5)):
        with pytest.raises(ValueError, match="strength: expected two numbers, 0 <= least <= most <= 1, got"):
            made(world, WaverTask, strength=strength)
    with pytest.raises(ValueError, match=r"data\.low_scale: expected the scale of the low-resolution latents"):
        make_trainer(tmp_path, max_steps=1).fit(made(world, WaverTask), world.data())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        made(world, WaverTask, vluer="nowhere")
