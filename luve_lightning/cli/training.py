"""`luve fit|validate|test|predict`: LightningCLI over a composed configuration.

Unlike plain LightningCLI it has one parser for the requested verb, composes files and options first
(cli/compose.py), takes callbacks and loggers as dictionaries by name, and writes provenance to the run folder.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from luve_lightning.callbacks.checkpoint_io import AtomicCheckpointIO, CheckpointError
from luve_lightning.callbacks.progress import TrainingProgress
from luve_lightning.callbacks.provenance import Provenance
from luve_lightning.callbacks.step_times import StepTimes
from luve_lightning.callbacks.stops import StopPredictionOnSigterm, StopRequested
from luve_lightning.callbacks.training_run import (
    RunSummary,
    SetAside,
    is_first_process,
    owned,
    refuse_only_earlier,
    use_one_stream,
)
from luve_lightning.cli import RUNS, Verb
from luve_lightning.cli.compose import Arguments, drop_nulls
from luve_lightning.cli.errors import UsageError
from luve_lightning.cli.keys import MOST, check_limits, check_trainer
from luve_lightning.cli.parsing import check, constructor_errors, dump, make_parser
from luve_lightning.cli.run_verb import quiet_wandb
from luve_lightning.tasks.optimizer_states import check_sharded
from luve_lightning.tasks.watched_steps import Preparing
from luve_lightning.terminal import Phases

VERBS = {
    "fit": Verb("Training", "train a model, or resume with --ckpt_path last", examples=RUNS, trainer=True),
    "validate": Verb("Training", "measure a model on the validation split", examples=RUNS, trainer=True),
    "test": Verb("Training", "measure a model on the test split", examples=RUNS, trainer=True),
    "predict": Verb("Training", "run a model over a split and write its output", examples=RUNS, trainer=True),
}


NAMED_COMPONENTS = {"callbacks": Callback, "loggers": Logger}
Purpose = Literal["run", "check", "help"]

_DESCRIPTIONS = {
    "fit": "Train a model. The run folder is trainer.default_root_dir; `--ckpt_path last` resumes from it.",
    "validate": "Measure a model on the validation split.",
    "test": "Measure a model on the test split.",
    "predict": "Run a model over the predict split; a callback writes its output.",
}
_HELP: dict[str, Any] = {
    "metavar": "CLASS",
    "help": "Import path of a subclass of %(baseclass_name)s; its arguments follow as --KEY.ARGUMENT value.",
}
_CHECKPOINT_HELP = (
    "Checkpoint to resume from: a path, or `last` for the newest one in the run folder, if any.",
    "Checkpoint to load: a path, or the run folder's `last` (the newest) or `best` (which validation chose).",
)
_GROUPS = {
    "model": "model, a LightningModule",
    "data": "data, a LightningDataModule",
    "callbacks.NAME": "callbacks, by names of your choice; --callbacks.NAME null disables one",
    "loggers.NAME": "loggers, by names of your choice; --loggers.NAME null disables one",
}


def run(verb: str, arguments: Arguments, config: dict[str, Any], command: Sequence[str]) -> None:
    """Runs one of the Trainer's verbs.

    Args:
        verb: `fit`, `validate`, `test` or `predict`.
        arguments: The words after the verb, for help and `--print_config`.
        config: The composed configuration, interpolations resolved.
        command: The command line as typed, for provenance.

    Raises:
        UsageError: When the configuration does not fit the signatures or a component refuses its values.
        SystemExit: After printing a help text.
    """
    purpose: Purpose = "help" if arguments.help else "check" if arguments.print_config else "run"
    if purpose != "run":
        print(LuveCLI(verb, config, command=command, purpose=purpose).dump(), end="")
        return
    with ExitStack() as held, quiet_wandb(config):
        LuveCLI(verb, config, command=command, purpose=purpose, held=held).run_verb()


def keep_whole_numbers(checked: Namespace, given: Mapping[str, Any]) -> None:
    """Undo a conversion of whole numbers: to Lightning 1 is a batch and 1.0 are all of them.

    Whether `int | float` tries int or float first depends on what other packages have imported: Python keeps one of the
    two types, which are equal, for both.
    """
    for key, value in given.items():
        if type(value) is int and type(checked.get(key)) is float:
            checked[key] = value


class LuveCLI(LightningCLI):
    """LightningCLI for one verb over one composed configuration; see `run`.

    Args:
        purpose: `check` stops after checking the configuration against the signatures; `help` prints the options
            and raises SystemExit.
        held: Releases the run's folder.
    """

    def __init__(
        self,
        verb: str,
        config: dict[str, Any],
        *,
        command: Sequence[str] = (),
        purpose: Purpose = "run",
        held: ExitStack | None = None,
    ) -> None:
        self.held = held or ExitStack()
        self.verb = verb
        self.composed = drop_nulls(config, NAMED_COMPONENTS)
        # `--callbacks.progress null` means no bar, not even Lightning's own.
        self.bar_is_off = (config.get("callbacks") or {}).get("progress", ...) is None
        self.command = list(command)
        self.purpose = purpose
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=None,  # Provenance writes the configuration
            trainer_defaults={"default_root_dir": "runs/unnamed"},
            subclass_mode_model=True,
            subclass_mode_data=True,
            run=False,  # subcommands would build four parsers for one verb
            auto_configure_optimizers=False,  # tasks configure their own optimizers
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Makes the verb's parser."""
        return make_parser(self.verb, _DESCRIPTIONS[self.verb], LightningArgumentParser)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the seed."""
        parser.add_argument(
            "--seed_everything", type=int, default=0, help="Seed of every random choice; 0 is one like any other."
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds model, data, and the Trainer without its callback and logger lists."""
        parser.add_subclass_arguments(LightningModule, "model", fail_untyped=False, required=True, **_HELP)
        parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False, required=True, **_HELP)
        parser.add_class_arguments(
            Trainer, "trainer", instantiate=False, fail_untyped=False, skip={"callbacks", "logger"}
        )
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds one argument for each named callback and logger, and the Trainer method's own options."""
        for key, kind in NAMED_COMPONENTS.items():
            for name in ["NAME"] if self.purpose == "help" else self.composed.get(key, {}):
                parser.add_subclass_arguments(kind, f"{key}.{name}", **_HELP)
        parser.add_argument("--ckpt_path", type=str | None, default=None, help=_CHECKPOINT_HELP[self.verb != "fit"])
        # A checkpoint that holds code is refused; no option runs it.
        skip: set[str | int] = {*self.subcommands()[self.verb], "ckpt_path", "weights_only"}
        self.method_options = ["ckpt_path", *parser.add_method_arguments(Trainer, self.verb, skip=skip)]
        if self.verb == "predict":
            parser.set_defaults({"return_predictions": False})  # a callback writes them; a split may not fit

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Checks the composed configuration instead of reading `sys.argv`."""
        if self.purpose == "help":
            _shorten(parser)
            parser.print_help()
            raise SystemExit(0)
        self.config = check(parser, self.composed)
        keep_whole_numbers(self.config["trainer"], self.composed.get("trainer") or {})

    def _set_seed(self) -> None:
        seed = self.config["seed_everything"]
        if seed is None or seed < 0:
            got = "null" if seed is None else seed
            raise UsageError(f"seed_everything: expected 0 to {MOST['seed_everything']}, got {got}")
        if self.purpose == "run":
            check_limits({"seed_everything": seed})
            super()._set_seed()

    def instantiate_classes(self) -> None:
        """Instantiates data, model and trainer, unless only a check was asked for."""
        if self.purpose != "run":
            return
        self._check_checkpoint_path()
        check_limits(self.config.as_dict())
        with constructor_errors(self.composed):
            check_trainer(self.config["trainer"].as_dict())
        if self.verb == "fit":  # the others only read what a run keeps there
            root = Path(self.config["trainer"]["default_root_dir"] or ".").expanduser()
            self.held.enter_context(owned(root))
        phases = Phases(self._tell)
        phases.begin("loading the model")
        try:
            with constructor_errors(self.composed):
                self.config_init = self.parser.instantiate(self.config)
                self.datamodule, self.model = self.config_init["data"], self.config_init["model"]
                self.trainer = self.instantiate_trainer()
        finally:
            phases.end()
        trainer: Any = self.trainer  # its type does not declare `profiler`
        self.phases, self.preparing = phases, None
        if type(trainer.profiler) is PassThroughProfiler:  # none was configured
            trainer.profiler = self.preparing = Preparing(trainer, phases)
        self._refuse_processes_apart()

    def _tell(self, what: str) -> None:
        """A line on standard error, by the first process."""
        if is_first_process():
            print(f"luve {self.verb}: {what}", file=sys.stderr, flush=True)

    def _refuse_processes_apart(self) -> None:
        """Refuses to be one of several processes unknown to the Trainer: all would write the run's files."""
        rank = getattr(rank_zero_only, "rank", 0)
        if self.trainer.world_size == 1 and rank:
            raise UsageError(
                f"trainer.devices: this is process {rank} of several (torchrun or srun started it), and the run is of "
                "one: each would run alone and write the same files; give as many trainer.devices, or start one process"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Makes the trainer with the named callbacks and loggers, and those that every run has."""
        named = {key: {n: self.config_init[key][n] for n in self.composed.get(key, {})} for key in NAMED_COMPONENTS}
        own: list[Callback] = [Provenance(self.verb, self.dump(), self.command)]
        own.append(StepTimes() if self.verb == "fit" else StopPredictionOnSigterm())
        self.summary = RunSummary(self.verb, named["callbacks"], self.command, self.config["seed_everything"])
        options = {**self.config_init["trainer"].as_dict(), **kwargs}
        # RunSummary replaces Lightning's summary.
        options["enable_model_summary"] = bool(options["enable_model_summary"])
        callbacks = [*named["callbacks"].values(), *own, self.summary]
        bars = [callback for callback in callbacks if isinstance(callback, ProgressBar)]
        if options["enable_progress_bar"] is False or self.bar_is_off:
            options["enable_progress_bar"] = False  # Lightning accepts no second bar
            callbacks = [callback for callback in callbacks if callback not in bars]
        elif not bars:
            callbacks.append(TrainingProgress())
        trainer = Trainer(**options, callbacks=callbacks, logger=list(named["loggers"].values()) or False)
        use_one_stream(trainer.strategy)
        check_sharded(trainer.strategy)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # none was configured
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def dump(self, escape: bool = True) -> str:
        """The complete configuration as YAML, defaults included; `--config` reads it back when it is escaped."""
        return dump(self.parser, self.config, escape)

    def run_verb(self) -> None:
        """Calls the Trainer's method."""
        if self.config["ckpt_path"] == "last" and self.verb != "fit":
            self._require_last_checkpoint()
        folder = Path(self.trainer.default_root_dir) / "checkpoints"
        if self.verb == "fit":
            self._own_checkpoint_folders()
        if self.verb == "fit" and self.config["ckpt_path"] == "last":
            refuse_only_earlier(folder)
        elif self.verb == "fit" and not _is_within(self.config["ckpt_path"], folder):
            # First: Checkpoints may write as soon as training starts.
            self.trainer.callbacks.insert(0, SetAside(folder))  # type: ignore[attr-defined]
        options = {name: self.config_init[name] for name in self.method_options}
        if options["ckpt_path"] == "best":
            options["ckpt_path"] = self._best_checkpoint(folder)
        refused: CheckpointError | None = None
        try:
            if self.preparing is not None:
                self.preparing.begin()
            getattr(self.trainer, self.verb)(model=self.model, datamodule=self.datamodule, **options)
        except CheckpointError as error:
            self._end_other_processes(signal.SIGKILL)  # they wait for this one and react to nothing else
            refused = error
        except StopRequested:
            self.summary.closing(self.trainer, stopped=True)
            raise
        except SystemExit:
            if self.verb != "fit":
                self._end_other_processes(signal.SIGTERM)
            raise
        finally:
            self.phases.end()
        if refused is not None:
            # It names the file, which is no key's fault, and says more than the system's error behind it.
            raise UsageError(str(refused))
        self.summary.closing(self.trainer)

    def _end_other_processes(self, number: int) -> None:
        """Ends the processes that Lightning started for this run."""
        launcher: Any = self.trainer.strategy.launcher
        if hasattr(launcher, "kill"):
            launcher.kill(number)

    def _own_checkpoint_folders(self) -> None:
        """Holds the folders of checkpoints that lie outside the run folder."""
        root = Path(self.trainer.default_root_dir).resolve()
        savers = [saver for saver in self.trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
        for folder in {Path(saver.dirpath).resolve() for saver in savers if saver.dirpath}:
            if not folder.is_relative_to(root):
                self.held.enter_context(owned(folder, "checkpoint folder"))

    def _dump_config(self) -> None:
        """Gives LightningCLI the plain values that `save_hyperparameters` stores in a checkpoint."""
        if not hasattr(self, "config_dump"):  # asked for by the model and by the data
            self.config_dump = yaml.load(self.dump(escape=False), getattr(yaml, "CSafeLoader", yaml.SafeLoader))

    def _check_checkpoint_path(self) -> None:
        """Refuses a missing file before anything is loaded."""
        path = self.config["ckpt_path"]
        if path == "best" and self.verb == "fit":
            raise UsageError("ckpt_path: fit resumes a run where it stopped; expected a checkpoint's path or 'last'")
        if path not in (None, "last", "best") and not Path(path).exists():
            raise UsageError(f"ckpt_path: no such file: {path}; expected a checkpoint's path, 'last' or 'best'")

    def _best_checkpoint(self, folder: Path) -> str:
        """The run's checkpoint that validation chose; Lightning knows it only in the process that trained."""
        found = sorted(folder.glob("best-*.ckpt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UsageError(f"ckpt_path: no best checkpoint in {folder}: none was validated; try 'last'")
        return str(found[-1])

    def _require_last_checkpoint(self) -> None:
        """Refuses to measure random weights: Lightning only warns when there is no last checkpoint."""
        savers = [saver for saver in self.trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
        if not any(saver._find_last_checkpoints(self.trainer) for saver in savers):
            folders = ", ".join(str(saver.dirpath) for saver in savers if saver.dirpath)
            raise UsageError(f"ckpt_path: no last checkpoint in {folders or self.trainer.default_root_dir}")


def _is_within(checkpoint: str | None, folder: Path) -> bool:
    return checkpoint is not None and Path(checkpoint).resolve().is_relative_to(folder.resolve())


def _shorten(parser: LightningArgumentParser) -> None:
    """Names the groups of the help text, and replaces the Trainer's 250 lines by one."""
    groups = parser.groups or {}
    for key, title in _GROUPS.items():
        groups[key].title = title
    parser._action_groups.remove(groups["trainer"])  # type: ignore[attr-defined]
    parser.add_argument_group(
        "trainer, Lightning's Trainer",
        "--trainer.max_steps, --trainer.devices, --trainer.precision, --trainer.default_root_dir (the run folder) "
        "and others: --trainer.help lists them.",
    )
