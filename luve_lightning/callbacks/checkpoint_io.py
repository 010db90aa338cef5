"""Checkpoint files that a kill during the write cannot corrupt."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

_PREFIX, _SUFFIX = ".unfinished-", ".tmp"


class CheckpointError(ValueError):
    """A checkpoint file that cannot be read."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk and renames, so that the target is the old file or the new one.

    Lightning's own writer goes through $TMPDIR and a move, which is a copy when that is another filesystem: a kill
    leaves half a checkpoint under the final name. Loading is restricted to tensors and plain types (`weights_only`)
    unless the caller says otherwise.

    A Trainer plugin: `trainer.plugins: {class_path: luve_lightning.callbacks.AtomicCheckpointIO}`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; removes what killed runs left unfinished in the folder.

        Args:
            checkpoint: what to save.
            path: a local file; its folder is made.
            storage_options: must be None.

        Raises:
            TypeError: with `storage_options`.
            OSError: when the disk is full or the folder is not writable; the target is unchanged.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options")
        if "://" in str(path):
            raise ValueError(f"{type(self).__name__} writes local files only, got {path}")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f"{_PREFIX}*{_SUFFIX}"):
            leftover.unlink(missing_ok=True)
        unfinished = target.with_name(f"{_PREFIX}{target.name}{_SUFFIX}")
        try:
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(target)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU.

        Args:
            path: the file.
            map_location: where tensors go; the CPU when None.
            weights_only: only an explicit False allows arbitrary Python objects, which can run code.

        Raises:
            FileNotFoundError: when there is no such file.
            CheckpointError: when it is no checkpoint, or holds more than tensors and plain types.
        """
        try:
            return super().load_checkpoint(path, map_location or _keep, weights_only is not False)
        except pickle.UnpicklingError as error:
            # torch's own text is a page of advice about trusting the file; its last paragraph names what was found.
            reason = str(error).split("WeightsUnpickler error: ")[-1].strip().splitlines()[0]
            raise CheckpointError(
                f"checkpoint {path} holds more than weights and plain values: {reason}"
            ) from error
        except (RuntimeError, EOFError) as error:
            reason = (str(error).splitlines() or ["it ends early"])[0]
            raise CheckpointError(f"checkpoint {path} cannot be read: {reason}") from error


def _keep(storage: Any, location: str) -> Any:
    """The `map_location` that leaves storages where `torch.load` puts them: on the CPU."""
    del location
    return storage


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
