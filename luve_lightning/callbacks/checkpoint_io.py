"""Checkpoint files that a kill during the write cannot corrupt, and whose loading runs no code."""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import Tensor

from luve_lightning.files import replacing
from luve_lightning.model_folders import WeightsHeader
from luve_lightning.safetensors_window import DTYPES

_GLOBAL = re.compile(r"GLOBAL (\S+)")
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Lightning writes these into every checkpoint; no other program does.
_MARK = "pytorch-lightning_version"
_CUT, _FOREIGN = "it ends early", "it is no checkpoint, but a file of another kind"


class CheckpointError(ValueError):
    """Raised for a checkpoint file that cannot be read or written."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk and renames: the target is either the old file or the new one.

    Lightning's own writer goes through $TMPDIR and a move, which copies when that is another filesystem: a kill
    leaves half a checkpoint under the final name. Loading is restricted to tensors and plain types
    (`weights_only`) unless the caller says otherwise, and compares checksums: torch would accept flipped bits as
    weights.

    A Trainer plugin: `trainer.plugins: {class_path: luve_lightning.callbacks.AtomicCheckpointIO}`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, and remove what killed runs left unfinished in the folder.

        Args:
            checkpoint: what to save.
            path: local file; its folder is created.
            storage_options: must be None.

        Raises:
            TypeError: with `storage_options`.
            CheckpointError: when it cannot be written, for example on a full disk; the target is unchanged.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options")
        if "://" in str(path):
            raise ValueError(f"{type(self).__name__} writes local files only, got {path}")
        target = Path(path)
        try:
            with replacing(target) as unfinished, unfinished.open("wb") as file:
                torch.save(checkpoint, file)
        except Exception as error:
            raise _not_written(target, checkpoint, error) from error

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU.

        Args:
            path: the file.
            map_location: device of the tensors; default the CPU.
            weights_only: only an explicit False allows arbitrary Python objects, which can run code.

        Raises:
            FileNotFoundError: when the file does not exist.
            CheckpointError: when it is not a Lightning checkpoint, is damaged, or holds more than tensors and
                plain types.
        """
        try:
            damaged = _damaged(path)
            checkpoint = (
                None if damaged else super().load_checkpoint(path, map_location or _keep, weights_only is not False)
            )
        except OSError:  # a file that is missing or may not be read: the error names it
            raise
        except pickle.UnpicklingError as error:
            raise _not_allowed(path, error) from error
        except Exception as error:  # for text, half a file or a picture, torch raises whatever comes first
            cut = isinstance(error, EOFError) or "PytorchStreamReader" in str(error)
            raise CheckpointError(f"checkpoint {path} cannot be read: {_CUT if cut else _FOREIGN}") from error
        if damaged:
            raise CheckpointError(f"checkpoint {path} is damaged: the checksum of its part {damaged} is wrong")
        if not isinstance(checkpoint, dict):
            raise CheckpointError(
                f"checkpoint {path} is another program's: it holds a {type(checkpoint).__name__}; expected one "
                "that `luve fit` wrote"
            )
        if _MARK not in checkpoint or "state_dict" not in checkpoint:
            keys = ", ".join(map(str, list(checkpoint)[:5])) or "nothing"
            raise CheckpointError(
                f"checkpoint {path} is another program's: it holds {keys}{', ...' if len(checkpoint) > 5 else ''}; "
                "expected one that `luve fit` wrote"
            )
        return checkpoint


def read_pickle(path: Path) -> Any:
    """The content of a file of `torch.save`, as far as it is tensors, which stay on disk, and plain types.

    Raises:
        pickle.UnpicklingError: when it asks for anything else, which could run code.
        CheckpointError: when it is damaged, or no such file.
    """
    for mapped in (True, False):  # files from before PyTorch 1.6 cannot be mapped
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # whatever comes first
            if mapped and "mmap" in str(error):
                continue
            if isinstance(error, pickle.UnpicklingError) and ("GLOBAL" in str(error) or "Unsupported" in str(error)):
                raise
            cut = "PytorchStreamReader" in str(error) or isinstance(error, EOFError)
            raise CheckpointError(f"{path}: {_CUT if cut else 'not a file of torch.save'}") from error


def header_of(path: Path, content: Mapping[Any, Any]) -> WeightsHeader:
    """Names, shapes and dtypes of the tensors among a file's content, as a `.safetensors` file's header has them."""
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    spelt = {dtype: name for name, dtype in DTYPES.items()}
    dtypes = {key: spelt.get(x.dtype, str(x.dtype).removeprefix("torch.")) for key, x in tensors.items()}
    return WeightsHeader(path, (path,), {key: tuple(x.shape) for key, x in tensors.items()}, dtypes, {})


def describe_checkpoint(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a Lightning checkpoint holds besides its weights, for people; None for another program's file.

    Args:
        content: of the file.
    """
    if _MARK not in content or "state_dict" not in content:
        return None
    facts: dict[str, Any] = {key: content.get(f"global_{key}", content.get(key)) for key in ("step", "epoch")}
    facts["written by"] = "luve fit" if "trained_weights" in content else f"Lightning {content[_MARK]}, another program"
    if isinstance(content.get("expert"), str):
        facts["expert"] = content["expert"]
    for key in ("schedule", "callbacks"):
        if isinstance(content.get(key), Mapping) and content[key]:
            entries = content[key].items()
            facts[key] = [str(k).partition("{")[0] if key == "callbacks" else f"{k} {v}" for k, v in entries]
    facts["weights of"] = sorted({str(key).partition(".")[0] for key in content["state_dict"]})
    return facts


def _not_written(path: Path, checkpoint: dict[str, Any], error: Exception) -> CheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    # torch reports a failed write as an error of its own, with the system's error behind it.
    system = next((cause for cause in _causes(error) if isinstance(cause, OSError)), None)
    if system is not None:
        reason = os.strerror(system.errno) if system.errno else str(system)
        if system.errno in _FULL:
            free, needed = shutil.disk_usage(path.parent).free, sum(_sizes(checkpoint).values())
            reason += f" ({_megabytes(free)} are free, it needs {_megabytes(needed)})"
    whole = "; the earlier one is unchanged" if path.exists() else ""
    return CheckpointError(f"checkpoint {path} cannot be written: {reason}{whole}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _sizes(value: Any) -> dict[int, int]:
    """Bytes of every tensor's storage, by address; a shared storage is saved once."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return {address: size for item in items for address, size in _sizes(item).items()}


def _not_allowed(path: Any, error: pickle.UnpicklingError) -> CheckpointError:
    """One line instead of torch's page of advice, which tells how to run what the file holds."""
    found = _GLOBAL.search(str(error))
    if found:
        return CheckpointError(
            f"checkpoint {path} is refused: it holds more than weights and plain values: GLOBAL {found[1]}, which "
            "could run code"
        )
    if zipfile.is_zipfile(path):
        return CheckpointError(f"checkpoint {path} is refused: it holds more than weights and plain values")
    return CheckpointError(f"checkpoint {path} cannot be read: {_FOREIGN}")


def _damaged(path: Any) -> str | None:
    """The first part of a checkpoint whose checksum is wrong; None for an intact one, or another kind of file."""
    if not Path(path).is_file() or not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except zipfile.BadZipFile as error:
        return str(error)


def _keep(storage: Any, location: str) -> Any:
    """The `map_location` that leaves storages where `torch.load` puts them: on the CPU."""
    return storage
