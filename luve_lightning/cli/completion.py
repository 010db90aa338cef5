"""`luve completion`: a script with which a shell completes verbs and keys."""

from __future__ import annotations

import argparse
from typing import Literal

import shtab

from luve_lightning.cli import Verb, verbs
from luve_lightning.cli.keys import Keys

VERBS = {
    "completion": Verb(
        "Shell",
        "print a script that completes verbs and keys in bash or zsh",
        positional="shell",
        slow=False,
    ),
}


_EVERY = {
    "config": "YAML file",
    "print_config": "print the configuration and stop",
    "debug": "show tracebacks",
}


def completion(shell: Literal["bash", "zsh"]) -> None:
    """Prints a script that completes verbs and keys; it runs nothing of LuVe, so a TAB takes no time.

    For bash: luve completion bash > ~/.local/share/bash-completion/completions/luve. For zsh: luve completion zsh >
    DIR/_luve, with DIR in fpath before compinit.

    Args:
        shell: Which shell it is for.
    """
    print(shtab.complete(_parser(), shell=shell))


def _parser() -> argparse.ArgumentParser:
    """The verbs and their keys as argparse knows them, read from source."""
    parser = argparse.ArgumentParser(prog="luve")
    parser.add_argument("--version", action="store_true", help="print the version")
    added = parser.add_subparsers()
    parts: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    for name, verb in verbs().items():
        first, _, second = name.partition(" ")
        if second and first not in parts:
            parts[first] = added.add_parser(first, help=f"luve {first} VERB").add_subparsers()
        own = (parts[first] if second else added).add_parser(second or first, help=verb.summary)
        keys = Keys(name)
        names = {key: "" for key in keys.root.parameters if key != "trainer"}
        names |= {f"trainer.{key}": "" for key in (keys.trainer.parameters if keys.trainer else ())}
        for key, text in {**_EVERY, **names}.items():
            argument = own.add_argument(f"--{key}", help=text)
            parameter = keys.root.get(key)
            if key == "config" or (parameter is not None and parameter.is_path):
                argument.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser
