"""The folder of a training run: one live run per folder, and what an earlier run left in it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from luve_lightning.locks import Busy, locked

LOCK = ".run.lock"


@contextmanager
def owned(folder: Path, what: str = "run folder") -> Iterator[None]:
    """Hold the folder that a run writes to for as long as the block runs.

    Of several processes of one run, the first holds it for all.

    Args:
        folder: Created when missing, and removed again when nothing was written to it.
        what: Names the folder in the message.

    Raises:
        ValueError: Another run is using it; the text names its process, machine and start. Or it is no folder.
    """
    if not _is_first_process() or "://" in str(folder):
        yield
        return
    made = not folder.exists()
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        found = "a file" if folder.exists() else "a link to nothing"
        raise ValueError(f"{what} {folder} is {found}; expected a folder, or an unused name")
    try:
        with locked(folder / LOCK, what=f"{what} {folder}"):
            yield
    except Busy as busy:
        raise ValueError(
            f"{busy}: wait for that run to end, or choose another trainer.default_root_dir"
        ) from busy
    finally:
        if made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _is_first_process() -> bool:
    """Whether this process is rank zero, as far as its environment says before there is a Trainer."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return getattr(rank_zero_only, "rank", 0) == 0 and node.strip() in ("", "0")


class SetAside(Callback):
    """Moves an earlier run's checkpoints when training starts; earlier, a mistake in the data would hide them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first step, and so before the first checkpoint."""
        if trainer.is_global_zero:
            set_aside(self.folder)


def refuse_only_earlier(folder: Path) -> None:
    """Let `last` start a run where there is none yet, but not where an earlier one was set aside."""
    earlier = sorted(folder.parent.glob(f"{folder.name}-*/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if earlier and not any(folder.glob("*.ckpt")):
        raise ValueError(
            f"ckpt_path: no checkpoint in {folder}; the newest of an earlier run is {earlier[-1]}: give that path to "
            "resume it"
        )


def set_aside(folder: Path) -> Path | None:
    """Rename the checkpoints of an earlier run, so that a new run in the same folder does not overwrite them.

    Args:
        folder: the run's checkpoint folder; nothing happens when it is missing or holds no checkpoint.

    Returns:
        The new name, `<folder>-<n>` with the first free n, or None.
    """
    if not any(folder.glob("*.ckpt")):
        return None
    number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}-{n}").exists())
    aside = folder.rename(folder.with_name(f"{folder.name}-{number}"))
    rank_zero_info(f"{folder} holds an earlier run: kept as {aside}; --ckpt_path last would have resumed it")
    return aside
