"""The average of the trainable weights, and the trained model in its own format when training ends."""

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
from torch.distributed.tensor import DTensor

from luve_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from luve_lightning.callbacks.checkpoints import Checkpoints
from luve_lightning.model_folders import saving
from luve_lightning.tasks.base import Exporting


class EMA(L.Callback):
    """Averages trainable weights after each optimiser step; validation, test and export use the average.

    Lightning's own WeightAveraging copies the whole module, frozen backbone included, and saves it in the
    checkpoint; this keeps only trainable weights.

    Args:
        decay: decay of the average, in [0, 1). The effective decay warms up as (1 + n) / (10 + n).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._last_step = 0
        self._kept: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] = {}  # found once: a walk through all modules in each step takes milliseconds

    def _trainable(self, module: L.LightningModule) -> dict[str, Tensor]:
        return {name: p.data for name, p in module.named_parameters() if p.requires_grad}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with the current weights, or with the checkpoint's average.

        Raises:
            ValueError: when the weights are sharded; each process holds another part of them.
        """
        weights = self._trainable(pl_module)
        if any(isinstance(w, DTensor) for w in weights.values()):
            raise ValueError("weights sharded by ModelParallelStrategy cannot be averaged: remove the EMA callback")
        if set(self.average) != set(weights):
            self.average = {name: w.detach().float().clone() for name, w in weights.items()}
        self.average = {name: a.to(weights[name].device) for name, a in self.average.items()}
        self._last_step = trainer.global_step
        self._trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let go of the weights."""
        self._trained = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the weights of a completed step to the average."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = [self.average[name] for name in self._trained]
        torch._foreach_lerp_(averages, [w.detach().float() for w in self._trained.values()], 1 - decay)

    @contextmanager
    def averaged(self, pl_module: L.LightningModule) -> Iterator[None]:
        """The module holds the averaged weights inside this context; contexts may be nested."""
        nested = bool(self._kept)
        self._enter(pl_module)
        try:
            yield
        finally:
            if not nested:
                self._leave(pl_module)

    def _enter(self, pl_module: L.LightningModule) -> None:
        if not self.average or self._kept:
            return
        weights = self._trainable(pl_module)
        self._kept = {name: w.clone() for name, w in weights.items()}
        for name, w in weights.items():
            w.copy_(self.average[name])

    def _leave(self, pl_module: L.LightningModule) -> None:
        kept, self._kept = self._kept, {}
        for name, w in self._trainable(pl_module).items():
            if name in kept:
                w.copy_(kept[name])

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate, and test, the average."""
        self._enter(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Continue training with the weights themselves."""
        self._leave(pl_module)

    on_test_start, on_test_end = on_validation_start, on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the weights after a failed validation or test."""
        self._leave(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the weights themselves, even while the module holds the average."""
        checkpoint["state_dict"] |= self._kept

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of steps in it."""
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a checkpoint's average."""
        self.average, self.updates = dict(state_dict["average"]), int(state_dict["updates"])


def averaged_weights(trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
    """The context in which `pl_module` holds the run's averaged weights, if the run keeps an average."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA):
            return callback.averaged(pl_module)
    return EMA().averaged(pl_module)


class Export(L.Callback):
    """Saves the averaged weights with the task's `export(folder, datamodule)` when training ends, however it ends.

    The task writes into a new folder, which replaces `output` once it is complete; other files in `output` stay.

    Args:
        output: folder to write, for example one that `load_vluer` reads.
        weights: "last" for the weights at the end of training, or "best" for the checkpoint that the validation
            metric of `Checkpoints` chose (which `luve test --ckpt_path best` measures); the last when none was
            validated.
    """

    def __init__(self, output: Path, weights: Literal["last", "best"] = "last") -> None:
        self.output, self.weights = Path(output), weights
        self.written: list[Path] = []  # the folder may hold more than the model: an expert's is the run folder itself
        self.chosen: Checkpoints | None = None  # the run whose best the weights are

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse what cannot be chosen or written, before training."""
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"output: {self.output} is a file; expected a folder, or an unused name")
        if self.weights == "best" and not any(saver.monitor for saver in _savers(trainer)):
            raise ValueError("weights: best needs a Checkpoints callback with a metric to monitor")
        if self.weights == "best" and isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError("weights: best needs whole checkpoints, ModelParallelStrategy writes shards: use last")

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
        self.written = sorted(path for path, state in _files(self.output).items() if before.get(path) != state)

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
