"""Writes the trained model in its own format when training ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from luve_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from luve_lightning.callbacks.checkpoints import Checkpoints
from luve_lightning.callbacks.ema import EMA, averaged_weights
from luve_lightning.models.folders import saving
from luve_lightning.tasks.contracts import Exporting


class Export(L.Callback):
    """Saves the averaged weights with the task's `export(folder, datamodule)` when training ends, however it ends.

    The task writes into a new folder, which replaces `output` once it is complete; other files in `output` stay.

    Args:
        output: folder to write, for example one that `VLUer.from_pretrained` reads.
        weights: "last" for the weights at the end of training, or "best" for the checkpoint that the validation
            metric of `Checkpoints` chose (which `luve test --ckpt_path best` measures); the last when none was
            validated.
    """

    def __init__(self, output: Path, weights: Literal["last", "best"] = "last") -> None:
        self.output, self.weights = Path(output), weights
        self.written: list[
            Path
        ] = []  # the folder may hold more than the model: an expert's is the run folder itself
        self.chosen: Checkpoints | None = None  # the run whose best the weights are

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse what cannot be chosen or written, before training."""
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"output: {self.output} is a file; expected a folder, or an unused name")
        if self.weights == "best" and not any(saver.monitor for saver in _savers(trainer)):
            raise ValueError("weights: best needs a Checkpoints callback with a metric to monitor")
        if self.weights == "best" and isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "weights: best needs whole checkpoints, ModelParallelStrategy writes shards: use last"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save on the first process; the others help where a task says `collective_export`."""
        if not trainer.is_global_zero and not getattr(pl_module, "collective_export", False):
            return
        task: Exporting = pl_module
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        before = _files(self.output)
        # Other processes help but write nothing.
        new = saving(self.output) if trainer.is_global_zero else nullcontext(self.output)
        with self._weights(trainer, pl_module), new as folder:
            task.export(folder, datamodule)
        self.written = sorted(
            path for path, state in _files(self.output).items() if before.get(path) != state
        )

    def _weights(self, trainer: L.Trainer, pl_module: Any) -> Any:
        best = [saver for saver in _savers(trainer) if saver.monitor and saver.best_model_path]
        if self.weights == "last" or not best:
            return averaged_weights(trainer, pl_module)
        self.chosen = best[0]
        rank_zero_info(f"{self.output}: weights of {best[0].best_model_path}")
        return _holding(pl_module, _saved_weights(trainer, Path(best[0].best_model_path)))


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    """When each file was changed, and its inode; without wandb's files, which another process writes meanwhile."""
    found = {}
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # renamed meanwhile
            if path.is_file() and path.relative_to(folder).parts[0] != "wandb":
                found[path] = (path.stat().st_mtime_ns, path.stat().st_ino)
    return found


def _savers(trainer: L.Trainer) -> list[Checkpoints]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)]  # type: ignore[attr-defined]


def _saved_weights(trainer: L.Trainer, path: Path) -> dict[str, Tensor]:
    """The weights that were validated when the checkpoint was written: the average, if the run keeps one."""
    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA):
            return dict(checkpoint["callbacks"][callback.state_key]["average"])
    return dict(checkpoint["state_dict"])


@contextmanager
def _holding(module: L.LightningModule, weights: dict[str, Tensor]) -> Iterator[None]:
    """The module holds these trainable parameters inside the context."""
    parameters = {name: p for name, p in module.named_parameters() if name in weights}
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
