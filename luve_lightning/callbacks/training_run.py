"""A training run before its first step and after its last: one live run per folder, and its printed summary."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from luve_lightning.callbacks.progress import named_numbers, number
from luve_lightning.locks import Busy, locked
from luve_lightning.terminal import amount, duration, say

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
    if not is_first_process() or "://" in str(folder):
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
        raise ValueError(f"{busy}: wait for that run to end, or choose another trainer.default_root_dir") from busy
    finally:
        if made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def is_first_process() -> bool:
    """Whether this process is rank zero, as far as its environment says before there is a Trainer."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return getattr(rank_zero_only, "rank", 0) == 0 and node.strip() in ("", "0")


class OneStreamDDP(DDPStrategy):
    """DDP whose gradients arrive on the stream that trains.

    Lightning wraps the model on a stream of its own, for CUDA graphs of whole passes, which nothing here records.
    PyTorch then warns in the middle of the first step, and gradients wait for that stream.

    Unless the configuration says otherwise, gradients lie where the processes exchange them, which saves two copies
    of each in every step, and buffers are sent only where a checkpoint has some: others are constants.
    """

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        chosen = {"gradient_as_bucket_view": True, "broadcast_buffers": _has_saved_buffers(model), **self._ddp_kwargs}
        return DistributedDataParallel(module=model, device_ids=self.determine_ddp_device_ids(), **chosen)


def _has_saved_buffers(model: nn.Module) -> bool:
    return any(set(module._buffers) - module._non_persistent_buffers_set for module in model.modules())


def use_one_stream(strategy: Strategy) -> None:
    """Make Lightning's DDP, however it was chosen, a OneStreamDDP; others stay as they are."""
    if type(strategy) is DDPStrategy:
        strategy.__class__ = OneStreamDDP  # it has the same state, and is not set up yet


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


class RunSummary(Callback):
    """Prints a few lines when a run has been set up; `closing` prints those for its end. Rank zero only.

    Args:
        verb: `fit`, `validate`, `test` or `predict`.
        named: the configuration's callbacks by name; one with an `output` is listed under it.
        command: the command line as typed.
        seed: seed of the run.
    """

    def __init__(self, verb: str, named: Mapping[str, Callback], command: Sequence[str], seed: int) -> None:
        self.verb, self.named, self.command, self.seed = verb, dict(named), list(command), seed
        self.started = time.monotonic()
        self._wall, self._first_step = time.time(), 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is set up and the checkpoint is read; nothing is trained yet."""
        loaded = trainer._checkpoint_connector._loaded_checkpoint
        self._first_step = int(loaded.get("global_step", 0))
        resumed = f"{_short(trainer.ckpt_path)}, step {self._first_step}" if loaded else None
        self._begin(trainer, pl_module, resumed)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for `validate`."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._begin(trainer, pl_module, _weights(trainer))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for `test` and `predict`."""
        self._begin(trainer, pl_module, _weights(trainer))

    on_predict_start = on_test_start

    def _begin(self, trainer: Trainer, module: LightningModule, source: str | None) -> None:
        if not trainer.is_global_zero:
            return
        rows = [
            ("model", _model(module)),
            ("device", _device(trainer)),
            ("data", _data(trainer)),
            ("folder", f"{_short(trainer.default_root_dir)}, seed {self.seed}"),
        ]
        rows += [("resumes" if self.verb == "fit" else "weights", source)] if source else []
        _print(f"luve {self.verb}", rows)

    def closing(self, trainer: Trainer, stopped: bool = False) -> None:
        """Print the outcome of the run, after the bar is gone.

        Args:
            trainer: trainer of the run.
            stopped: whether a signal ended it, so that more training remains.
        """
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        rows: list[tuple[str, str | Sequence[str]]] = [*self._checkpoints(trainer), *self._outputs(trainer)]
        following = self._next(trainer, stopped)
        rows += [("next", following)] if following else []
        facts = [duration(time.monotonic() - self.started)]
        if self.verb == "fit":
            facts.insert(0, _steps(trainer, self._first_step))
            facts += _last_values(trainer)
        _print(f"luve {self.verb}: {', '.join(facts)}", rows)

    def _checkpoints(self, trainer: Trainer) -> Iterator[tuple[str, str]]:
        savers = trainer.checkpoint_callbacks if self.verb == "fit" else []
        for saver in (saver for saver in savers if isinstance(saver, ModelCheckpoint)):
            last, best = Path(saver.dirpath or "") / "last.ckpt", Path(saver.best_model_path)
            if last.is_file():
                yield "checkpoint", _short(last)
            if saver.monitor and best.is_file() and saver.best_model_score is not None:
                yield "best", f"{_short(best)}, {saver.monitor} {number(float(saver.best_model_score))}"

    def _outputs(self, trainer: Trainer) -> Iterator[tuple[str, str]]:
        """What callbacks and loggers wrote in this run."""
        for name, callback in self.named.items():
            output = getattr(callback, "output", None)
            if not isinstance(output, Path) or not getattr(callback, "written", True):
                continue
            if _changed_since(output, self._wall):
                yield name, _short(output)
        for logger in trainer.loggers:
            file = Path(logger.log_dir or "") / "metrics.csv"
            if isinstance(logger, CSVLogger) and _changed_since(file, self._wall):
                yield "log", _short(file)

    def _next(self, trainer: Trainer, stopped: bool) -> list[str] | None:
        """The command that continues from here."""
        module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
        if self.verb != "fit" or not list(self._checkpoints(trainer)):
            return None
        if stopped:
            return _with_last_checkpoint(self.command, "fit")
        for verb, step, loader, there in (
            ("test", "test_step", "test_dataloader", "tests"),
            ("validate", "validation_step", "val_dataloader", "validates"),
        ):
            if not getattr(data, there, True):  # a small index of one's own
                continue
            if is_overridden(step, module, LightningModule) and is_overridden(loader, data, LightningDataModule):
                return _with_last_checkpoint(self.command, verb)
        return None


def _with_last_checkpoint(command: Sequence[str], verb: str) -> list[str] | None:
    """The command line for another verb, with the run's last checkpoint instead of the initial one."""
    words, kept = list(command[2:]), []
    while words:
        word = words.pop(0)
        if word == "--ckpt_path":
            words[:1] = []
        elif not word.startswith("--ckpt_path="):
            kept.append(word)
    return [*command[:1], verb, *kept, "--ckpt_path", "last"] if command else None


def _print(title: str, rows: Sequence[tuple[str, str | Sequence[str]]]) -> None:
    """A title and named rows; a terminal gets long ones wrapped, a command so that a shell joins it again."""
    console = Console(emoji=False)
    names = max((len(name) for name, _ in rows), default=0)
    width = console.width - names - 4 if console.is_terminal else sys.maxsize
    lines = [title]
    for name, value in rows:
        if isinstance(value, str):
            broken = textwrap.wrap(value, width, break_long_words=False, break_on_hyphens=False)
        else:
            broken = _command_lines(value, width)
        lines += [f"  {'' if i else name:{names}}  {line}" for i, line in enumerate(broken)]
    say(console, "\n".join(lines))


def _command_lines(words: Sequence[str], width: int) -> list[str]:
    """A command in lines that end in a backslash, broken before options."""
    parts: list[str] = []
    for word in words:
        after_key = bool(parts) and parts[-1].startswith("--") and " " not in parts[-1]
        if after_key and not word.startswith("--"):
            parts[-1] += f" {shlex.quote(word)}"
        else:
            parts.append(shlex.quote(word))
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1]) + 1 + len(part) > width - 2:
            lines[-1] += " \\"
            lines.append(f"  {part}")
        else:
            lines[-1] += f" {part}" if lines[-1] else part
    return lines


def _model(module: LightningModule) -> str:
    counts = {True: 0, False: 0}
    for parameter in module.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return f"{type(module).__name__}, {_amount(counts[True])} parameters trained, {_amount(counts[False])} frozen"


def _amount(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    else:
        name = device.type
    processes = f", {trainer.world_size} processes" if trainer.world_size > 1 else ""
    return f"{name}{processes}, precision {trainer.precision}"


def _data(trainer: Trainer) -> str:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    counts: dict[str, int] = getattr(data, "clip_counts", dict)()
    source = _short(data.index_path) if hasattr(data, "index_path") else type(data).__name__
    clips = ", ".join(f"{count} {split}" for split, count in counts.items())
    batch = getattr(data, "batch_size", None)
    return source + (f", clips: {clips}" if clips else "") + (f"; batches of {batch}" if batch else "")


def _weights(trainer: Trainer) -> str:
    return _short(trainer.ckpt_path) if trainer.ckpt_path else "none loaded: as the configuration begins"


def _steps(trainer: Trainer, first: int) -> str:
    done = trainer.global_step
    steps = f"{done} of {amount(trainer.max_steps, 'step')}" if trainer.max_steps > 0 else amount(done, "step")
    if first and done == first:
        return f"{steps}, none of them now"
    return f"{steps}, {done - first} of them now" if first else steps


def _last_values(trainer: Trainer) -> list[str]:
    """The losses of the last step and what the last validation chose to show."""
    return named_numbers({name: float(value) for name, value in trainer.progress_bar_metrics.items()})


def _changed_since(path: Path, moment: float) -> bool:
    files = path.rglob("*") if path.is_dir() else [path] if path.is_file() else []
    # Some file systems keep whole seconds.
    return any(file.is_file() and file.stat().st_mtime >= int(moment) for file in files)


def _short(path: Any) -> str:
    """Relative to the current folder where it lies inside."""
    whole = Path(path).absolute()
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(path)
