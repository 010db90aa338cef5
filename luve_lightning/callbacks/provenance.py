"""What a run was made from, recorded in its folder and on Weights & Biases."""

from __future__ import annotations

import json
import platform
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from luve_lightning.callbacks.checkpoints import Checkpoints
from luve_lightning.callbacks.repeatable import RandomState
from luve_lightning.callbacks.weights import Export
from luve_lightning.files import write_text
from luve_lightning.machine import PACKAGE_ROOT
from luve_lightning.revision import git_state, package_versions, run_git
from luve_lightning.tasks.base import Change, TrainingTask, say


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

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the configuration, so that a resumed run can compare its own."""
        checkpoint["configuration"] = self.config

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
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
        device = trainer.strategy.root_device
        manifest_hash = getattr(trainer.datamodule, "manifest_hash", None)  # type: ignore[attr-defined]
        return {
            "verb": self.verb,
            "command": shlex.join(self.command),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "git": git_state(PACKAGE_ROOT),
            "data_manifest": manifest_hash() if manifest_hash else None,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": trainer.world_size,
            "packages": dict(package_versions()),
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


_TOLD_BY_TASKS = ("lr", "min_lr", "weight_decay", "warmup_steps", "decay_steps", "attention", "loss_weight")


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
    *group, name = key.split(".")[:3]
    own = group == ["model", "init_args"] and name in _TOLD_BY_TASKS
    return isinstance(module, TrainingTask) and (own or key in ("trainer.max_steps", "trainer.max_epochs"))


Kept = Literal["checkpoint", "export"]

# The package and, in a checkout, the configurations and the files it was installed with.
CODE = ("luve_lightning/**/*.py", "experiments/**/*.yaml", "pyproject.toml", "constraints.txt")


class WandbRecord(L.Callback):
    """Adds what repeats the run to each WandbLogger; does nothing, silently, in a run without one.

    Works offline: what is logged waits in the run's folder until `wandb sync` (artifacts in wandb's staging
    folder, copied, so that a later run in the same folder does not change them). Groups and tags are the logger's
    own `group` and `tags`.

    When the run starts: the complete configuration (Lightning's own way keeps only the model's and the data's
    arguments, and only of modules that save hyper-parameters), the verb and the git revision as the run's config;
    the package and the experiments as a code artifact, with `revision.txt` and, where tracked files differ from
    it, `diff.patch`. When training ends: `<task>-checkpoint`, the checkpoint that validation chose (the last one
    if none was validated), and `<task>-export`, what `Export` wrote; both with the monitored metric, score, step
    and revision.

    Args:
        artifacts: which of the two to keep; an empty list for models too large to copy.
        code: whether to keep the code.
    """

    def __init__(self, artifacts: Sequence[Kept] = ("checkpoint", "export"), code: bool = True) -> None:
        self.artifacts, self.code = list(artifacts), code

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Configuration and code, on the first process."""
        for run in _runs(trainer):
            revision = git_state(PACKAGE_ROOT)
            run.config.update(
                {**_configuration(trainer), "verb": str(TrainerFn(stage).value), "git": revision}, allow_val_change=True
            )
            if self.code:
                with tempfile.TemporaryDirectory() as folder:
                    copy_code(PACKAGE_ROOT, Path(folder), revision)
                    run.log_code(folder, name="luve-lightning-code", include_fn=lambda path: True)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Models, after every callback's `on_fit_end`; Lightning skips this after an error."""
        if stage != "fit" or not self.artifacts:
            return
        for run in _runs(trainer):
            described = {"git": git_state(PACKAGE_ROOT), "task": type(pl_module).__name__}
            for saver in _callbacks(trainer, Checkpoints) if "checkpoint" in self.artifacts else []:
                _log_checkpoint(run, saver, trainer.global_step, described)
            for export in _callbacks(trainer, Export) if "export" in self.artifacts else []:
                _log_export(run, export, trainer.global_step, described)


def copy_code(root: Path, folder: Path, revision: dict[str, Any] | None) -> None:
    """Copies the files of `CODE` from `root`, with `revision.txt` and `diff.patch` in a git checkout."""
    for file in (file for pattern in CODE for file in root.glob(pattern)):
        target = folder / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    if revision is not None:
        changed = " with the changes of diff.patch" if revision["dirty"] else ""
        (folder / "revision.txt").write_text(f"{revision['revision']}{changed}\n", encoding="utf-8")
    if revision is not None and revision["dirty"]:
        patch = run_git(root, "diff", "HEAD") or ""
        (folder / "diff.patch").write_text(patch + "\n", encoding="utf-8")


def _runs(trainer: L.Trainer) -> Iterator[Any]:
    """The wandb run of each WandbLogger; none outside the first process."""
    if trainer.is_global_zero:
        yield from (logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger))


def _callbacks(trainer: L.Trainer, kind: type[Any]) -> list[Any]:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def _configuration(trainer: L.Trainer) -> dict[str, Any]:
    """The complete configuration, as Provenance writes it into the run folder."""
    found: dict[str, Any] = {}
    for provenance in _callbacks(trainer, Provenance):
        found |= yaml.safe_load(provenance.config)
    return found


def _log_checkpoint(run: Any, saver: Checkpoints, step: int, described: dict[str, Any]) -> None:
    facts = _standing(saver, step)
    path = Path(saver.best_model_path if facts["monitor"] else saver.last_model_path)
    if path.is_file():  # exclude an empty folder, and the shards of a strategy that writes folders
        alias = "best" if facts["monitor"] else "last"
        _log(run, "checkpoint", [(path, path.name)], {**described, **facts}, alias)


def _log_export(run: Any, export: Export, step: int, described: dict[str, Any]) -> None:
    facts = {**_standing(export.chosen, step), "weights": export.weights}
    files = [(path, str(path.relative_to(export.output))) for path in export.written]
    if files:
        _log(run, "export", files, {**described, **facts}, export.weights)


def _standing(saver: Checkpoints | None, step: int) -> dict[str, Any]:
    """Metric, score and step of the checkpoint that validation chose; of the last step if none was validated."""
    if saver is None or saver.monitor is None or saver.best_model_score is None:
        return {"monitor": None, "score": None, "step": step}
    named = re.search(r"step=(\d+)", Path(saver.best_model_path).name)
    return {"monitor": saver.monitor, "score": float(saver.best_model_score), "step": int(named[1]) if named else step}


def _log(run: Any, kind: Kept, files: list[tuple[Path, str]], facts: dict[str, Any], alias: str) -> None:
    """Logs one artifact; its name is the same for every run of a task, so that versions follow each other."""
    import wandb

    artifact = wandb.Artifact(f"{facts['task']}-{kind}", type="model", metadata=facts)
    for path, name in files:
        artifact.add_file(str(path), name=name)
    run.log_artifact(artifact, aliases=["latest", alias])
