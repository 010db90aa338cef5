"""Folders of models: where the parts of a backbone come from, and how a model is written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from luve_lightning.files import replacing_folder

# What diffusers, PEFT and we look for first: a folder without it holds no model.
_FIRST_READ = ("model_index.json", "config.json", "expert.json")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # organisation/name


def is_local(backbone: str | Path) -> bool:
    """Whether a backbone is a folder here; otherwise it has the form of a hub id.

    Raises:
        FileNotFoundError: when it is neither.
    """
    local = Path(backbone).is_dir()
    if not local and not _HUB_ID.fullmatch(str(backbone)):
        raise FileNotFoundError(
            f"backbone {backbone}: no such folder; expected a diffusers pipeline folder or a hub id"
        )
    return local


def cannot_load(backbone: str | Path, part: str, error: OSError) -> FileNotFoundError:
    """What to raise when diffusers or transformers could not load a backbone's subfolder."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    where = "no such folder, and its {}/ cannot be had from the hub"
    if Path(backbone).is_dir():
        where = "cannot load its {}/"
    return FileNotFoundError(f"backbone {backbone}: {where.format(part)}: {reason}")


@contextmanager
def saving(folder: str | Path) -> Iterator[Path]:
    """A new folder to write a model into, which takes the place of `folder` when it is whole.

    A kill leaves the old model or the new one, never half of one, and files follow the umask: safetensors makes them
    readable by their owner alone. Whatever else is in `folder` stays.

    Yields:
        The folder to write into; it exists.

    Raises:
        OSError: when it cannot be written, such as on a full disk; `folder` is unchanged.
    """
    try:
        with replacing_folder(Path(folder), last=_FIRST_READ) as new:
            yield new
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
