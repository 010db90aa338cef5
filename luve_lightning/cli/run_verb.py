"""Finds a verb, composes its configuration and runs it, or only checks it; silences notices nobody can act on."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luve_lightning.cli import SYNONYMS, examples_of, function_name, verbs
from luve_lightning.cli.errors import UsageError, describe_runtime_error, did_you_mean

if TYPE_CHECKING:
    from luve_lightning.cli.keys import Keys

# Keys that Lightning's own documentation spells differently.
_MOVED = {
    "trainer.callbacks": "callbacks is a dictionary by name at the top level: callbacks.NAME.class_path",
    "trainer.logger": "loggers is a dictionary by name at the top level: loggers.NAME.class_path",
}

# Loading a model takes a second or minutes: tqdm's bars appear when it takes longer than this.
_BAR_AFTER_SECONDS = "10"
_MESSAGES = (
    "💡 Tip:",
    # What the configuration says, in other words.
    "`Trainer(limit_",
    "`Trainer(val_check_interval=",
    # Advice: TF32 is faster, and gives other numbers.
    "You are using a CUDA device (",
    # `luve` says these in the lines at the beginning and end of a run (callbacks/training_run.py).
    "Seed set to",
    "GPU available:",
    "TPU available:",
    "LOCAL_RANK:",
    "Using bfloat16 Automatic Mixed Precision",
    "Using 16bit Automatic Mixed Precision",
    "`Trainer.fit` stopped:",
    "Restoring states from the checkpoint",
    "Restored all states from the checkpoint",
    "Loaded model weights from the checkpoint",
    "Loading `train_dataloader` to estimate",
    "Initializing distributed: GLOBAL_RANK:",
    f"{'-' * 100}\ndistributed_backend=",
)
_WARNINGS = (
    # The same advice, from the compiler.
    "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled",
    # Lightning 2.6 still calls PyTorch's pytree as before 2.12.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # Lightning cannot know that the batch samplers of ResumableDataModule start where the checkpoint stopped.
    "You're resuming from a checkpoint that ended before the epoch ended",
    # They are moved when training starts; see training.py.
    "Checkpoint directory .* exists and is not empty",
    # Frozen parts (a LatentSpace) stay in eval mode by design.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # Steps are logged by their number in the run, however long an epoch is.
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # `num_workers` is each experiment's own choice: most keep their latents in memory.
    ".*does not have many workers which may be a bottleneck",
)
_LOGGERS = tuple(
    f"lightning.{name}"
    for name in (
        "pytorch.utilities.rank_zero",
        "pytorch.accelerators.cuda",
        "fabric.utilities.rank_zero",
        "fabric.utilities.seed",
        "fabric.utilities.distributed",
    )
)
_RANK = re.compile(r"\[rank: \d+\] ")


def split_verb(words: Sequence[str]) -> tuple[str, list[str]]:
    """The verb, of one word or two (`study build`), and the words after it."""
    two = " ".join(words[:2])
    return (two, list(words[2:])) if two in verbs() else (words[0], list(words[1:]))


def run_verb(verb: str, words: list[str], config: dict[str, Any]) -> None:
    """Composes the configuration into `config` and passes it to the verb.

    Raises:
        UsageError: no such verb, or a configuration that does not fit it.
    """
    if verb not in verbs():
        _refuse_verb(verb)
    from luve_lightning.cli import compose
    from luve_lightning.cli.keys import Keys

    entry = verbs()[verb]
    arguments = compose.read_arguments(words, entry.positional)
    options = compose.named_options(arguments.options, entry.named)
    kind = given_kind(verb, arguments.files, options)
    if not arguments.help:
        keys = Keys(verb, kind)
        config.update(compose.compose(arguments.files, options, keys))
        if reads := kind or entry.reads:
            # What is given to a command of that kind may be given here; words of the verb's own are more likely slips.
            given = () if kind else {key.partition(".")[0] for key, _ in options}
            _skip_keys(config, keys, Keys(reads), given)
        if not arguments.class_help:
            _refuse_early(verb, keys, config, bool(arguments.files))
    _say_loading(verb)
    if arguments.class_help:
        from luve_lightning.cli.parsing import print_class_help

        print_class_help(verb, *arguments.class_help, config)
        return
    quieten()
    with _nothing_collected():
        module = importlib.import_module(entry.module)
    if entry.trainer:
        module.run(verb, arguments, config, ["luve", verb, *words])
    else:
        from luve_lightning.cli import parsing

        parts = {
            f"--subject {name}": importlib.import_module(subject).measure
            for name, subject in entry.modules().items()
            if arguments.help or name == config["subject"]
        }
        function = getattr(module, function_name(f"{verb} {kind}".rstrip()))
        parsing.run_function(verb, function, arguments, config, parts)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Switches garbage collection off: what is imported stays, and looking through it takes a fifth of the import."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def given_kind(verb: str, files: Iterable[Path], options: Iterable[tuple[str, str]]) -> str:
    """Which of a verb's kinds files and options are; empty for the verb's own."""
    if not verbs()[verb].kinds:
        return ""
    from luve_lightning.cli.keys import kind_of
    from luve_lightning.config_files import read_config

    given: dict[str, Any] = {key.partition(".")[0]: text for key, text in options}
    for file in files:
        given |= read_config(file)
    return kind_of(verb, given)


def _refuse_verb(verb: str) -> None:
    longer = [f"luve {name}" for name in verbs() if name.startswith(f"{verb} ")]
    if longer:
        raise UsageError(f"expected {' or '.join(longer)}")
    if verb in SYNONYMS:
        raise UsageError(f"no such verb; did you mean {SYNONYMS[verb]!r}?")
    raise UsageError(f"no such verb{did_you_mean(verb, {name.partition(' ')[0] for name in verbs()})}")


def _skip_keys(config: dict[str, Any], own: Keys, other: Keys, given: Collection[str]) -> None:
    """Removes keys of another verb's configuration files; on the command line, in `given`, they stay unknown."""
    for key in list(config):
        if own.root.get(key) is None and other.root.get(key) is not None and key not in given:
            del config[key]


def _refuse_early(verb: str, keys: Keys, config: Mapping[str, Any], from_file: bool) -> None:
    """Refuses what the source alone shows to be wrong, before PyTorch is imported, which takes seconds.

    Raises:
        UsageError: On an unknown key, or a missing required one.
    """
    for leaf in keys.leaves(config):
        if leaf.known is None or "." in str(leaf.place):
            continue
        if leaf.key in _MOVED:
            raise UsageError(f"{leaf.key}: unknown key; {_MOVED[leaf.key]}")
        hint = did_you_mean(str(leaf.place), leaf.known)
        inside = keys.elsewhere(leaf.key, config) if "." not in leaf.key else []
        if inside and not hint.startswith("; did you mean"):
            hint = f"; did you mean {' or '.join(map(repr, inside))}?"
        raise UsageError(f"{leaf.key}: unknown key{hint}")
    missing = keys.missing(config)
    if missing:
        example = "" if from_file else examples_of(verb)
        raise UsageError(f"{', '.join(missing)}: required, but not given{example}")
    subjects = verbs()[verb].modules()
    if subjects and config["subject"] not in subjects:
        raise UsageError(f"subject: expected one of {', '.join(subjects)}, got {config['subject']!r}")


def _say_loading(verb: str) -> None:
    """A sign of life on a terminal: imports take 5 to 10 seconds, during which nothing else is printed."""
    first = os.environ.get("RANK", "0") == os.environ.get("LOCAL_RANK", "0") == "0"
    if first and verbs()[verb].slow and "torch" not in sys.modules and sys.stderr.isatty():
        print(f"luve {verb}: loading ...", file=sys.stderr, flush=True)


def refusal(words: Sequence[str]) -> str | None:
    """Why a command line would be refused, in one line; None where its configuration fits the verb.

    Nothing is run: the files it reads, and values that only its classes judge, are not checked.
    """
    verb, rest = split_verb(words)
    config: dict[str, Any] = {}
    try:
        with redirect_stdout(StringIO()):
            run_verb(verb, [*rest, "--print_config"], config)
    except Exception as error:
        return describe_runtime_error(error, config) or f"{type(error).__name__}: {error}"
    return None


def quieten() -> None:
    """Called before a verb runs; imports nothing."""
    # tqdm reads it when it is imported. The bars of transformers, diffusers and the hub are tqdm's.
    os.environ.setdefault("TQDM_DELAY", _BAR_AFTER_SECONDS)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_worth_saying)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def quiet_wandb(config: Mapping[str, Any]) -> Iterator[None]:
    """Silences wandb's notices, not its errors, while a training verb's configuration keeps its run on this machine."""
    loggers = [entry for entry in (config.get("loggers") or {}).values() if isinstance(entry, Mapping)]
    ours = [entry for entry in loggers if str(entry.get("class_path")).endswith("WandbLogger")]
    offline = os.environ.get("WANDB_MODE", "online") != "online"
    if not ours or not (offline or all((entry.get("init_args") or {}).get("offline") for entry in ours)):
        yield
        return
    import wandb

    # Lightning asks for the mode in the environment, which is read here already.
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    wandb.setup(settings=wandb.Settings(mode=mode, quiet=True, show_info=False, show_warnings=False))
    try:
        yield
    except BaseException:
        wandb.finish(exit_code=1)
        raise
    wandb.finish()  # Lightning leaves it to wandb's other process, which is not silenced


def _worth_saying(record: logging.LogRecord) -> bool:
    return not _RANK.sub("", record.getMessage(), count=1).startswith(_MESSAGES)
