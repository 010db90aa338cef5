"""Work that every process shares, and errors on one of them that all must hear of."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

import lightning as L

from luve_lightning.functional.gather import gather_mappings

T = TypeVar("T")


class RankError(RuntimeError):
    """An error on another rank; the text holds its traceback."""


def on_every_rank(trainer: L.Trainer, action: Callable[[], T]) -> T:
    """Run an action on every rank; when it fails on one, the run ends on all.

    An exception on one rank alone would leave the others waiting. The action must hold no collective operation
    that an error could keep a rank from. The forward pass of sharded weights (FSDP2) is one: there, only an error
    that all ranks have ends the run at once.

    Returns:
        The action's result on this rank.

    Raises:
        Exception: on rank zero, the action's own.
        RankError: on rank zero, when only another rank failed.
        SystemExit: on other ranks; rank zero speaks for the run.
    """
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    # As text: not every exception can be pickled.
    text = "" if error is None else "".join(traceback.format_exception(error))
    failed = {rank: told for rank, told in gather_mappings({trainer.global_rank: text}).items() if told}
    if not failed:
        return result
    if not trainer.is_global_zero:
        raise SystemExit(0)  # see StopRequested
    if error is not None:
        raise error
    rank, told = next(iter(failed.items()))
    raise RankError(f"rank {rank} failed:\n{told}")
