"""Checkpoint files survive kills; reading them runs no code."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from luve_lightning.callbacks import AtomicCheckpointIO, CheckpointError
from tests.helpers.processes import start
from tests.helpers.resumable import Run
from tests.helpers.waiting import wait_for

KILLS = 12


def checkpoint(number: int) -> dict[str, Any]:
    """About 4 MB that name themselves throughout."""
    return {"number": number, "weights": {str(i): torch.full((256, 1024), float(number)) for i in range(4)}}


def save_for_ever(run: Run) -> None:
    number = 0
    while True:
        number += 1
        AtomicCheckpointIO().save_checkpoint(checkpoint(number), run.last)


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    run, interrupted = Run(tmp_path), 0
    for kill in range(KILLS):
        before = run.last.stat().st_mtime_ns if run.last.exists() else 0
        [process] = start(run, save_for_ever)
        written = wait_for(
            lambda before=before: run.last.exists() and run.last.stat().st_mtime_ns != before, every=0.002
        )
        assert written, (tmp_path / "output-0.txt").read_text()
        time.sleep(random.Random(kill).uniform(0, 0.1))
        process.kill()
        process.join()
        interrupted += len(list(run.last.parent.glob(".unfinished-*")))
        loaded = AtomicCheckpointIO().load_checkpoint(run.last)
        assert all(torch.equal(w, torch.full_like(w, loaded["number"])) for w in loaded["weights"].values())
    assert interrupted, "no kill fell into a write: the test shows nothing"
    AtomicCheckpointIO().save_checkpoint(checkpoint(0), run.last.with_name("another.ckpt"))
    assert sorted(p.name for p in run.last.parent.iterdir()) == ["another.ckpt", "last.ckpt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"number": 1}, path)
    with pytest.raises(AttributeError, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"number": 2, "unpicklable": lambda: None}, path)
    assert AtomicCheckpointIO().load_checkpoint(path) == {"number": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/never-written"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04 half a zip file", "cannot be read"),
        (Payload(), "holds more than weights and plain values: Unsupported global"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "a.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"x": content}, path)
    with pytest.raises(CheckpointError, match=message) as error:
        AtomicCheckpointIO().load_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"missing\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "missing.ckpt")


def test_only_local_files_are_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"local files only, got s3://bucket/a\.ckpt"):
        AtomicCheckpointIO().save_checkpoint({}, "s3://bucket/a.ckpt")


def test_a_trainer_uses_it(tmp_path: Path) -> None:
    plugin = AtomicCheckpointIO()
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_steps=1, logger=False, plugins=[plugin], accelerator="cpu",
        enable_progress_bar=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(BoringModel())
    assert trainer.strategy.checkpoint_io is plugin
    [saved] = (tmp_path / "checkpoints").iterdir()
    assert plugin.load_checkpoint(saved)["global_step"] == 1
