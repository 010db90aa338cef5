"""What a run leaves in Weights & Biases beside its curves: configuration, code, and models as artifacts."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import yaml
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from luve_lightning.callbacks.checkpoints import Checkpoints
from luve_lightning.callbacks.export import Export
from luve_lightning.callbacks.provenance import Provenance
from luve_lightning.checkout import PACKAGE_ROOT, git_state, run_git

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
                {**_configuration(trainer), "verb": str(TrainerFn(stage).value), "git": revision},
                allow_val_change=True,
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
    return {
        "monitor": saver.monitor,
        "score": float(saver.best_model_score),
        "step": int(named[1]) if named else step,
    }


def _log(run: Any, kind: Kept, files: list[tuple[Path, str]], facts: dict[str, Any], alias: str) -> None:
    """Logs one artifact; its name is the same for every run of a task, so that versions follow each other."""
    import wandb

    artifact = wandb.Artifact(f"{facts['task']}-{kind}", type="model", metadata=facts)
    for path, name in files:
        artifact.add_file(str(path), name=name)
    run.log_artifact(artifact, aliases=["latest", alias])
