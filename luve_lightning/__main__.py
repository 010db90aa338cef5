"""The `luve` command. `luve --help` lists the verbs, each a module of luve_lightning/cli."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luve_lightning.cli import overview, part_overview, verbs
from luve_lightning.cli.errors import describe_runtime_error
from luve_lightning.cli.run_verb import run_verb, split_verb


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        argv: The words after `luve`; None takes them from the command line.

    Returns:
        The exit code: 0, 1 after a bug, 2 after an error the user can fix, 130 after Ctrl-C, 141 when the reader
        of the output has gone.
    """
    # Before PyTorch is loaded: OpenMP's threads should sleep while they wait for each other. By default they spin,
    # and two of them on two busy cores are up to ten times slower than one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Segments that grow leave no gaps on a GPU: at 4K, decoding failed with 7 GiB lying between its tensors.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    _open_closed_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    texts = words.index("--") if "--" in words else len(words)  # no options follow it
    debug = "--debug" in words[:texts]
    words = [word for word in words[:texts] if word != "--debug"] + words[texts:]
    try:
        Path.cwd()
    except FileNotFoundError:  # Intel's MKL would end the process
        print("luve: error: the current folder no longer exists; change to another one", file=sys.stderr)
        return 2
    try:
        return _dispatch(words, debug)
    except BrokenPipeError:  # `luve fit --help | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell reports for SIGPIPE
    except OSError as error:  # for the overview and the version; a verb reports its own
        print(f"luve: error: standard output cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2


def _open_closed_streams() -> None:
    """Opens the null device for standard streams that are closed (`2>&-`).

    Otherwise the next opened file would get their number, and whatever a library prints there.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))


def _dispatch(words: list[str], debug: bool) -> int:
    """Prints the overview or the version, or runs a verb."""
    if words and words[0] == "help":  # `luve help fit` is `luve fit --help`
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[1:] in (["-h"], ["--help"]) and part_overview(words[0]):
        print(part_overview(words[0]))
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"luve-lightning {version('luve-lightning')}")
        return 0
    verb, rest = split_verb(words)
    return _guarded(verb, rest, debug)


def _guarded(verb: str, words: list[str], debug: bool) -> int:
    """Runs a verb and turns what it raises into a message and an exit code."""
    config: dict[str, Any] = {}
    try:
        run_verb(verb, words, config)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns Ctrl-C into sys.exit(1) after shutting down.
        if type(stop).__name__ == "SIGTERMException":  # Lightning's, whose status would mean success
            return 143
        if told := getattr(stop, "told", ""):  # a StopRequested; the progress bar is gone by now
            sys.stdout.flush()
            print(f"luve {verb}: {told}", file=sys.stderr)
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        hint = "; run the same command again to continue" if verb in verbs() and verbs()[verb].goes_on else ""
        print(f"luve {verb}: interrupted{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        line = describe_runtime_error(error, config)
        if debug or line is None:
            traceback.print_exc()
        if line is None:
            print(f"luve {verb}: internal error: {type(error).__name__}, traceback above", file=sys.stderr)
            return 1
        print(f"luve {verb}: error: {line}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
