"""Writes what is needed to repeat a run into its folder."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from luve_lightning.checkout import PACKAGE_ROOT, git_state


class Provenance(Callback):
    """Writes `config.yaml` and `provenance.json` into `trainer.default_root_dir` before the first step.

    A later run in the same folder (a resume, a test) adds `config-2.yaml` and `provenance-2.json`, and so on;
    nothing is overwritten. Only rank zero writes. Nothing is written under `fast_dev_run`.

    `provenance.json` holds the verb, the command line, the start (UTC), the git revision and whether tracked files
    differed from it, the Python and package versions, the device, the number of processes, and the data's
    `manifest_hash()` when the datamodule has that method.

    Args:
        verb: The Trainer's method: `fit`, `validate`, `test` or `predict`.
        config: The complete configuration as YAML.
        command: The command line as typed.
    """

    def __init__(self, verb: str, config: str, command: Sequence[str] = ()) -> None:
        self.verb = verb
        self.config = config
        self.command = list(command)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes both files; the datamodule has been set up by now."""
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.write(Path(trainer.default_root_dir), self.describe(trainer))

    def describe(self, trainer: Trainer) -> dict[str, Any]:
        """What `provenance.json` holds, apart from the name of the configuration file."""
        manifest_hash = getattr(trainer.datamodule, "manifest_hash", None)  # type: ignore[attr-defined]
        return {
            "verb": self.verb,
            "command": shlex.join(self.command),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "git": git_state(PACKAGE_ROOT),
            "data_manifest": manifest_hash() if manifest_hash else None,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": _device_name(trainer.strategy.root_device),
            "processes": trainer.world_size,
            "packages": dict(sorted((d.metadata["Name"], d.version) for d in metadata.distributions())),
        }

    def write(self, folder: Path, provenance: dict[str, Any]) -> Path:
        """Writes both files under the first free number.

        Returns:
            The path of the provenance file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            suffix = "" if number == 1 else f"-{number}"
            target = folder / f"provenance{suffix}.json"
            try:
                target.touch(exist_ok=False)  # claims the number, also against another process
                break
            except FileExistsError:
                number += 1
        config = folder / f"config{suffix}.yaml"
        _write_atomically(config, self.config)
        _write_atomically(target, json.dumps({**provenance, "config": config.name}, indent=2) + "\n")
        return target


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _write_atomically(target: Path, text: str) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)
