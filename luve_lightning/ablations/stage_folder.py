"""The folder of a stage's result: whether it is finished, and who is at it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luve_lightning.ablations.graph import Stage
from luve_lightning.files import write_text
from luve_lightning.locks import try_lock

_DONE = "done.json"
_LOCK = ".lock"
LOG = "log.txt"


def done_record(stage: Stage) -> dict[str, Any] | None:
    """What was written down when a stage was finished, or None."""
    try:
        record = json.loads((stage.folder / _DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.get("hash") == stage.digest else None


def is_done(stage: Stage) -> bool:
    """Whether a stage's result is there, whole."""
    return done_record(stage) is not None


def write_done(stage: Stage, facts: Mapping[str, Any]) -> None:
    """Say that a stage is finished; written last, and at once."""
    record = {"stage": stage.name, "hash": stage.digest, **facts}
    write_text(stage.folder / _DONE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def lock_folder(stage: Stage) -> int | None:
    """Take the folder, so that no two processes work in it.

    Returns:
        A descriptor that holds it until it is closed, here and in every process that inherited it: a run that outlives
        a killed `luve ablate` keeps others out. None when somebody else has it.
    """
    stage.folder.mkdir(parents=True, exist_ok=True)
    return try_lock(stage.folder / _LOCK)


def resumed_words(stage: Stage) -> tuple[str, ...]:
    """The command's words; training that was stopped goes on from its last checkpoint."""
    if stage.words[0] == "fit" and (stage.folder / "checkpoints" / "last.ckpt").is_file():
        return (*stage.words, "--ckpt_path", "last")
    return stage.words


def log_path(stage: Stage) -> Path:
    """Where a stage's output goes."""
    return stage.folder / LOG
