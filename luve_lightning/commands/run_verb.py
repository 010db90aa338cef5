"""Finds a verb, composes its configuration and runs it, or only checks it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from luve_lightning.commands import VERBS


def split_verb(words: Sequence[str]) -> tuple[str, list[str]]:
    """The verb, of one word or of two (`study build`), and the words after it."""
    two = " ".join(words[:2])
    return (two, list(words[2:])) if two in VERBS else (words[0], list(words[1:]))


def run_verb(verb: str, words: list[str], config: dict[str, Any]) -> None:
    """Composes the configuration into `config` and hands it to the verb.

    Raises:
        UsageError: no such verb, or a configuration that does not fit it.
    """
    from luve_lightning.commands.errors import UsageError, did_you_mean

    if verb not in VERBS:
        longer = [f"luve {name}" for name in VERBS if name.startswith(f"{verb} ")]
        raise UsageError(
            f"expected {' or '.join(longer)}" if longer else f"no such verb{did_you_mean(verb, VERBS)}"
        )
    from luve_lightning.commands import compose, help, parsing

    entry = VERBS[verb]
    arguments = compose.read_arguments(words, entry.positional)
    if arguments.class_help:
        help.print_class_help(verb, *arguments.class_help)
        return
    if not arguments.help:
        options = compose.named_options(arguments.options, entry.named)
        config.update(compose.compose(arguments.files, options))
    module = importlib.import_module(entry.module)
    if entry.function is None:
        module.run(verb, arguments, config, ["luve", verb, *words])
    else:
        parsing.run_function(verb, getattr(module, entry.function), arguments, config)


def refusal(words: Sequence[str]) -> str | None:
    """What a command line would be refused with, in one line; None where its configuration fits the verb.

    Nothing is run: files that it reads, and values that only its classes judge, are not looked at.
    """
    from luve_lightning.commands.errors import describe_runtime_error

    verb, rest = split_verb(words)
    config: dict[str, Any] = {}
    try:
        with redirect_stdout(StringIO()):
            run_verb(verb, [*rest, "--print_config"], config)
    except Exception as error:
        return describe_runtime_error(error, config) or f"{type(error).__name__}: {error}"
    return None
