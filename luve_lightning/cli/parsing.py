"""Checks a composed configuration against signatures and limits, and runs the verbs that are plain functions."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from types import MappingProxyType, NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from luve_lightning.cli.compose import Arguments, StandIns, escaped, map_leaves
from luve_lightning.cli.errors import UsageError, components, describe_constructor_error, did_you_mean, one_line
from luve_lightning.cli.help import HelpFormatter, usage
from luve_lightning.cli.keys import Text, Verbatim
from luve_lightning.cli.signatures import SPREAD
from luve_lightning.machine import check_workers, cores

Parser = TypeVar("Parser", bound=ArgumentParser)

_LONGEST = 1000  # characters of a message from jsonargparse, which may end in a whole component
_NO_NUMBERS = {f"{sign}{name}" for sign in ("", "+", "-") for name in ("nan", "inf", "infinity")}  # text in YAML
_LEAST = {"gradient_clip_val": 0, "log_every_n_steps": 0}
# Far above any real training. Whether a size fits into memory is checked where it is used.
MOST = {
    **dict.fromkeys(("height", "width", "motion_height", "motion_width", "size", "tile", "max_side"), 65_536),
    **dict.fromkeys(("frames", "num_frames", "val_frames", "windows", "passes", "replicates"), 100_000),
    **dict.fromkeys(("frechet_replicates", "videos", "items"), 100_000),
    **dict.fromkeys(("batch_size", "crop", "length"), 65_536),
    **dict.fromkeys(("steps", "skip_steps", "repeats", "raters", "num_nodes", "train", "val", "test"), 10_000),
    "rank": 65_536,
    "fps": 1_000,
    "seed_everything": 2**32 - 1,
    "seed": 2**63 - 1,
}
_PROCESSES = ("num_workers", "processes", "slots")


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
            own.add_class_arguments(_import_class(class_path), fail_untyped=False)
        except (ImportError, AttributeError, ValueError) as wrong:
            return f"{key}.class_path: cannot import {class_path!r}: {one_line(wrong)}"
        if unknown := _unknown_key(own, arguments):
            return f"{key}.init_args.{unknown}"
        try:
            own.parse_object(dict(arguments))
        except Exception as wrong:
            inside = _misfit_inside(_import_class(class_path).__init__, arguments, f"{key}.init_args.")
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
                return ": ".join(filter(None, (prefix[:-1], _cut(one_line(wrong)))))
        elif isinstance(value, str) and value.lower() in _NO_NUMBERS and float in choices:
            return f"{prefix}{name}: expected a number, got {value}"
    return None


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


def _import_class(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def check_limits(config: Mapping[str, Any]) -> None:
    """Refuses a checked configuration with a size that no machine, or not this one, can serve.

    Raises:
        UsageError: Names the key, the limit and the value.
    """
    for key, value in _numbers(config):
        name = key.rpartition(".")[2]
        if value != value:
            raise UsageError(f"{key}: expected a number, got nan")
        if name in _PROCESSES and value > 0:  # each verb checks what is too small itself
            try:
                check_workers(key, int(value))
            except ValueError as error:
                raise UsageError(str(error)) from None
        elif name in MOST and value > MOST[name]:
            raise UsageError(f"{key}: expected at most {MOST[name]}, got {value}")


def _numbers(node: Any, path: str = "") -> Iterator[tuple[str, int | float]]:
    """Dotted key and value of every number; those in a list under the list's key."""
    if isinstance(node, int | float) and not isinstance(node, bool):
        yield path, node
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _numbers(value, path)
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _numbers(value, f"{path}.{key}" if path else str(key))


def spread_options(function: Callable[..., Any]) -> type[Any] | None:
    """The dataclass whose fields are options of a verb themselves: the type of its parameter `options`, if any."""
    kind = get_type_hints(function).get(SPREAD)
    return kind if isinstance(kind, type) and is_dataclass(kind) else None


def check_groups(config: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Refuses a value in place of a group of keys, such as `--guidance 5`, which jsonargparse accepts or garbles.

    Raises:
        UsageError: Names the key.
    """
    types = get_type_hints(function)
    if kind := spread_options(function):
        types |= get_type_hints(kind)
    for key, value in config.items():
        kind = types.get(key)
        choices = (kind, *get_args(kind))
        group = any(map(is_dataclass, choices)) and not any(get_origin(choice) in (list, tuple) for choice in choices)
        if group and value is not None and not isinstance(value, Mapping):
            told = f"expected keys inside, such as --{key}.KEY VALUE, or a file of them, got {value!r}"
            raise UsageError(f"{key}: {told}")


def check_nulls(config: Mapping[str, Any], function: Any = None) -> None:
    """Refuses null for an argument whose type does not include it, in a checked configuration.

    Raises:
        UsageError: Names the key.
    """
    if function is not None:
        _refuse_nulls(config, function, "")
        if kind := spread_options(function):
            _refuse_nulls(config, kind, "")
    for class_path, key, arguments in components(config):
        if None in arguments.values():
            _refuse_nulls(arguments, _import_class(class_path).__init__, f"{key}.init_args.")


def _refuse_nulls(arguments: Mapping[str, Any], function: Any, prefix: str) -> None:
    try:
        types, parameters = get_type_hints(function), inspect.signature(function).parameters
    except (NameError, TypeError, ValueError):  # annotations that cannot be resolved say nothing
        return
    for name, value in arguments.items():
        kind = types.get(name)
        if value is not None or kind is None or name not in parameters or parameters[name].default is None:
            continue
        if not _takes_null(kind):
            raise UsageError(f"{prefix}{name}: expected {getattr(kind, '__name__', kind)}, got null")


def _takes_null(kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(_takes_null(choice) for choice in get_args(kind))
    return kind in (Any, object, NoneType) or (get_origin(kind) is None and not isinstance(kind, type))


def check_trainer(options: Mapping[str, Any]) -> None:
    """Refuses Trainer options that this machine cannot serve, before anything is loaded or started.

    Lightning would start a process for each device first, or say only that there is no GPU. Numbers that it
    accepts but then divides by, or that reverse gradients, are refused, too.

    Raises:
        ValueError: An accelerator that is not here, more devices than there are, or a number that is too small.
    """
    # Imported here: generating, upsampling and measuring do without Lightning, whose import takes two seconds.
    import torch
    from lightning.pytorch.accelerators import AcceleratorRegistry

    for name, least in _LEAST.items():
        value = options.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and not value >= least:
            raise ValueError(f"trainer.{name}: expected at least {least}, got {value}")
    accelerator = str(options.get("accelerator") or "auto")
    if accelerator == "gpu":
        here = torch.cuda.is_available() or torch.backends.mps.is_available()
    elif accelerator in AcceleratorRegistry:
        here = AcceleratorRegistry[accelerator]["accelerator"].is_available()
    else:
        here = True  # auto, or a name that the Trainer refuses with those it knows
    if not here:
        raise ValueError(f"trainer.accelerator: there is no {accelerator} here; expected cpu or auto")
    for key in ("accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch"):
        number = options.get(key)
        if isinstance(number, int | float) and not number > 0:  # Lightning divides by them
            raise ValueError(f"trainer.{key}: expected a number greater than 0, got {number}")
    devices = options.get("devices")
    count = len(devices) if isinstance(devices, list) else devices
    if isinstance(count, str):
        count = int(count) if count.strip().isdecimal() else None  # auto, or GPUs by number such as "0,1"
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        return  # the Trainer judges others
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    most = max(2, cores()) if on_cpu else torch.cuda.device_count() or None
    if most is not None and count > most:
        what = "core(s), and a device of the CPU is a process" if on_cpu else "GPU(s)"
        raise ValueError(f"trainer.devices: this machine has {most} {what}; got {count}")
