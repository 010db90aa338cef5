"""Short help of single verbs, and `luve completion`, a script that lets a shell complete them."""

from __future__ import annotations

import argparse
import importlib
import re
import textwrap
from argparse import Action
from collections.abc import Mapping
from typing import Any, Literal

import shtab
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from luve_lightning.cli import Verb, verbs
from luve_lightning.cli.errors import UsageError
from luve_lightning.cli.keys import TRAINER, Keys

VERBS = {
    "completion": Verb(
        "Shell", "print a script that completes verbs and keys in bash or zsh", positional="shell", slow=False
    )
}

_EVERY = {"config": "YAML file", "print_config": "print the configuration and stop", "debug": "show tracebacks"}

_SUBCLASSES = re.compile(r", known subclasses: .*(?=\)$)", re.DOTALL)
_CLASS = re.compile(r"<class '(?:[\w.]*\.)?(\w+)'>")


def completion(shell: Literal["bash", "zsh"]) -> None:
    """Prints a script that completes verbs and keys; it runs nothing of LuVe, so a TAB takes no time.

    For bash: luve completion bash > ~/.local/share/bash-completion/completions/luve. For zsh: luve completion zsh >
    DIR/_luve, with DIR in fpath before compinit.

    Args:
        shell: Shell to complete in.
    """
    print(shtab.complete(_parser(), shell=shell))


def _parser() -> argparse.ArgumentParser:
    """The verbs and their keys as an argparse parser, read from source."""
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


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's formatter without lists of every known subclass (900 for an nn.Module)."""

    def _expand_help(self, action: Action) -> str:
        text = str(super()._expand_help(action))
        return _CLASS.sub(r"\1", _SUBCLASSES.sub("", text))

    def _format_action_invocation(self, action: Action) -> str:
        text = str(super()._format_action_invocation(action))
        text = re.sub(r", --[\w.]+\+ \S+", "", text)  # --key+ appends
        width = self._width - self._current_indent
        if len(text) > width:  # many choices
            text = textwrap.fill(text.replace(",", ", "), width, subsequent_indent=" " * 8)
        return text

    def start_section(self, heading: str | None) -> None:
        """Begins a group, its heading wrapped."""
        super().start_section(textwrap.fill(heading, self._width - 1) if heading else heading)

    def _format_action(self, action: Action) -> str:
        nested = action.dest.endswith(".help") and action.dest.startswith("trainer.")
        return "" if nested else str(super()._format_action(action))


def usage(verb: str) -> str:
    """The usage line of a verb; the options are listed below it."""
    entry = verbs().get(verb)
    names = (entry.positional or "").split() if entry else []
    first = "".join(f"[{name.removesuffix('...').upper()}]{'...' * name.endswith('...')} " for name in names)
    return f"luve {verb} {first}[--config FILE]... [--key value]..."


def print_class_help(verb: str, key: str, class_path: str, config: Mapping[str, Any]) -> None:
    """Prints the arguments of a class, for `--model.help package.module.Class`.

    Args:
        verb: Name of the verb.
        key: Dotted key of the class.
        class_path: Its import path. Empty: the class that the configuration names there; for the trainer,
            Lightning's.
        config: The composed configuration.

    Raises:
        UsageError: When the class is not given or cannot be imported.
    """
    class_path = class_path or (TRAINER if key == "trainer" else _configured(key, config))
    module, _, name = class_path.rpartition(".")
    if not module:
        raise UsageError(f"--{key}.help: expected a class such as package.module.Class, got {class_path!r}")
    try:
        component = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--{key}.help: cannot import {class_path!r}: {error}") from error
    parser = ArgumentParser(prog=f"luve {verb}", usage=usage(verb), formatter_class=HelpFormatter, add_help=False)
    skip = {"callbacks", "logger"} if class_path == TRAINER else None  # dictionaries by name, at the top
    parser.add_class_arguments(component, key, fail_untyped=False, as_group=False, skip=skip)
    parser.description = f"{class_path}: {(component.__doc__ or '').strip().partition(chr(10))[0]}"
    parser.print_help()


def _configured(key: str, config: Mapping[str, Any]) -> str:
    """The class path that a configuration has at a key; empty when there is none."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping):
            return ""
        inside = node.get("init_args")
        node = node.get(part, inside.get(part) if isinstance(inside, Mapping) else None)
    return str(node.get("class_path", "")) if isinstance(node, Mapping) else ""
