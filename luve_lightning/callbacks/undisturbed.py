"""Doing something else in the middle of training without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch

from luve_lightning.callbacks.ema import averaged_weights
from luve_lightning.callbacks.random_state import random_state, set_random_state


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
        "cudnn": {
            name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")
        },
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
