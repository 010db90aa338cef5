"""What a training's configuration says of memory, devices and steps, against what is counted by hand."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from luve_lightning.analysis.cost import REFERENCE
from luve_lightning.analysis.dry_run import BLOCK, dry_run, weight_bytes
from luve_lightning.analysis.fit_plan import plan_training, processes_of, sharing_of
from luve_lightning.analysis.recipe_plan import RecipePlan, planned_vluer
from luve_lightning.analysis.training_plan import Held, Sharing, sharded_gradients
from luve_lightning.cli.compose import compose


def rounded(*sizes: int) -> int:
    return sum(-(-4 * size // BLOCK) * BLOCK for size in sizes)


def test_what_each_gpu_holds_is_counted_by_hand() -> None:
    net = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10)).to("meta")
    net[0].requires_grad_(False)
    every, trained = rounded(600, 20, 200, 10), 4 * 210
    one = Held.of([net], Sharing())
    assert (one.weights, one.gradients, one.optimizer, one.shared) == (every, trained, 2 * trained, 0)
    ddp = Held.of([net], Sharing("ddp", 4))
    assert (ddp.weights, ddp.optimizer, ddp.shared) == (every, 2 * trained, trained), "the buckets hold gradients, too"
    sharded = Held.of([net], Sharing("fsdp2", 4), [net[1]])
    assert (sharded.weights, sharded.gradients, sharded.optimizer) == (every // 4, trained // 4, trained // 2)
    assert sharded.shared == 4 * rounded(200, 10) + rounded(600, 20)
    assert one.peak(10**6) == every + 2 * trained + 10**6 + 32 * 2**20


def test_a_sharded_gradient_leaves_its_part_behind() -> None:
    weight = nn.Parameter(torch.empty(10, 7, device="meta"))
    with sharded_gradients([weight], 4):
        (weight * 2).sum().backward()
        assert weight.grad is None
    (weight * 2).sum().backward()
    assert weight.grad is not None, "the hook has gone"


@pytest.mark.parametrize(
    ("trainer", "strategy", "devices"),
    [
        ({}, "one device", 1),
        ({"devices": 1, "strategy": "ddp"}, "one device", 1),
        ({"devices": 2}, "ddp", 2),
        ({"devices": "8", "num_nodes": 2, "strategy": "ddp_find_unused_parameters_true"}, "ddp", 16),
        ({"devices": [0, 3], "strategy": {"class_path": "a.b.ModelParallelStrategy"}}, "fsdp2", 2),
        ({"devices": "0,1,2"}, "ddp", 3),
    ],
)
def test_devices_and_strategy_are_the_trainers(trainer: dict[str, Any], strategy: str, devices: int) -> None:
    assert sharing_of(trainer) == Sharing(strategy, devices)  # type: ignore[arg-type]
    assert processes_of(trainer) == devices


def adaptation(repository: Path, **trainer: Any) -> RecipePlan:
    mini = str(repository / "data/mini/wan")
    model = {"class_path": "luve_lightning.tasks.AdaptationTask", "init_args": {"backbone": mini}}
    data = {
        "class_path": "luve_lightning.datamodules.CaptionLatentsDataModule",
        "init_args": {"index": "none.csv", "store": "none", "backbone": mini, "size": [96, 96], "frames": 9},
    }
    return plan_training(model, data, {"max_steps": 10} | trainer)


@pytest.mark.slow
def test_a_step_over_several_gpus(repository: Path) -> None:
    fsdp = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", "init_args": {}}
    one, ddp, sharded = (adaptation(repository, devices=n, strategy=s) for n, s in ((1, "auto"), (4, "ddp"), (4, fsdp)))
    assert [plan.strategy for plan in (one, ddp, sharded)] == ["one device", "ddp", "fsdp2"]
    rows = [plan.rows[0] for plan in (one, ddp, sharded)]
    weights = rows[0]["weights"]
    assert [row["weights"] for row in rows] == [weights, weights, weights // 4]
    assert rows[2]["optimizer"] == rows[0]["optimizer"] // 4
    assert rows[1]["peak"] - rows[0]["peak"] == rows[1]["shared"] == rows[0]["optimizer"] // 2
    # Gradients come block by block: at the end a quarter of them is there, and not all.
    assert rows[2]["passes"] < rows[0]["passes"]
    assert {plan.units for plan in (one, ddp, sharded)} == {10}


def test_hours_are_shared_by_what_is_divided_alone() -> None:
    steps = RecipePlan("training", "step", 3.6, 36.0, 1, 1000, processes=4)
    assert (steps.hours, steps.gpu_hours) == (pytest.approx(1.01), pytest.approx(4.04))
    clips = RecipePlan("precompute", "clip", 3.6, None, 1, 1000, processes=4, stored=5 * 10**8)
    assert (clips.hours, clips.gpu_hours, clips.terabytes) == (pytest.approx(0.25), pytest.approx(1), 0.5)
    unknown = RecipePlan("embed", "text", 3.6, 0.0, 1, None, stored=1)
    assert (unknown.hours, unknown.gpu_hours, unknown.terabytes) == (None, None, None)


def test_a_step_lasts_until_the_next_batch_is_there(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    config = compose([Path("experiments/vluer/mini.yaml")], ())

    def planned(loading: float | None) -> RecipePlan:
        return plan_training(config["model"], config["data"], config["trainer"], replace(REFERENCE, loading=loading))

    fast, slow = planned(None), planned(1e-9)
    batch = config["data"]["init_args"]["batch_size"]
    for before, row in zip(fast.rows, slow.rows, strict=True):
        scale = float(row["name"].split(", ")[1].removesuffix("x"))
        high = prod(row["latents"])
        assert row["loaded"] == round(2 * 16 * batch * (high + high / scale**2)), "two crops of 16 channels in float16"
        assert row["seconds"] == pytest.approx(row["loaded"] / 1e3)
        assert row["seconds"] > before["seconds"]
    assert not [note for note in fast.notes if "wait for data" in note]
    [note] = [note for note in slow.notes if "wait for data" in note]
    assert note.endswith("MB a batch, loaded at 0.001 MB/s")


def test_a_teacher_adds_its_forward_pass_and_its_weights(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    files = [Path("experiments/vluer") / f"{name}.yaml" for name in ("mini", "mini-distilled")]
    config = compose(files, ())
    options: Any = config["model"]["init_args"]
    alone = {key: options[key] for key in ("net", "backbone", "losses")}
    with_teacher, without = (
        plan_training(model, config["data"], config["trainer"])
        for model in (config["model"], {"class_path": "luve_lightning.tasks.VLUerTask", "init_args": alone})
    )
    teacher, _ = planned_vluer("data/mini/wan", Path("data/mini/vluer"))
    for row, student, low in zip(with_teacher.rows, without.rows, (16, 12, 8), strict=True):
        with dry_run() as run:
            teacher(torch.empty(4, 16, 3, low, low, device="meta"), (3, 24, 24))
        assert row["flops"] - student["flops"] == run.flops > 0
        assert row["weights"] - student["weights"] == weight_bytes(teacher)
        assert row["optimizer"] == student["optimizer"]
    assert not with_teacher.notes


@pytest.mark.slow
def test_rivals_train_about_as_many_weights_as_both_experts(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the optimiser's state; LaVie's new channels come on top."""
    monkeypatch.chdir(repository)

    def trained(*names: str) -> int:
        config = compose([repository / "experiments" / f"{name}.yaml" for name in names])
        data = config["data"]["init_args"] | {"batch_size": 1}
        plan = plan_training(config["model"], config["data"] | {"init_args": data}, config["trainer"])
        assert ("reading and upsampling the low-resolution latents are not counted" in plan.notes) == (
            "rivals" in names[0]
        )
        assert plan.peak > plan.rows[0]["weights"] > 4 * 3_000_000
        return int(plan.rows[0]["optimizer"]) // 8

    experts = trained("experts/mini-lfe") + trained("experts/mini-lfe", "experts/mini-hfe")
    assert experts == 73_728
    found = {name: trained(f"rivals/{name}") for name in ("flashvideo", "lavie", "waver")}
    assert found == {"flashvideo": 72_384, "lavie": 72_384 + 192 * 16 * 4, "waver": 72_384}
    assert found["flashvideo"] == pytest.approx(experts, rel=0.02)
