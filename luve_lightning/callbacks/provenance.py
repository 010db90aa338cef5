"""Writes what is needed to repeat a run into its folder."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from luve_lightning.callbacks.random_state import RandomState
from luve_lightning.checkout import PACKAGE_ROOT, git_state
from luve_lightning.files import write_text
from luve_lightning.tasks.base import TrainingTask
from luve_lightning.tasks.resume import Change, say


class Provenance(Callback):
    """Writes `config.yaml` and `provenance.json` into `trainer.default_root_dir` before the first step.

    A later run in the same folder (a resume, a test) adds `config-2.yaml` and `provenance-2.json`, and so on;
    nothing is overwritten. Only rank zero writes, and nothing under `fast_dev_run`.

    `provenance.json` holds the verb, the command line, the start (UTC), the git revision and whether tracked files
    differ from it, the Python and package versions, the device, the number of processes, and the data's
    `manifest_hash()` if the datamodule has one.

    Checkpoints hold the configuration, too: a resumed run says which of its values differ.

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
        """Writes both files; the datamodule is set up by now."""
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.write(Path(trainer.default_root_dir), self.describe(trainer))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the configuration, so that a resumed run can compare its own."""
        checkpoint["configuration"] = self.config

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Says what a resumed run does differently, and refuses what it cannot do.

        Raises:
            ValueError: For a value that cannot change after a run's start.
        """
        if trainer.state.fn != "fit" or "configuration" not in checkpoint:
            return
        before, now = yaml.safe_load(checkpoint["configuration"]), yaml.safe_load(self.config)
        changes = configuration_changes(before, now)
        if "seed_everything" in changes and any(isinstance(c, RandomState) for c in trainer.callbacks):  # type: ignore[attr-defined]
            new, old = changes["seed_everything"]
            raise ValueError(
                f"seed_everything: the checkpoint's random numbers go on from seed {old}, got {new}: resume with "
                f"{old}, or switch the RandomState callback off"
            )
        start = "model.init_args.init_from"
        if changes.get(start, (None, None))[0] is not None:
            new, old = changes[start]
            raise ValueError(
                f"{start}: the weights are the checkpoint's, those of {new} would not be used (it started from {old}): "
                "resume with null, or start a new run"
            )
        say({key: change for key, change in changes.items() if not _told_by(pl_module, key)})

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
                target.touch(exist_ok=False)  # claims the number, also against other processes
                break
            except FileExistsError:
                number += 1
        config = folder / f"config{suffix}.yaml"
        write_text(config, self.config)
        write_text(target, json.dumps({**provenance, "config": config.name}, indent=2) + "\n")
        return target


def configuration_changes(before: Any, now: Any) -> dict[str, Change]:
    """The dotted keys in which two configurations differ, each with the values of `now` and `before`.

    Paths inside a run folder that has moved do not count as changed.
    """
    folders = [str(values.get("trainer", {}).get("default_root_dir")) for values in (before, now)]
    return {
        key: (new, old)
        for key, new, old in _differences(before, now, "")
        if key not in ("ckpt_path", "trainer.default_root_dir")
        and not (isinstance(old, str) and old.replace(folders[0], folders[1]) == new)
    }


def _differences(before: Any, now: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield key, now, before


def _told_by(module: LightningModule, key: str) -> bool:
    """Whether the task itself reports that this value changed."""
    group, _, name = key.rpartition(".")
    own = group == "model.init_args" and name in ("lr", "min_lr", "weight_decay", "warmup_steps")
    return isinstance(module, TrainingTask) and (own or key in ("trainer.max_steps", "trainer.max_epochs"))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
