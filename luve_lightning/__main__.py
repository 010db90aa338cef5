"""The `luve` command. `luve --help` lists the verbs; commands/__init__.py is the table behind it."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from luve_lightning.commands import VERBS, overview


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        argv: The words after `luve`; None takes them from the command line.

    Returns:
        The exit code: 0, 1 after a bug, 2 after an error the user can mend, 130 after Ctrl-C, 141 when whoever read
        the output has gone.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words, debug)
    except BrokenPipeError:  # `luve fit --help | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell reports for SIGPIPE


def _dispatch(words: list[str], debug: bool) -> int:
    """Prints the overview or the version, or runs a verb."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"luve-lightning {version('luve-lightning')}")
        return 0
    verb, rest = _verb(words)
    return _guarded(verb, rest, debug)


def _verb(words: list[str]) -> tuple[str, list[str]]:
    """The verb, of one word or of two (`study build`), and the words after it."""
    two = " ".join(words[:2])
    return (two, words[2:]) if two in VERBS else (words[0], words[1:])


def _guarded(verb: str, words: list[str], debug: bool) -> int:
    """Runs a verb and turns what it raises into a message and an exit code."""
    config: dict[str, Any] = {}
    try:
        _run(verb, words, config)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns Ctrl-C into sys.exit(1) after shutting down.
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        print(f"luve {verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        from luve_lightning.commands.errors import describe_runtime_error

        line = describe_runtime_error(error, config)
        if debug or line is None:
            traceback.print_exc()
        if line is None:
            print(f"luve {verb}: internal error: {type(error).__name__}, traceback above", file=sys.stderr)
            return 1
        print(f"luve {verb}: error: {line}", file=sys.stderr)
        return 2
    return 0


def _run(verb: str, words: list[str], config: dict[str, Any]) -> None:
    """Composes the configuration into `config` and hands it to the verb."""
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


if __name__ == "__main__":
    sys.exit(main())
