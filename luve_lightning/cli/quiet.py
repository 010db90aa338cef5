"""Silences what the libraries say in every run and nobody can act on; one function for all verbs."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Loading a model takes a second or minutes: tqdm's bars appear when one takes longer than this.
_BAR_AFTER_SECONDS = "10"

_MESSAGES = (
    "💡 Tip:",
    # `luve` says these in the lines it begins and ends a run with (run_summary.py).
    "Seed set to",
    "GPU available:",
    "TPU available:",
    "LOCAL_RANK:",
    "`Trainer.fit` stopped:",
    "Restoring states from the checkpoint",
    "Restored all states from the checkpoint",
    "Loaded model weights from the checkpoint",
    "Loading `train_dataloader` to estimate",
)
_WARNINGS = (
    # Lightning 2.6 still asks PyTorch's pytree in the way of before 2.12.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # Lightning cannot know that the batch samplers of ResumableDataModule start where the checkpoint stopped.
    "You're resuming from a checkpoint that ended before the epoch ended",
    # They are moved when training starts; see training.py.
    "Checkpoint directory .* exists and is not empty",
    # Frozen parts (a LatentSpace) stay in eval mode by design.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # Steps are logged by their number in the run, however long an epoch is.
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # `num_workers` is each experiment's own choice: most keep their latents in memory.
    ".*does not have many workers which may be a bottleneck",
)
_LOGGERS = tuple(
    f"lightning.{name}"
    for name in ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.seed")
)
_RANK = re.compile(r"\[rank: \d+\] ")


def quieten() -> None:
    """Before a verb runs; imports nothing."""
    # tqdm reads it when it is imported. Bars of transformers, diffusers and the hub are tqdm's.
    os.environ.setdefault("TQDM_DELAY", _BAR_AFTER_SECONDS)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_worth_saying)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def quiet_wandb(config: Mapping[str, Any]) -> Iterator[None]:
    """Silences wandb's notices, but not its errors, inside the context when its run stays on this machine.

    Args:
        config: a training verb's composed configuration.
    """
    loggers = [entry for entry in (config.get("loggers") or {}).values() if isinstance(entry, Mapping)]
    ours = [entry for entry in loggers if str(entry.get("class_path")).endswith("WandbLogger")]
    offline = os.environ.get("WANDB_MODE", "online") != "online"
    if not ours or not (offline or all((entry.get("init_args") or {}).get("offline") for entry in ours)):
        yield
        return
    import wandb

    # Lightning asks for the mode in the environment, which is read here already.
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    wandb.setup(settings=wandb.Settings(mode=mode, quiet=True, show_info=False, show_warnings=False))
    try:
        yield
    except BaseException:
        wandb.finish(exit_code=1)
        raise
    wandb.finish()  # Lightning leaves it to wandb's other process, which knows no quiet


def _worth_saying(record: logging.LogRecord) -> bool:
    return not _RANK.sub("", record.getMessage(), count=1).startswith(_MESSAGES)
