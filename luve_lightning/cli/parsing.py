"""Checks a composed configuration against signatures, and runs the verbs that are plain functions."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import PurePath
from typing import Any, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from luve_lightning.cli.compose import Arguments, escaped
from luve_lightning.cli.errors import (
    UsageError,
    components,
    describe_constructor_error,
    did_you_mean,
    one_line,
)
from luve_lightning.cli.help import HelpFormatter, usage
from luve_lightning.cli.keys import Text, Verbatim
from luve_lightning.cli.limits import check_groups, check_limits, check_nulls

Parser = TypeVar("Parser", bound=ArgumentParser)

_LONGEST = 1000  # characters of a message of jsonargparse, which may end in a whole component


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
    verb: str, function: Callable[..., Any], arguments: Arguments, config: Mapping[str, Any]
) -> None:
    """Runs a verb whose options are a function's parameters.

    Args:
        verb: Name of the verb, for messages.
        function: Typed and documented; its docstring is the help text.
        arguments: The words after the verb, for help and `--print_config`.
        config: The composed configuration.

    Raises:
        UsageError: When the configuration does not fit the signature.
    """
    parser = make_parser(verb, (function.__doc__ or "").strip().partition("\n")[0], ArgumentParser)
    parser.add_function_arguments(function, as_group=False, sub_configs=True)
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
    kept: dict[str, str] = {}
    if function is not None:
        check_groups(config, function)
    # It reads a text as YAML, so that `null` and `# 5` would be no text at all: a word stands in their place meanwhile.
    hidden = _hide_texts(dict(config), kept, uuid.uuid4().hex)
    try:
        checked = parser.parse_object(deepcopy(hidden))  # it replaces nested values in place
    except Exception as error:
        line = _misfit(hidden, error)
        for word, text in kept.items():
            line = line.replace(word, text)
        raise UsageError(line) from error
    check_nulls(checked.as_dict(), _import_class, function)
    return _show_texts(checked, kept) if kept else checked


def dump(parser: ArgumentParser, config: Namespace, escape: bool = True) -> str:
    """A checked configuration as YAML, defaults included.

    Args:
        parser: What checked it.
        config: The configuration.
        escape: Whether `--config` is to read it back; False leaves `${` in texts as it is.
    """
    kept: dict[str, str] = {}
    hidden = _hide_unusual(config, kept, uuid.uuid4().hex)
    text = str(parser.dump(hidden, skip_unset=False, skip_validation=True))
    for word, value in kept.items():  # in quotes, in which YAML keeps every character
        shown = escaped(value) if escape else value
        text = text.replace(word, yaml.safe_dump(shown, default_style='"', width=float("inf")).rstrip("\n"))
    return text


def _hide_unusual(value: Any, kept: dict[str, str], mark: str) -> Any:
    """Puts a plain word in the place of each text that a dump would not give back as it is."""
    if isinstance(value, Namespace):
        return Namespace(**{key: _hide_unusual(item, kept, mark) for key, item in vars(value).items()})
    if isinstance(value, dict):
        return {key: _hide_unusual(item, kept, mark) for key, item in value.items()}
    if isinstance(value, list):
        return [_hide_unusual(item, kept, mark) for item in value]
    if isinstance(value, PurePath) and "${" in str(value):
        value = str(value)
    if type(value) is not str or not _is_unusual(value):
        return value
    word = f"text-{mark}-{len(kept)}-"
    kept[word] = value
    return word


def _is_unusual(text: str) -> bool:
    """Whether a text is dumped as something that reads back as another one, such as `1e3`, or as no text."""
    try:
        float(text)
    except ValueError:
        return not text.isprintable() or "${" in text or text == "???"
    return True


def _hide_texts(value: Any, kept: dict[str, str], mark: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _hide_texts(item, kept, mark) for key, item in value.items()}
    if isinstance(value, list):
        return [_hide_texts(item, kept, mark) for item in value]
    if not isinstance(value, Text):
        return (
            str(value) if isinstance(value, Verbatim) else value
        )  # YAML's writer knows no other kind of text
    word = f"text-{mark}-{len(kept)}"
    kept[word] = str(value)
    return word


def _show_texts(value: Any, kept: Mapping[str, str]) -> Any:
    if isinstance(value, Namespace):
        return Namespace(**{key: _show_texts(item, kept) for key, item in vars(value).items()})
    if isinstance(value, dict):
        return {key: _show_texts(item, kept) for key, item in value.items()}
    if isinstance(value, list):
        return [_show_texts(item, kept) for item in value]
    return kept.get(value, value) if isinstance(value, str) else value


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


def _misfit(config: Mapping[str, Any], error: Exception) -> str:
    """What does not fit, in one line: the innermost component at fault, and jsonargparse's own words.

    Its words are no interface and are not read. So that they speak of one component and not of all that it is part of,
    each is checked by itself, those inside others first.
    """
    for class_path, key, arguments in reversed(list(components(config))):
        if "." not in class_path:  # jsonargparse knows some classes by their last name
            continue
        try:
            known, parser = _parser_of(class_path)
        except (ImportError, AttributeError, ValueError) as wrong:
            return f"{key}.class_path: cannot import {class_path!r}: {one_line(wrong)}"
        for name in arguments:
            if name not in known:
                return f"{key}.init_args.{name}: unknown key{did_you_mean(name, known)}"
        try:
            parser.parse_object(dict(arguments))
        except Exception as wrong:
            return f"{key}.init_args: {_cut(one_line(wrong))}"
    return _cut(one_line(error))


def _cut(text: str) -> str:
    """A message without the end that repeats a large value."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _import_class(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _parser_of(class_path: str) -> tuple[set[str], ArgumentParser]:
    """The parameters that a class accepts, inherited ones too, and a parser of them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(_import_class(class_path), fail_untyped=False)
    return {key.split(".")[0] for key, _ in parser.get_defaults().items()}, parser
