"""Which checkpoints a run keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.training_epoch_loop import RestartStage
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor


class Checkpoints(ModelCheckpoint):
    """`last.ckpt` every few optimiser steps and at the end, and the best by a validation metric.

    One ModelCheckpoint cannot do both. With `monitor` and `every_n_train_steps` it writes nothing before the first
    validation, ranks weights by an earlier validation's score, and skips the score of a step that it has saved
    already. After a resume it also saves between the micro-batches of a gradient accumulation (no checkpoint holds
    those gradients). With a logger it looks for `last` in a new version folder, and it writes no `last` when
    `max_time` or `max_steps` ends the run. Hence this class.

    Files lie in `<default_root_dir>/checkpoints`, one run per folder: `last.ckpt` is overwritten.

    Args:
        every_n_steps: optimiser steps between writes of `last.ckpt`, at least 1.
        monitor: validation metric that chooses the best; None keeps only `last.ckpt`.
        mode: whether a larger ("max") or a smaller ("min") metric is better.
        save_top_k: how many of the best to keep; -1 keeps all.
        folder: write here instead.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        save_top_k: int = 1,
        folder: Path | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be >= 1, got {every_n_steps}")
        super().__init__(
            dirpath=folder,
            filename="best-step={step}",
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k if monitor else 0,
            save_last=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        self.every_n_steps = every_n_steps
        self._written: int | None = None
        self._validation_due = False
        self._started = False
        self._entered = False
        self._stop_after_step = False
        self._resumes_here = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the folder."""
        self._choose_folder(trainer)
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._make_up_after_the_last_step(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what still holds from a run that monitored another metric; Lightning would keep nothing."""
        assert self.dirpath is not None
        source = trainer.ckpt_path
        self._resumes_here = source is not None and Path(source).resolve().parent == Path(self.dirpath).resolve()
        states = checkpoint.get("callbacks", {})
        others = [key for key in states if key.startswith(f"{type(self).__qualname__}{{")]
        if trainer.state.fn == "fit" and self.state_key not in states and len(others) == 1:
            self._validation_due = bool(states[others[0]]["validation_due"])
            rank_zero_info(
                f"resuming with monitor {self.monitor}, mode {self.mode} (the checkpoint had another): the best is "
                "chosen again"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Repair what Lightning restores wrongly, and run a validation that the checkpoint was written before."""
        # Write nothing before the first step: Lightning's counters are between two states here.
        self._entered, self._written, self._stop_after_step = True, trainer.global_step, False
        _let_go_of_the_file(trainer)
        _end_epoch_after_last_batch(trainer)
        if self._validation_due:
            _validate(trainer)
            self._renew_last(trainer)
        self._started = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write `last.ckpt` when it is due, before a validation, or when training stops here."""
        if accumulating(trainer):  # a stop (max_time) waits, or the accumulated gradients would be lost
            self._stop_after_step |= trainer.should_stop
            trainer.should_stop = False
            return
        trainer.should_stop |= self._stop_after_step
        loop = trainer.fit_loop
        stopping = trainer.should_stop and loop._can_stop_early
        assert loop._data_fetcher is not None
        self._validation_due = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        due = trainer.global_step % self.every_n_steps == 0 or self._validation_due
        if due or stopping or _is_final_batch(trainer):
            self.write_last(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rank the weights just validated, then put the ranking into `last.ckpt`."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._validation_due = False
        if self.monitor is not None:
            metrics: dict[str, Tensor] = self._monitor_candidates(trainer)
            if self.monitor not in metrics:
                known = ", ".join(sorted(k for k in metrics if k not in ("epoch", "step"))) or "none"
                raise ValueError(f"monitor: validation logs no {self.monitor!r}; it logs: {known}")
            self._save_topk_checkpoint(trainer, metrics)
        if self._started and not accumulating(trainer):
            self._written = None
            self.write_last(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: an epoch cut short by a stop ends here too, in a state that Lightning cannot resume."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write nothing: the final step was written when it was taken."""
        self._started = False

    def write_last(self, trainer: L.Trainer) -> Path | None:
        """Write `last.ckpt` unless it holds this step; on all ranks, after an optimiser step.

        Returns:
            Its path; None under `fast_dev_run`.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        assert self.dirpath is not None
        path = Path(self.dirpath) / "last.ckpt"
        if not self.is_current(trainer):
            self._written, self.last_model_path = trainer.global_step, str(path)
            self._save_checkpoint(trainer, str(path))
        return path

    def is_current(self, trainer: L.Trainer) -> bool:
        """Whether `last.ckpt`, or the checkpoint that the run resumed from, holds this step."""
        return self._written == trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """ModelCheckpoint's state, and whether a validation was to follow."""
        return {**super().state_dict(), "validation_due": self._validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both, and the ranking even when the folder was moved or copied with its checkpoints."""
        self._validation_due = bool(state_dict["validation_due"])
        super().load_state_dict(self._moved(state_dict) if self._resumes_here else state_dict)
        self._rank_no_more_than_wanted()

    def _moved(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state with its files in this folder; unchanged when one of the best is missing.

        When the folder has another name, Lightning forgets the scores and takes the next validation's weights for
        the best, however bad they are.
        """
        here = Path(self.dirpath or "")
        if not all((here / Path(path).name).is_file() for path in state["best_k_models"]):
            return state
        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        renamed = {key: str(here / Path(state[key]).name) if state[key] else "" for key in paths}
        ranked = {str(here / Path(path).name): score for path, score in state["best_k_models"].items()}
        return {**state, **renamed, "best_k_models": ranked, "dirpath": self.dirpath}

    def _rank_no_more_than_wanted(self) -> None:
        """Follow a smaller `save_top_k`, with which Lightning would never remove a checkpoint again."""
        ranked = sorted(self.best_k_models, key=self.best_k_models.__getitem__, reverse=self.mode == "max")
        dropped = ranked[self.save_top_k :] if self.save_top_k > 0 else []
        if not dropped:
            return
        for path in dropped:
            del self.best_k_models[path]
        self.kth_best_model_path = ranked[self.save_top_k - 1]
        self.kth_value = self.best_k_models[self.kth_best_model_path]
        names = ", ".join(Path(path).name for path in dropped)
        rank_zero_info(f"resuming with save_top_k {self.save_top_k}: {names} stay, but are no longer ranked")

    def _make_up_after_the_last_step(self, trainer: L.Trainer) -> None:
        """Let a run that was stopped after its last step do what follows it.

        When no step is left, Lightning leaves its loop without calling `on_train_start` and `on_train_end`, where
        callbacks do this.
        """
        loop = trainer.fit_loop
        run = loop.run

        def run_or_make_up() -> None:
            self._entered = False
            run()
            if self._entered or not trainer.ckpt_path or not trainer.limit_train_batches:
                return
            loop.reset()
            loop.on_run_start()
            loop.on_run_end()

        loop.run = run_or_make_up  # type: ignore[method-assign]

    def _renew_last(self, trainer: L.Trainer) -> None:
        """Put the callbacks' states into the existing `last.ckpt`: the loops are between two states here."""
        path = Path(self.dirpath or "") / "last.ckpt"
        source = trainer.ckpt_path
        resumed = source is not None and Path(source).exists() and path.is_file() and path.samefile(source)
        if not trainer.is_global_zero or not resumed:
            return
        files = trainer.strategy.checkpoint_io
        checkpoint = files.load_checkpoint(path)
        states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}  # type: ignore[attr-defined]
        checkpoint["callbacks"] = {key: state for key, state in states.items() if state}
        files.save_checkpoint(checkpoint, path)

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        self._choose_folder(trainer)  # `ckpt_path="last"` is looked up before setup
        return super()._find_last_checkpoints(trainer)

    def _choose_folder(self, trainer: L.Trainer) -> None:
        if self.dirpath is None:
            self.dirpath = str((Path(trainer.default_root_dir) / "checkpoints").resolve())


def _let_go_of_the_file(trainer: L.Trainer) -> None:
    """Copy what optimisers still hold of the checkpoint that a sharded run was resumed from.

    Lightning maps that file into memory, and AdamW's step counters stay parts of it: 17 GB of a full adaptation would
    keep their place on the disk after the file was replaced.
    """
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.device.type == "cpu" and value.dim() == 0:
                    state[name] = value.clone()


def accumulating(trainer: L.Trainer) -> bool:
    """Whether gradients have accumulated since the last optimiser step; no checkpoint holds them."""
    return bool(trainer.fit_loop._should_accumulate())


def _is_final_batch(trainer: L.Trainer) -> bool:
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    epochs = trainer.max_epochs
    return trainer.is_last_batch and epochs is not None and 0 <= epochs <= trainer.current_epoch + 1


def _end_epoch_after_last_batch(trainer: L.Trainer) -> None:
    """Repair a resume from the last batch of an epoch.

    Resumed from before that batch's validation, Lightning 2.6 ends the epoch but takes the new one for its
    continuation: it skips the new epoch's start hooks and does not count it as begun, and the next resume then
    takes a checkpoint of its middle for one of its end. Resumed from after a validation that was not scheduled
    there (because of `max_time`), it trains a batch of the new epoch within the old one. Both are brought to the
    state that Lightning handles: the last batch is done but not counted yet, the epoch is.
    """
    loop = trainer.fit_loop
    batches, epochs = loop.epoch_loop.batch_progress, loop.epoch_progress
    if not (loop.restarted_mid_epoch and batches.is_last_batch):
        return
    if loop.epoch_loop.restarted_on_last:
        epochs.increment_processed()
        epochs.increment_completed()
        batches.total.completed -= 1
        batches.current.completed -= 1
        loop.epoch_loop._restart_stage = RestartStage.RESTARTED_ON_TRAIN_BATCH_END
    loop.reset_restart_stage()


def _validate(trainer: L.Trainer) -> None:
    """Run the validation that a kill or a stop prevented, as the epoch loop would have; Lightning skips it."""
    loop = trainer.fit_loop.epoch_loop
    first_iteration = trainer._logger_connector._first_loop_iter
    loop.val_loop.restarting = False  # from its first batch
    trainer.validating = True
    loop.val_loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first_iteration
