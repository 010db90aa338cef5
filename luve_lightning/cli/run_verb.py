"""Finds a verb, composes its configuration and runs it, or only checks it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any

from luve_lightning.cli import SYNONYMS, examples_of, function_name, verbs

if TYPE_CHECKING:
    from luve_lightning.cli.keys import Keys

# Keys that Lightning's own documentation spells differently.
_MOVED = {
    "trainer.callbacks": "callbacks is a dictionary by name at the top level: callbacks.NAME.class_path",
    "trainer.logger": "loggers is a dictionary by name at the top level: loggers.NAME.class_path",
}


def split_verb(words: Sequence[str]) -> tuple[str, list[str]]:
    """The verb, of one word or of two (`study build`), and the words after it."""
    two = " ".join(words[:2])
    return (two, list(words[2:])) if two in verbs() else (words[0], list(words[1:]))


def run_verb(verb: str, words: list[str], config: dict[str, Any]) -> None:
    """Composes the configuration into `config` and hands it to the verb.

    Raises:
        UsageError: no such verb, or a configuration that does not fit it.
    """
    if verb not in verbs():
        _refuse_verb(verb)
    from luve_lightning.cli import compose
    from luve_lightning.cli.keys import Keys

    entry = verbs()[verb]
    arguments = compose.read_arguments(words, entry.positional)
    if not arguments.help:
        keys = Keys(verb)
        options = compose.named_options(arguments.options, entry.named)
        config.update(compose.compose(arguments.files, options, keys))
        if not arguments.class_help:
            _refuse_early(verb, keys, config, bool(arguments.files))
    _say_loading(verb)
    if arguments.class_help:
        from luve_lightning.cli.parsing import print_class_help

        print_class_help(verb, *arguments.class_help, config)
        return
    from luve_lightning.cli.quiet import quieten

    quieten()
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
        parsing.run_function(verb, getattr(module, function_name(verb)), arguments, config, parts)


def _refuse_verb(verb: str) -> None:
    from luve_lightning.cli.errors import UsageError, did_you_mean

    longer = [f"luve {name}" for name in verbs() if name.startswith(f"{verb} ")]
    if longer:
        raise UsageError(f"expected {' or '.join(longer)}")
    if verb in SYNONYMS:
        raise UsageError(f"no such verb; did you mean {SYNONYMS[verb]!r}?")
    raise UsageError(f"no such verb{did_you_mean(verb, {name.partition(' ')[0] for name in verbs()})}")


def _refuse_early(verb: str, keys: Keys, config: Mapping[str, Any], from_file: bool) -> None:
    """Refuses what the source alone shows to be wrong, before PyTorch is imported, which takes seconds.

    Raises:
        UsageError: On an unknown key, or a required one that is not given.
    """
    from luve_lightning.cli.errors import UsageError, did_you_mean

    for leaf in keys.leaves(config):
        if leaf.known is None or "." in str(leaf.place):
            continue
        if leaf.key in _MOVED:
            raise UsageError(f"{leaf.key}: unknown key; {_MOVED[leaf.key]}")
        hint = did_you_mean(str(leaf.place), leaf.known)
        inside = keys.elsewhere(leaf.key, config) if "." not in leaf.key else []
        if inside and not hint.startswith("; did you mean"):
            hint = f"; did you mean {_either(inside)}?"
        raise UsageError(f"{leaf.key}: unknown key{hint}")
    missing = keys.missing(config)
    if missing:
        example = "" if from_file else examples_of(verb)
        raise UsageError(f"{', '.join(missing)}: required, but not given{example}")
    subjects = verbs()[verb].modules()
    if subjects and config["subject"] not in subjects:
        raise UsageError(f"subject: expected one of {', '.join(subjects)}, got {config['subject']!r}")


def _either(words: Iterable[str]) -> str:
    return " or ".join(repr(word) for word in words)


def _say_loading(verb: str) -> None:
    """A sign of life on a terminal: imports take 5 to 10 seconds, in which nothing else is printed."""
    first = os.environ.get("RANK", "0") == os.environ.get("LOCAL_RANK", "0") == "0"
    if first and verbs()[verb].slow and "torch" not in sys.modules and sys.stderr.isatty():
        print(f"luve {verb}: loading ...", file=sys.stderr, flush=True)


def refusal(words: Sequence[str]) -> str | None:
    """What a command line would be refused with, in one line; None where its configuration fits the verb.

    Nothing is run: files that it reads, and values that only its classes judge, are not looked at.
    """
    from luve_lightning.cli.errors import describe_runtime_error

    verb, rest = split_verb(words)
    config: dict[str, Any] = {}
    try:
        with redirect_stdout(StringIO()):
            run_verb(verb, [*rest, "--print_config"], config)
    except Exception as error:
        return describe_runtime_error(error, config) or f"{type(error).__name__}: {error}"
    return None
