"""What a command runs on: its device and its threads."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from luve_lightning.machine import cores

_LEAST = {"gradient_clip_val": 0, "log_every_n_steps": 0}


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
    # PyTorch names devices that it is built without, and `meta`, which computes nothing.
    if device.type not in ("cpu", "cuda") and not (
        device.type == "mps" and torch.backends.mps.is_available()
    ):
        raise ValueError(f"device: no {name} here; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: no {name} here, PyTorch sees {torch.cuda.device_count()} GPUs")
    return device


def check_trainer(options: Mapping[str, Any]) -> None:
    """Refuses options of Lightning's Trainer that this machine cannot serve, before anything is loaded or started.

    Lightning would start a process for each device first, or say only that there is no GPU. Numbers that it takes and
    then divides by, or turns gradients around with, are refused, too.

    Args:
        options: Arguments of the Trainer.

    Raises:
        ValueError: An accelerator that is not here, more devices than there are, or a number that is too small.
    """
    # Not above: generating, upsampling and measuring do without Lightning, whose import takes two seconds.
    from lightning.pytorch.accelerators import AcceleratorRegistry

    for name, least in _LEAST.items():
        value = options.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and not value >= least:
            raise ValueError(f"trainer.{name}: expected at least {least}, got {value}")
    accelerator = str(options.get("accelerator") or "auto")
    if accelerator == "gpu":
        here = torch.cuda.is_available() or torch.backends.mps.is_available()
    elif accelerator in AcceleratorRegistry:
        here = AcceleratorRegistry[accelerator]["accelerator"].is_available()
    else:
        here = True  # auto, or a name that the Trainer refuses with those it knows
    if not here:
        raise ValueError(f"trainer.accelerator: there is no {accelerator} here; expected cpu or auto")
    for key in ("accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch"):
        number = options.get(key)
        if isinstance(number, int | float) and not number > 0:  # Lightning divides by them
            raise ValueError(f"trainer.{key}: expected a number greater than 0, got {number}")
    devices = options.get("devices")
    count = len(devices) if isinstance(devices, list) else devices
    if isinstance(count, str):
        count = int(count) if count.strip().isdecimal() else None  # auto, or GPUs by number such as "0,1"
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        return  # the Trainer judges those
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    most = max(2, cores()) if on_cpu else torch.cuda.device_count() or None
    if most is not None and count > most:
        what = "core(s), and a device of the CPU is a process" if on_cpu else "GPU(s)"
        raise ValueError(f"trainer.devices: this machine has {most} {what}; got {count}")


_HOST = "https://api.wandb.ai"


def why_no_account() -> str | None:
    """Why nothing can be sent to Weights & Biases, in a few words; None when there is an account.

    Looks at WANDB_MODE and at where `wandb login` and its documentation put a key: WANDB_API_KEY, or the netrc file's
    entry of the host of WANDB_BASE_URL. No key is read out, and nothing is sent.
    """
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return f"WANDB_MODE is {mode}"
    host = urlparse(os.environ.get("WANDB_BASE_URL", _HOST)).hostname or ""
    if os.environ.get("WANDB_API_KEY") or _in_netrc(host):
        return None
    return f"no account: neither WANDB_API_KEY nor a netrc entry of {host}"


def _in_netrc(host: str) -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
