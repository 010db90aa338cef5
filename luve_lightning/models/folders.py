"""Folders of models: where the parts of a backbone come from, and how a model is written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
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


def cannot_load(backbone: str | Path, part: str, error: BaseException) -> FileNotFoundError | ValueError:
    """What to raise when a library could not load a model, or a part of a backbone.

    Args:
        backbone: a folder or a hub id.
        part: its subfolder or a file of it; empty for a model's own folder.
        error: what the library raised.

    Returns:
        A FileNotFoundError for what is not there, a ValueError for what is damaged.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else "no reason given"
    reason = reason if isinstance(error, OSError) or not lines else f"{type(error).__name__}: {reason}"
    name = part if "." in part else f"{part}/"
    where = f"backbone {backbone}: cannot load its {name}" if part else f"{backbone}: cannot be loaded"
    if part and not Path(backbone).is_dir():
        where = f"backbone {backbone}: no such folder, and its {name} cannot be had from the hub"
        reason = f"{_hubs_reason(error) or reason}; a local pipeline folder works without the hub"
    kind = FileNotFoundError if isinstance(error, OSError) else ValueError
    return kind(f"{where}: {reason}")


@contextmanager
def loading(backbone: str | Path, part: str) -> Iterator[None]:
    """Make one line of whatever a library raises while it reads a model's files; see `cannot_load`.

    Raises:
        FileNotFoundError: for what the library says is not there or cannot be opened.
        ValueError: for files that are cut short, or of something else.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # Anything at all: libraries raise KeyError, TypeError, RecursionError, and Rust's bare Exception.
    except Exception as error:
        raise cannot_load(backbone, part, error) from error


def load_whole(kind: Any, source: str | Path, part: str, **options: Any) -> Any:
    """A model of which every weight is in its files, and nothing else is.

    Libraries fill in what is missing with random numbers, and pass over what they do not know, with a warning.

    Args:
        kind: class of diffusers or transformers.
        source: a folder or a hub id.
        part: of a backbone, its subfolder; empty when the model lies in `source` itself.
        options: of its `from_pretrained`.

    Raises:
        FileNotFoundError: when it cannot be had.
        ValueError: when files are damaged, or hold other weights than the model's configuration asks for.
    """
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    before = [logger.get_verbosity() for logger in loggers]
    try:
        for logger in loggers:
            logger.set_verbosity(logger.CRITICAL)  # what they would warn of is checked below
        with loading(source, part):
            model, about = kind.from_pretrained(
                str(source), subfolder=part or None, output_loading_info=True, **options
            )
    finally:
        for logger, verbosity in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
    if issubclass(kind, transformers.PreTrainedModel):
        about["unexpected_keys"] = ()  # of a whole model the encoder alone is loaded
    for key, wrong in (
        ("missing_keys", "are missing"),
        ("mismatched_keys", "have another shape than its config.json says"),
        ("unexpected_keys", "are none of this model"),
    ):
        if found := sorted(map(str, about.get(key, ()))):
            where = f"backbone {source}: its {part}/" if part else str(source)
            raise ValueError(f"{where}: {len(found)} weights {wrong}, for instance {found[0]}")
    return model


def read_config(backbone: str | Path, part: str, name: str = "config.json") -> dict[str, Any]:
    """A configuration of diffusers in a local folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: something else than a JSON object with a class's name.
    """
    path = Path(backbone) / part / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = _parsed(path)
    if not isinstance(content, dict) or not isinstance(content.get("_class_name"), str):
        raise ValueError(f"{path}: no configuration of diffusers: it has no _class_name")
    return dict(content)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: for something else.
    """
    content = _parsed(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return dict(content)


def _parsed(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def _hubs_reason(error: BaseException) -> str | None:
    """Why the hub gave nothing, which diffusers and transformers hide behind "does not appear to have a file"."""
    links = list(_causes(error))
    for link in links:
        if isinstance(link, OSError) and link.filename and link.errno:
            return f"{link.filename}: {link.strerror} (where downloads are kept follows HF_HOME)"
    names = {base.__name__ for link in links for base in type(link).__mro__}
    if "RepositoryNotFoundError" in names or "GatedRepoError" in names:
        return "it knows no such repository, or one that needs a login (hf auth login)"
    if "LocalEntryNotFoundError" in names or "OfflineModeIsEnabled" in names:
        why = " ".join(str(links[-1]).split())[:200]
        return f"it cannot be reached ({why}), and nothing of it was downloaded before"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


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
