"""What a command runs on: its device and its threads."""

from __future__ import annotations

import os

import torch


def choose_device(name: str) -> torch.device:
    """The device of an option.

    Args:
        name: auto (a GPU if there is one), cpu, cuda or cuda:N.

    Raises:
        ValueError: something else, or a GPU that is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: no {name} here, PyTorch sees {torch.cuda.device_count()} GPUs")
    return device


def decoding_threads() -> int:
    """As many as this process may use cores, at most 8: more decode faster than anything measures."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)
