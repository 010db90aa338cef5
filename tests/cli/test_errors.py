"""What the user, the system or another package got wrong is one line; their bugs and ours stay bugs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import lightning as L
import numpy as np
import pytest
import torch
import wandb.errors
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from luve_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from luve_lightning.cli.errors import UsageError, describe_runtime_error, did_you_mean, one_line
from luve_lightning.cli.run_verb import quiet_wandb
from luve_lightning.config_files import CompositionError

FULL = Path("/dev/full")  # every write to it fails with ENOSPC
needs_full_device = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


def line_of(function: Callable[..., object], *arguments: object) -> str | None:
    """What is printed of an error that a function raises; None for a bug."""
    with pytest.raises(BaseException) as info:
        function(*arguments)
    return describe_runtime_error(info.value, {})


def write(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"0" * 2**20)


def raises(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


# The system


@needs_full_device
def test_a_full_disk_is_named_with_what_is_free() -> None:
    line = line_of(write, FULL)
    free = shutil.disk_usage("/dev").free / 2**20
    assert line == f"/dev/full: disk full: No space left on device ({free:.1f} MiB free in /dev)"


@needs_full_device
@pytest.mark.parametrize("values", [10, 2_000_000])
def test_a_checkpoint_on_a_full_disk_names_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: int
) -> None:
    """torch.save hides what the system said behind an error of its own."""
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode: opened(FULL, mode))
    target = tmp_path / "last.ckpt"
    line = line_of(AtomicCheckpointIO().save_checkpoint, {"w": torch.zeros(values)}, target)
    assert line is not None
    assert "last.ckpt: disk full: No space left on device (" in line
    assert f"free in {tmp_path})" in line


def test_a_full_disk_in_a_library_written_in_rust(tmp_path: Path) -> None:
    def save(path: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    line = line_of(save, tmp_path / "model.safetensors")
    assert line is not None
    assert "model.safetensors: disk full: No space left on device (" in line


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EROFS, "only be read"),
        (errno.EDQUOT, "quota"),
        (errno.ENOTCONN, "not connected"),
        (errno.EACCES, "Permission denied"),
        (errno.EIO, "Input/output error"),
        (errno.EINVAL, "Invalid argument"),
    ],
)
def test_any_error_of_the_system_with_a_file_is_the_users(number: int, expected: str) -> None:
    line = line_of(raises(OSError(number, os.strerror(number), "/mnt/store/a.bin")))
    assert line is not None
    assert line.startswith("/mnt/store/a.bin: ")
    assert expected in line


def test_too_long_a_name_is_cut_in_the_message(tmp_path: Path) -> None:
    line = line_of(write, tmp_path / ("語" * 200))
    assert line is not None
    assert "255 bytes" in line
    assert len(line) < 500


def test_too_many_open_files_needs_no_file_name() -> None:
    line = line_of(raises(OSError(errno.EMFILE, os.strerror(errno.EMFILE))))
    assert line is not None
    assert "ulimit -n" in line


@pytest.mark.parametrize("function", [lambda: os.close(10**6), lambda: os.kill(2**22 + 1, signal.SIGTERM)])
def test_misuse_of_the_system_is_a_bug(function: Callable[[], None]) -> None:
    assert line_of(function) is None


def test_a_bug_while_a_missing_file_is_handled_is_a_bug(tmp_path: Path) -> None:
    def function() -> None:
        try:
            (tmp_path / "missing").read_text()
        except FileNotFoundError:
            raise KeyError("a bug")  # noqa: B904

    assert line_of(function) is None


# Memory


def test_memory_says_which_options_lessen_it() -> None:
    for function in (lambda: np.empty(2**60, np.uint8), lambda: torch.empty(2**60, dtype=torch.uint8)):
        line = line_of(function)
        assert line is not None
        assert "smaller batch" in line
    line = line_of(raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")))
    assert line is not None
    assert "20.00 GiB" in line
    assert "batch_size" in line


class Dying(Dataset[int]):
    """Kills the worker that reads it."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


class OutOfFiles(Dying):
    """Fails in the worker with an error of the system."""

    def __getitem__(self, index: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files", "/data/clip.mp4")


class Buggy(Dying):
    """Fails in the worker with a bug."""

    def __getitem__(self, index: int) -> int:
        raise KeyError("a bug")


def first_batch(dataset: Dataset[int]) -> Any:
    batches: Any = iter(DataLoader(dataset, num_workers=1))
    try:
        return next(batches)
    finally:
        # Left to garbage collection, the end of each worker is waited for in another test: in vain, for 5 seconds.
        batches._shutdown_workers()


def test_a_killed_worker_points_to_memory() -> None:
    line = line_of(first_batch, Dying())
    assert line is not None
    assert line.startswith("a loader's worker ")  # "exited unexpectedly", or "is killed by signal: Killed"
    assert "/dev/shm" in line
    assert "num_workers" in line


def test_an_error_of_the_system_in_a_worker_is_the_users_and_a_bug_is_not() -> None:
    line = line_of(first_batch, OutOfFiles())
    assert line is not None
    assert "/data/clip.mp4" in line
    assert line_of(first_batch, Buggy()) is None


# Other packages


def test_a_setting_that_wandb_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "bogus")
    config = {"loggers": {"wandb": {"class_path": "lightning.pytorch.loggers.WandbLogger"}}}
    made_by_us = line_of(quiet_wandb(config).__enter__)
    for line in (made_by_us, line_of(wandb.Settings().update_from_env_vars, os.environ)):
        assert line is not None
        assert line.startswith("wandb: mode: ")
        assert line.endswith("got 'bogus'")


def test_wandb_without_an_account_says_how_to_go_on() -> None:
    line = line_of(raises(wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")))
    assert line is not None
    assert "wandb login" in line
    assert "offline true" in line
    assert line_of(raises(wandb.errors.CommError("timed out"))) is not None


def test_the_hub_without_network_says_that_a_folder_works(monkeypatch: pytest.MonkeyPatch) -> None:
    line = line_of(lambda: huggingface_hub.hf_hub_download("no/such", "config.json", local_files_only=True))
    assert line is not None
    assert "a local folder works without the hub" in line


def test_lightnings_word_on_slurm_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    line = line_of(lambda: L.Trainer(accelerator="cpu", devices=1, logger=False))
    assert line is not None
    assert "SLURM" in line


@pytest.mark.parametrize("options", [{"precision": "banana"}, {"max_time": "soon"}, {"strategy": "ddd"}])
def test_what_the_trainer_refuses_is_the_users(options: dict[str, str]) -> None:
    line = line_of(lambda: L.Trainer(accelerator="cpu", logger=False, **options))
    assert line is not None
    assert next(iter(options.values())) in line


# Files


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "read"),
    [
        (b"{", read_json),
        (b'{"a": "\xff"}', read_json),
        (b"[" * 200_000, read_json),
        (b"a: [", lambda path: yaml.safe_load(path.read_text())),
        (b"[" * 1_000, lambda path: yaml.safe_load(path.read_text())),
        (b"not a zip", lambda path: zipfile.ZipFile(path)),
        (b"\xff" * 64, lambda path: load_file(path)),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(
    tmp_path: Path, content: bytes, read: Callable[[Path], Any]
) -> None:
    path = tmp_path / "users.file"
    path.write_bytes(content)
    line = line_of(read, path)
    assert line is not None
    assert line.startswith(f"{path}: cannot be read: ")
    assert len(line) < 500


def test_the_same_errors_without_a_file_are_bugs() -> None:
    def endless() -> None:
        endless()

    assert line_of(json.loads, "{") is None
    assert line_of(b"\xff".decode) is None
    assert line_of(endless) is None


# Our own errors


def caught(function: object, *arguments: object) -> BaseException:
    with pytest.raises(BaseException) as info:
        function(*arguments)  # type: ignore[operator]
    return info.value


def test_errors_of_ours_are_one_line() -> None:
    assert describe_runtime_error(UsageError("a\n  b"), {}) == "a b"
    assert describe_runtime_error(CompositionError("c"), {}) == "c"
    assert "nosuch" in str(describe_runtime_error(caught(open, "nosuch"), {}))


def test_a_value_error_counts_only_when_our_code_raises_it() -> None:
    from luve_lightning.cli.compose import read_arguments

    assert describe_runtime_error(caught(read_arguments, ["stray"]), {})
    assert describe_runtime_error(caught(json.loads, "{"), {}) is None  # a ValueError of the standard library
    assert describe_runtime_error(caught({}.__getitem__, "x"), {}) is None


def test_a_loader_workers_error_is_read_from_its_text() -> None:
    text = (
        "Caught ClipError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\nluve_lightning.datasets.clip_types.ClipError: a.mp4: truncated\n'
    )
    assert describe_runtime_error(RuntimeError(text), {}) == "a.mp4: truncated"
    assert describe_runtime_error(RuntimeError(text.replace("luve_lightning.data", "torch")), {}) is None


def test_a_components_own_method_is_named() -> None:
    from tests.helpers.tiny import TinyData

    config = {"data": {"class_path": "tests.helpers.tiny.TinyData", "init_args": {"share": 2.0}}}
    error = caught(TinyData(share=2.0).setup, "fit")
    assert describe_runtime_error(error, config) == "data.init_args.share: share must be in [0, 1], got 2.0"


def test_suggestions() -> None:
    assert did_you_mean("fitt", ["fit", "test"]) == "; did you mean 'fit'?"
    assert did_you_mean("zzz", ["b", "a"]) == "; known: a, b"
    assert did_you_mean("zzz", [f"key{n}" for n in range(100)]) == ""


def test_a_name_of_many_characters_is_cut_in_the_message() -> None:
    message = one_line(f"file: 1 unknown, such as {'x' * 100_000}; {'y' * 1000}")
    assert message == f"file: 1 unknown, such as {'x' * 200}... (100,001 characters) {'y' * 1000}"


def test_one_line() -> None:
    assert one_line("a\n   b\tc ") == "a b c"
