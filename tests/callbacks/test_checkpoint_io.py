"""Checkpoint files survive kills; reading them runs no code."""

from __future__ import annotations

import io
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
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
    weights = {str(i): torch.full((256, 1024), float(number)) for i in range(4)}
    return {"number": number, "state_dict": weights, "pytorch-lightning_version": "2.6.0"}


def save_for_ever(run: Run) -> None:
    number = 0
    while True:
        number += 1
        AtomicCheckpointIO().save_checkpoint(checkpoint(number), run.last)


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    run, interrupted = Run(tmp_path), 0
    for kill in range(5 * KILLS):
        if kill >= KILLS and interrupted:
            break
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
        assert all(torch.equal(w, torch.full_like(w, loaded["number"])) for w in loaded["state_dict"].values())
    assert interrupted, "no kill fell into a write: the test shows nothing"
    AtomicCheckpointIO().save_checkpoint(checkpoint(0), run.last.with_name("another.ckpt"))
    assert sorted(p.name for p in run.last.parent.iterdir()) == ["another.ckpt", "last.ckpt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), path)
    with pytest.raises(CheckpointError, match=r"not be written: .*; the earlier one is unchanged$"):
        AtomicCheckpointIO().save_checkpoint({"number": 2, "unpicklable": lambda: None}, path)
    assert AtomicCheckpointIO().load_checkpoint(path)["number"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_with_what_is_free_and_needed(full_disk: Path) -> None:
    path = full_disk / "last.ckpt"
    small = checkpoint(1) | {"state_dict": {}}
    AtomicCheckpointIO().save_checkpoint(small, path)
    with pytest.raises(CheckpointError) as error:
        AtomicCheckpointIO().save_checkpoint(checkpoint(2), path)
    assert re.fullmatch(
        rf"checkpoint {path} cannot be written: No space left on device \(2\.\d MB are free, it needs 4\.2 MB\); "
        "the earlier one is unchanged",
        str(error.value),
    )
    assert AtomicCheckpointIO().load_checkpoint(path) == small
    assert list(full_disk.iterdir()) == [path]


def test_a_limit_of_the_system_is_told(tmp_path: Path) -> None:
    """torch hides the system's error behind its own; the reason must be the system's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"last\.ckpt cannot be written: File too large$"):
            AtomicCheckpointIO().save_checkpoint(checkpoint(2), tmp_path / "last.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        (Payload(os.system, "touch /tmp/never-written"), "posix.system"),
        (Payload(eval, "1"), "eval"),
        (Payload(random.Random), "random.Random"),
    ],
)
def test_what_could_run_code_is_named_and_not_how_to_run_it(tmp_path: Path, payload: Payload, name: str) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(checkpoint(1) | {"x": payload}, path)
    with pytest.raises(CheckpointError) as error:
        AtomicCheckpointIO().load_checkpoint(path)
    assert str(error.value) == (
        f"checkpoint {path} is refused: it holds more than weights and plain values: GLOBAL {name}, which could "
        "run code"
    )


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _flipped(content: bytes) -> bytes:
    """One bit of the weights is another."""
    position = content.index(torch.full((64,), 1.0).numpy().tobytes()) + 7
    return content[:position] + bytes([content[position] ^ 0x40]) + content[position + 1 :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read: it ends early"),
        (_saved(checkpoint(1))[:3_000_000], "cannot be read: it ends early"),
        (b"PK\x03\x04 half a zip file", "cannot be read: it ends early"),
        (_flipped(_saved(checkpoint(1))), "is damaged: the checksum of its part archive/data/0 is wrong"),
        (b"hello world\n" * 9, "cannot be read: it is no checkpoint, but a file of another kind"),
        (b"GIF89a" + bytes(range(256)), "cannot be read: it is no checkpoint, but a file of another kind"),
        (b'{"state_dict": 1}', "cannot be read: it is no checkpoint, but a file of another kind"),
        (pickle.dumps({"state_dict": 1}), "cannot be read: it is no checkpoint, but a file of another kind"),
        (_saved(torch.zeros(2)), "is another program's: it holds a Tensor; expected one that `luve fit` wrote"),
        (_saved({"state_dict": {}, "epoch": 3}), "is another program's: it holds state_dict, epoch; expected"),
        (_saved({}), "is another program's: it holds nothing; expected"),
        (_saved({str(i): i for i in range(9)}), "is another program's: it holds 0, 1, 2, 3, 4, ...; expected"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_cannot_be_read_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        AtomicCheckpointIO().load_checkpoint(path)
    assert f"checkpoint {path} {message}" in str(error.value)
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
