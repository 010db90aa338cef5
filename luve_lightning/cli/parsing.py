"""Checks a composed configuration against signatures, runs the verbs that are plain functions, and prints help."""

from __future__ import annotations

import importlib
import re
import textwrap
from argparse import Action
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields
from enum import Enum
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace

from luve_lightning.cli import verbs
from luve_lightning.cli.compose import Arguments, StandIns, escaped, map_leaves
from luve_lightning.cli.errors import (
    UsageError,
    components,
    describe_constructor_error,
    did_you_mean,
    one_line,
)
from luve_lightning.cli.keys import TRAINER, Text, Verbatim
from luve_lightning.cli.limits import check_groups, check_limits, check_nulls, spread_options
from luve_lightning.cli.signatures import SPREAD

Parser = TypeVar("Parser", bound=ArgumentParser)

_LONGEST = 1000  # characters of a message of jsonargparse, which may end in a whole component
_SUBCLASSES = re.compile(r", known subclasses: .*(?=\)$)", re.DOTALL)
_CLASS = re.compile(r"<class '(?:[\w.]*\.)?(\w+)'>")


def make_parser(verb: str, description: str, kind: type[Parser]) -> Parser:
    """Makes the parser of a verb: its help text, and errors raised instead of printed."""
    parser = kind(
        prog=f"luve {verb}",
        usage=usage(verb),
        description=description,
        epilog="--print_config prints the complete configuration and stops; --debug shows the traceback of an error.",
        formatter_class=HelpFormatter,
        exit_on_error=False,
        print_config=None,  # composition handles it
        # Not "omegaconf+", with which jsonargparse resolves interpolations itself: it would do so in prompts, too, turn
        # the text 1e3 into a number, let ??? pass, and could say nothing before all classes are imported. Keeping it
        # from the first two takes more code than resolving takes in compose.py.
        parser_mode="yaml",
    )
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help="YAML file; repeat it, a later file holds only its differences.",
    )
    return parser


def run_function(
    verb: str,
    function: Callable[..., Any],
    arguments: Arguments,
    config: Mapping[str, Any],
    parts: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> None:
    """Runs a verb whose options are a function's parameters.

    Args:
        verb: Name of the verb, for messages.
        function: Typed and documented; its docstring is the help text.
        arguments: The words after the verb, for help and `--print_config`.
        config: The composed configuration.
        parts: Functions by a heading, whose parameters are options, too; the verb's function hands them on.

    Raises:
        UsageError: When the configuration does not fit the signature.
    """
    parser = make_parser(verb, (function.__doc__ or "").strip().partition("\n")[0], ArgumentParser)
    spread = spread_options(function)
    known = set(
        parser.add_function_arguments(
            function, as_group=False, sub_configs=True, skip={SPREAD} if spread else None
        )
    )
    if spread:
        parser.add_class_arguments(spread, as_group=False, sub_configs=True)
    for title, part in parts.items():
        group = parser.add_argument_group(title, (part.__doc__ or "").strip().partition("\n")[0])
        known |= set(group.add_function_arguments(part, as_group=False, skip=known))
    if arguments.help:
        parser.print_help()
        return
    checked = check(parser, config, function)
    if arguments.print_config:
        print(dump(parser, checked), end="")
        return
    check_limits(checked.as_dict())
    with constructor_errors(config):
        values = parser.instantiate(checked)
        values.pop("config", None)
        if spread:
            values[SPREAD] = spread(**{field.name: values.pop(field.name) for field in fields(spread)})
    function(**values)


def check(
    parser: ArgumentParser, config: Mapping[str, Any], function: Callable[..., Any] | None = None
) -> Namespace:
    """Checks a composed configuration and fills in defaults.

    Args:
        parser: The verb's.
        config: The composed configuration.
        function: Whose parameters the top level holds, if it is a function's.

    Raises:
        UsageError: On an unknown key, a wrong type, null where it is no value, or a class that cannot be imported.
    """
    if function is not None:
        check_groups(config, function)
    # It reads a text as YAML, so that `null` and `# 5` would be no text at all: a word stands in their place meanwhile.
    literal = StandIns()
    hidden = literal.hide(config, lambda leaf: isinstance(leaf, Text))
    # YAML's writer knows no other kind of text than str.
    hidden = map_leaves(hidden, lambda leaf: str(leaf) if isinstance(leaf, Verbatim) else leaf)
    try:
        checked = parser.parse_object(deepcopy(hidden))  # it replaces nested values in place
    except Exception as error:
        raise UsageError(literal.show(_misfit(parser, hidden, error))) from error
    check_nulls(checked.as_dict(), _import_class, function)
    return map_leaves(literal.show(checked), lambda leaf: str(leaf) if isinstance(leaf, Text) else leaf)


def dump(parser: ArgumentParser, config: Namespace, escape: bool = True) -> str:
    """A checked configuration as YAML, defaults included.

    Args:
        parser: What checked it.
        config: The configuration.
        escape: Whether `--config` is to read it back; False leaves `${` in texts as it is.
    """
    unusual = StandIns()
    hidden = unusual.hide(map_leaves(config, _plain), lambda leaf: type(leaf) is str and _is_unusual(leaf))
    text = str(parser.dump(hidden, skip_unset=False, skip_validation=True))
    for word, value in unusual.texts.items():  # in quotes, in which YAML keeps every character
        shown = escaped(value) if escape else value
        text = text.replace(word, yaml.safe_dump(shown, default_style='"', width=float("inf")).rstrip("\n"))
    return text


def _plain(value: Any) -> Any:
    """A path, or a member of a string enum (some defaults of Lightning's Trainer), as text."""
    if isinstance(value, str) and isinstance(value, Enum):
        return value.name
    return str(value) if isinstance(value, PurePath) else value


def _is_unusual(text: str) -> bool:
    """Whether a text is dumped as something that reads back as another one, such as `1e3`, or as no text."""
    try:
        float(text)
    except ValueError:
        return not text.isprintable() or "${" in text or text == "???"
    return True


@contextmanager
def constructor_errors(config: Mapping[str, Any]) -> Iterator[None]:
    """Turns what a constructor raises into a UsageError; what only a bug raises (KeyError, ...) passes."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        line = describe_constructor_error(error, config)
        if line is None:
            raise
        raise UsageError(line) from error


def _misfit(parser: ArgumentParser, config: Mapping[str, Any], error: Exception) -> str:
    """What does not fit, in one line: the innermost component at fault, and jsonargparse's own words.

    Its words are no interface and are not read. So that they speak of one component and not of all that it is part of,
    each is checked by itself, those inside others first.
    """
    for class_path, key, arguments in reversed(list(components(config))):
        if "." not in class_path:  # jsonargparse knows some classes by their last name
            continue
        try:
            own = ArgumentParser(exit_on_error=False)
            own.add_class_arguments(_import_class(class_path), fail_untyped=False)
        except (ImportError, AttributeError, ValueError) as wrong:
            return f"{key}.class_path: cannot import {class_path!r}: {one_line(wrong)}"
        if unknown := _unknown_key(own, arguments):
            return f"{key}.init_args.{unknown}"
        try:
            own.parse_object(dict(arguments))
        except Exception as wrong:
            return f"{key}.init_args: {_cut(one_line(wrong))}"
    return _unknown_key(parser, config) or _cut(one_line(error))


def _unknown_key(parser: ArgumentParser, config: Mapping[str, Any]) -> str | None:
    known = {key.split(".")[0] for key, _ in parser.get_defaults().items()}
    unknown = next((key for key in config if key not in known), None)
    return f"{unknown}: unknown key{did_you_mean(unknown, known)}" if unknown else None


def _cut(text: str) -> str:
    """A message without the end that repeats a large value."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _import_class(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


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
    """The usage line of a verb; the options are listed below it, not in it."""
    entry = verbs().get(verb)
    first = f"[{entry.positional.upper()}] " if entry and entry.positional else ""
    return f"luve {verb} {first}[--config FILE]... [--key value]..."


def print_class_help(verb: str, key: str, class_path: str, config: Mapping[str, Any]) -> None:
    """Prints the arguments of a class, for `--model.help package.module.Class`.

    Args:
        verb: Name of the verb.
        key: Dotted key at which the class stands.
        class_path: Its import path. Empty: the class that the configuration names there, of the trainer Lightning's.
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
    parser = ArgumentParser(
        prog=f"luve {verb}", usage=usage(verb), formatter_class=HelpFormatter, add_help=False
    )
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
