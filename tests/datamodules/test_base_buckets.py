"""Training and validation over five buckets, and runs that stop in the middle of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luve_lightning.__main__ import main
from luve_lightning.data.video_index import Limits
from tests.helpers.bucket_runs import SeenShapes, adaptation, captions, pairs, train_adaptation, train_vluer, upsampler
from tests.helpers.bucket_world import LENGTHS, SIZES, write_shapes
from tests.helpers.processes import run_processes
from tests.helpers.resumable import Run, SendSignal, difference, load_final
from tests.helpers.tiny_flow import make_trainer

# Latent frames, height and width of the five buckets, and their training clips; see bucket_world.TRAIN.
GRIDS = {(3, 6, 6): 5, (3, 4, 8): 3, (2, 8, 4): 2, (1, 6, 6): 3, (1, 4, 8): 1}
STEPS = 3 + 2 + 1 + 2 + 1  # batches of two
NUMBERS = {(3, 6, 6): 0, (3, 4, 8): 1, (2, 8, 4): 5, (1, 6, 6): 6, (1, 4, 8): 7}  # of nine buckets, four of them empty


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    """The clips of `write_shapes` with their latents in `store/` and texts in `texts/`, made by the verbs."""
    folder = tmp_path_factory.mktemp("shapes")
    index = write_shapes(folder)
    common = ["--backbone", str(tiny_backbone), "--index", str(index)]
    sizes = ["--size", str(SIZES), "--frames", str(LENGTHS), "--scales", "[2]"]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    assert main(["precompute", *common, "--store", str(folder / "store"), *sizes, *quiet]) == 0
    texts = ["--store", str(folder / "texts"), "--length", "16", "--dtype", "float32", "--device", "cpu"]
    assert main(["embed", *common, *texts]) == 0
    return folder


def test_every_clip_trains_once_an_epoch_in_batches_of_its_bucket(
    world: Path, tiny_backbone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = captions(world, tiny_backbone)
    with caplog.at_level("INFO"):
        data.setup("fit")
        found = list(data.train_dataloader())
    assert len(found) == STEPS
    shapes = [tuple(batch["latents"].shape) for batch in found]
    assert shapes[0] == (2, 16, 3, 6, 6)
    assert Counter(shape[2:] for shape in shapes for _ in range(shape[0])) == GRIDS
    for shape, batch in zip(shapes, found, strict=True):
        assert set(batch["bucket"].tolist()) == {NUMBERS[shape[2:]]}
    clips = [clip for batch in found for clip in batch["clip_id"]]
    assert sorted(clips) == sorted(f"{entry.clip_id}@0" for entry, _ in data.datasets["train"].items)
    [table] = [message for message in caplog.messages if "buckets," in message]
    assert table.splitlines()[:2] == [
        "5 buckets, 9 steps an epoch on 1 process(es):",
        "  0  48x48x9: 5 samples of 5, 3 batches of 2, the last of 1",
    ]


def test_smaller_buckets_take_larger_batches(world: Path, tiny_backbone: Path) -> None:
    data = captions(world, tiny_backbone, fill_batches=True)
    data.setup("fit")
    shapes = {tuple(batch["latents"].shape) for batch in data.train_dataloader()}
    assert {shape for shape in shapes if shape[2:] == (1, 6, 6)} == {(3, 16, 1, 6, 6)}
    assert {shape for shape in shapes if shape[2:] == (2, 8, 4)} == {(2, 16, 2, 8, 4)}


def test_stills_come_as_often_as_asked(world: Path, tiny_backbone: Path) -> None:
    data = captions(world, tiny_backbone, stills_share=0.5)
    data.setup("fit")
    found = Counter(
        batch["latents"].shape[2] == 1 for batch in data.train_dataloader() for _ in range(len(batch["clip_id"]))
    )
    assert found == {False: 10, True: 10}
    with pytest.raises(ValueError, match=r"^stills_share: expected several lengths in frames, one of them 1, got 9"):
        captions(world, tiny_backbone, frames=9, stills_share=0.5)
    with pytest.raises(ValueError, match=r"^stills_share: expected a share in \[0, 1\], or null, got 2"):
        captions(world, tiny_backbone, stills_share=2)


def test_pairs_of_a_batch_have_one_bucket_and_one_scale(world: Path, tiny_backbone: Path) -> None:
    data = pairs(world, tiny_backbone, crop=(3, 8, 8))
    data.setup("fit")
    shapes = [(tuple(batch["hr"].shape[2:]), tuple(batch["lr"].shape[2:])) for batch in data.train_dataloader()]
    assert {high for high, _ in shapes} == GRIDS.keys()
    assert all(low == (high[0], high[1] // 2, high[2] // 2) for high, low in shapes)
    assert {high for _, high in data.grids("train")} == GRIDS.keys()
    assert [high for _, high in data.grids("val")] == [(3, 6, 6), (3, 4, 8), (1, 6, 6)]
    whole = [tuple(batch["hr"].shape[2:]) for batch in data.val_dataloader()]
    assert whole == [(3, 4, 8), (3, 6, 6), (1, 6, 6)]  # the index's order


def test_a_batch_of_held_out_clips_has_one_size(world: Path, tiny_backbone: Path) -> None:
    data = captions(world, tiny_backbone)
    data.setup("fit")
    assert [tuple(batch["latents"].shape) for batch in data.val_dataloader()] == [
        (1, 16, 3, 4, 8), (1, 16, 3, 6, 6), (1, 16, 1, 6, 6),
    ]  # fmt: skip


def test_one_bucket_in_lists_is_a_single_size(world: Path, tiny_backbone: Path) -> None:
    def epoch(**choice: Any) -> list[list[str]]:
        data = captions(world, tiny_backbone, keep=Limits(min_frames=11), **choice)
        data.open_splits("train")
        return [list(batch["clip_id"]) for batch in data.train_dataloader()]

    assert epoch(size=(48, 48), frames=9) == epoch(size=[[48, 48]], frames=[9])


@pytest.mark.parametrize("kind", [captions, pairs])
def test_held_out_clips_of_all_buckets_are_measured(
    world: Path, tiny_backbone: Path, tmp_path: Path, kind: Callable[..., Any]
) -> None:
    task = adaptation(tiny_backbone) if kind is captions else upsampler(tiny_backbone)
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    [logged] = trainer.validate(task, kind(world, tiny_backbone), verbose=False)
    assert all(math.isfinite(value) for value in logged.values())
    assert "val/loss" in logged or "val/psnr_rgb" in logged


@pytest.mark.slow
@pytest.mark.parametrize("function", [train_adaptation, train_vluer])
def test_a_run_resumed_in_the_middle_of_an_epoch_is_the_run_never_stopped(
    world: Path, tiny_backbone: Path, tmp_path: Path, function: Callable[[Run], Any]
) -> None:
    task = {"world": world, "backbone": tiny_backbone}
    seen = SeenShapes()
    whole = Run(tmp_path / "whole", steps=14, task=task)
    function(whole.with_(callbacks=(seen,)))
    assert len({shape[2:] for shape in seen.shapes}) >= 2
    assert len(set(seen.buckets)) == 5
    for at in (4, STEPS, 11):
        run = whole.with_(folder=tmp_path / f"stopped-{at}")
        with pytest.raises(SystemExit):
            function(run.with_(callbacks=(SendSignal("SIGTERM", at),)))
        function(run.with_(resume="last"))
        assert difference(load_final(run), load_final(whole)) is None, at


@pytest.mark.slow
def test_two_processes_take_the_same_bucket_and_resume(world: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    task = {"world": world, "backbone": tiny_backbone}
    whole = Run(tmp_path / "whole", steps=12, task=task, processes=2, every_n_steps=2)
    assert run_processes(whole, train_adaptation) == [0, 0]
    run = whole.with_(folder=tmp_path / "stopped")
    assert run_processes(run.with_(callbacks=(SendSignal("SIGKILL", 5),)), train_adaptation) == [-9, -9]
    assert run_processes(run.with_(resume="last"), train_adaptation) == [0, 0]
    assert difference(load_final(run), load_final(whole)) is None
    for rank in range(2):
        trained = whole.trained(rank)
        assert run.trained(rank)[-7:] == trained[-7:]
    # Both ranks train on clips of one bucket in each step, whose name ends in their frames and size.
    shapes = [
        {clip.split("@")[0].split("-", 1)[1] for rank in range(2) for clip in whole.trained(rank)[step][3]}
        for step in range(12)
    ]
    assert all(len(each) == 1 for each in shapes)
    assert len(set(map(tuple, shapes))) == 5
