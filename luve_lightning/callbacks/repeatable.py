"""Repeatable runs: random state in the checkpoint, work that leaves no trace in training, a fixed number of threads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from luve_lightning.callbacks.weights import averaged_weights
from luve_lightning.machine import check_workers, gather_mappings


@contextmanager
def undisturbed(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """The module holds its averaged weights in evaluation mode, without gradients; afterwards all is as before.

    Bit for bit, that is: the weights; the generators of Python, numpy, torch's CPU and this process's GPU; each
    module's mode; which parameters are trained; torch's settings for cuDNN, precision and determinism, which
    metric libraries change.
    """
    device = pl_module.device
    generators = random_state(device)
    modes = [(module, module.training) for module in pl_module.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in pl_module.parameters()]
    settings = _settings()
    try:
        with torch.no_grad(), averaged_weights(trainer, pl_module):
            pl_module.eval()
            try:
                yield
            finally:
                # Before the weights come back: the average covers those that are trained.
                for parameter, requires_grad in trained:
                    parameter.requires_grad_(requires_grad)
    finally:
        for module, mode in modes:
            module.training = mode
        _set(settings)
        set_random_state(generators, device)


def _settings() -> dict[str, Any]:
    cudnn: Any = torch.backends.cudnn
    return {
        "cudnn": {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")},
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
    }


def _set(settings: dict[str, Any]) -> None:
    for name, value in settings["cudnn"].items():
        setattr(torch.backends.cudnn, name, value)
    torch.set_float32_matmul_precision(settings["precision"])
    torch.use_deterministic_algorithms(settings["deterministic"], warn_only=settings["warn_only"])
    torch.set_default_dtype(settings["dtype"])
    if torch.get_num_threads() != settings["threads"]:
        torch.set_num_threads(settings["threads"])


_KEY = "random_state"


class RandomState(L.Callback):
    """Saves the torch, numpy and Python generators of every rank; a resumed run continues with them.

    Randomness in the data follows from (seed, epoch, position) already (`ResumableBatchSampler`); this is for what
    draws from the global generators during a step: dropout, sampling from a posterior, noise.
    """

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] = []

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Collect the states; every rank makes the checkpoint, rank zero writes it."""
        states = gather_mappings({trainer.global_rank: random_state(pl_module.device)})
        checkpoint[_KEY] = list(states.values())

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states until training starts: set-up and the sanity check draw numbers, too."""
        self._states = checkpoint.get(_KEY, [])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the generators of this rank."""
        states, self._states = self._states, []
        if trainer.ckpt_path and not states:
            rank_zero_warn("the checkpoint has no random state: random numbers start afresh")
        elif states and len(states) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint holds the random state of {len(states)} process(es), this run has "
                f"{trainer.world_size}: random numbers start afresh"
            )
        elif states:
            set_random_state(states[trainer.global_rank], pl_module.device)


def random_state(device: torch.device) -> dict[str, Any]:
    """The global generators' states as tensors and plain values, which `weights_only` loading accepts.

    Args:
        device: device whose generator to include; the CPU's always is.
    """
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (it is the global state we want)
    version, words, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the global generators to what `random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """PyTorch computes with this many CPU threads inside the context.

    Args:
        count: at least 1; may exceed the number of cores, up to four per core or 16.

    Raises:
        ValueError: for less than one thread, or too many to start.
    """
    if count < 1:
        raise ValueError(f"threads: expected at least 1, got {count}")
    check_workers("threads", count)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class CPUThreads(L.Callback):
    """Computes with a fixed number of CPU threads, whatever the machine's cores and OMP_NUM_THREADS.

    A sum split over a different number of threads rounds differently in the last digit, and training amplifies
    that: after 60 steps of the mini world's VLUer the weights of one and of two threads differ by 2e-6, and each
    step adds to it. With a fixed number a run gives the same weights on one core as on many of the same kind, idle
    or busy.

    Args:
        count: threads per process, at least 1. They share the available cores; up to four per core or 16.
    """

    def __init__(self, count: int = 2) -> None:
        if count < 1:
            raise ValueError(f"count: expected at least 1 thread, got {count}")
        check_workers("count", count)
        self.count = count
        self._before: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Set the number; here because Lightning sets its own when it launches processes."""
        if self._before is None:
            self._before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the former number."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the former number; Lightning calls no teardown then."""
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            torch.set_num_threads(self._before)
            self._before = None
