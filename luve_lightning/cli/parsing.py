"""Checks a configuration against signatures and runs the verbs that are plain functions; short help and completion."""

from __future__ import annotations

import argparse
import importlib
import re
import textwrap
from argparse import Action
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import shtab
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace

from luve_lightning.cli import Verb, verbs
from luve_lightning.cli.compose import Arguments, StandIns, escaped, map_leaves
from luve_lightning.cli.errors import UsageError, components, describe_constructor_error, did_you_mean, one_line
from luve_lightning.cli.keys import (
    TRAINER,
    Keys,
    Text,
    Verbatim,
    check_groups,
    check_limits,
    check_nulls,
    import_class,
    spread_options,
)
from luve_lightning.cli.signatures import SPREAD
from luve_lightning.config_files import MOVED

VERBS = {
    "completion": Verb(
        "Shell", "print a script that completes verbs and keys in bash or zsh", positional="shell", slow=False
    )
}

_EVERY = {"config": "YAML file", "print_config": "print the configuration and stop", "debug": "show tracebacks"}

_SUBCLASSES = re.compile(r", known subclasses: .*(?=\)$)", re.DOTALL)
_CLASS = re.compile(r"<class '(?:[\w.]*\.)?(\w+)'>")

Parser = TypeVar("Parser", bound=ArgumentParser)

_LONGEST = 1000  # characters of a message from jsonargparse, which may end in a whole component
_NO_NUMBERS = {f"{sign}{name}" for sign in ("", "+", "-") for name in ("nan", "inf", "infinity")}  # text in YAML
_IN_WORDS = {int: "a whole number", float: "a number", NoneType: "null"}
_NUMBER = re.compile(r"[-+\d._eE]+")  # also one that YAML takes for text, as it does 1e3


def make_parser(verb: str, description: str, kind: type[Parser]) -> Parser:
    """The parser of a verb: its help text, and errors raised instead of printed."""
    parser = kind(
        prog=f"luve {verb}",
        usage=usage(verb),
        description=description,
        epilog="--print_config prints the complete configuration and stops; --debug shows the traceback of an error.",
        formatter_class=HelpFormatter,
        exit_on_error=False,
        print_config=None,  # composition handles it
        # Not "omegaconf+", with which jsonargparse resolves interpolations itself: it would do so in prompts, too,
        # turn the text 1e3 into a number, let ??? pass, and could report nothing before all classes are imported.
        # Keeping it from the first two takes more code than resolving takes in compose.py.
        parser_mode="yaml",
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file; repeat it, a later file holds only its differences."
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
    known: set[str | int] = {SPREAD} if spread else set()
    known |= set(parser.add_function_arguments(function, as_group=False, skip=known))
    if spread:
        parser.add_class_arguments(spread, as_group=False)
    for title, part in parts.items():
        group = parser.add_argument_group(title, (part.__doc__ or "").strip().partition("\n")[0])
        known |= set(group.add_function_arguments(part, as_group=False, skip=known))
    if arguments.help:
        for action in parser._actions:  # jsonargparse also names files that list paths, twice
            if "LIST_OF_PATHS" in str(action.metavar):
                action.metavar = "[PATH,...]"
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


def check(parser: ArgumentParser, config: Mapping[str, Any], function: Callable[..., Any] | None = None) -> Namespace:
    """Checks a composed configuration and fills in defaults; its top level may hold a function's parameters.

    Raises:
        UsageError: On an unknown key, a wrong type, null where it is no value, or a class that cannot be imported.
    """
    if function is not None:
        check_groups(config, function)
    # It reads text as YAML, where `null` and `# 5` would be no text: a word replaces them meanwhile.
    literal = StandIns()
    hidden = literal.hide(config, lambda leaf: isinstance(leaf, Text))
    # YAML's writer knows no other kind of text than str.
    hidden = map_leaves(hidden, lambda leaf: str(leaf) if isinstance(leaf, Verbatim) else leaf)
    try:
        checked = parser.parse_object(deepcopy(hidden))  # it replaces nested values in place
    except Exception as error:
        raise UsageError(literal.show(_misfit(parser, hidden, error, function))) from error
    check_nulls(checked.as_dict(), function)
    return map_leaves(literal.show(checked), lambda leaf: str(leaf) if isinstance(leaf, Text) else leaf)


def dump(parser: ArgumentParser, config: Namespace, escape: bool = True) -> str:
    """A configuration that `parser` checked as YAML, defaults included.

    `--config` reads it back; without `escape`, `${` stays in texts as it is.
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
    """Whether a text's dump reads back as another one, such as `1e3`, or as no text."""
    try:
        float(text)
    except ValueError:
        return not text.isprintable() or "${" in text or text == "???"
    return True


@contextmanager
def constructor_errors(config: Mapping[str, Any]) -> Iterator[None]:
    """Turns a constructor's error into a UsageError; what only a bug raises (KeyError, ...) passes."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        line = describe_constructor_error(error, config)
        if line is None:
            raise
        raise UsageError(line) from error


def _misfit(
    parser: ArgumentParser, config: Mapping[str, Any], error: Exception, function: Callable[..., Any] | None
) -> str:
    """What does not fit, in one line: the innermost component at fault, and jsonargparse's own words.

    Its words are no interface and are not parsed. So that they concern one component and not everything around it,
    each is checked by itself, inner ones first.
    """
    for class_path, key, arguments in reversed(list(components(config))):
        if "." not in class_path:  # jsonargparse knows some classes by their last name
            continue
        try:
            own = ArgumentParser(exit_on_error=False)
            own.add_class_arguments(import_class(class_path), fail_untyped=False)
        except (ImportError, AttributeError, ValueError) as wrong:
            now = f"; it is {MOVED[class_path]} now" if class_path in MOVED else ""
            return f"{key}.class_path: cannot import {class_path!r}: {one_line(wrong)}{now}"
        if unknown := _unknown_key(own, arguments):
            return f"{key}.init_args.{unknown}"
        try:
            own.parse_object(dict(arguments))
        except Exception as wrong:
            inside = _misfit_inside(import_class(class_path).__init__, arguments, f"{key}.init_args.")
            return inside or f"{key}.init_args: {_cut(one_line(wrong))}"
    kinds = [] if function is None else [kind for kind in (function, spread_options(function)) if kind]
    inside = next(filter(None, (_misfit_inside(kind, config, "") for kind in kinds)), None)
    return _unknown_key(parser, config) or inside or _cut(one_line(error))


def _misfit_inside(function: Any, arguments: Mapping[str, Any], prefix: str) -> str | None:
    """What does not fit in a group of keys, or is no number, where jsonargparse would list every type it tried."""
    try:
        types = get_type_hints(function)
    except (NameError, TypeError):  # annotations that cannot be resolved say nothing
        return None
    for name, value in arguments.items():
        choices = list(_choices(types.get(name)))
        groups = [kind for kind in choices if is_dataclass(kind)]
        if isinstance(value, Mapping) and "class_path" not in value and len(groups) == 1:
            own = ArgumentParser(exit_on_error=False)
            own.add_class_arguments(groups[0], fail_untyped=False)
            if unknown := _unknown_key(own, value):
                return f"{prefix}{name}.{unknown}"
            own = ArgumentParser(exit_on_error=False)
            own.add_class_arguments(groups[0], name, fail_untyped=False)
            try:
                own.parse_object({name: dict(value)})
            except Exception as wrong:
                inner = _misfit_inside(groups[0], value, f"{prefix}{name}.")
                return inner or ": ".join(filter(None, (prefix[:-1], _cut(one_line(wrong)))))
        elif isinstance(value, str) and value.lower() in _NO_NUMBERS and float in choices:
            return f"{prefix}{name}: expected a number, got {value}"
        elif isinstance(value, str) and (expected := _none_of(choices, value)):
            return f"{prefix}{name}: expected {expected}, got {value!r}"
    return None


def _none_of(choices: Sequence[Any], word: str) -> str:
    """What a union of words, numbers and null takes, where a word is none of it; empty for other types."""
    words = [name for choice in choices if get_origin(choice) is Literal for name in get_args(choice)]
    kinds = [_IN_WORDS.get(choice) for choice in choices if get_origin(choice) is not Literal]
    if len(choices) < 2 or None in kinds or word in words or _NUMBER.fullmatch(word):
        return ""
    *others, last = [*map(str, words), *map(str, kinds)]
    return f"{', '.join(others)} or {last}"


def _choices(kind: Any) -> Iterator[Any]:
    """The types of a union, or the type itself."""
    if get_origin(kind) in (Union, UnionType):
        for choice in get_args(kind):
            yield from _choices(choice)
    else:
        yield kind


def _unknown_key(parser: ArgumentParser, config: Mapping[str, Any]) -> str | None:
    known = {key.split(".")[0] for key, _ in parser.get_defaults().items()}
    unknown = next((key for key in config if key not in known), None)
    return f"{unknown}: unknown key{did_you_mean(unknown, known)}" if unknown else None


def _cut(text: str) -> str:
    """A message without the end that repeats a large value."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def completion(shell: Literal["bash", "zsh"]) -> None:
    """Prints a script that completes verbs and keys; it runs nothing of LuVe, so a TAB takes no time.

    For bash: luve completion bash > ~/.local/share/bash-completion/completions/luve. For zsh: luve completion zsh >
    DIR/_luve, with DIR in fpath before compinit.

    Args:
        shell: Shell to complete in.
    """
    print(shtab.complete(_completion_parser(), shell=shell))


def _completion_parser() -> argparse.ArgumentParser:
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
