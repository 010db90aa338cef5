"""Composes configuration files and `--key value` options into one plain mapping.

The order is: files in the order given, each over those it extends, then options, then interpolations. So
`${trainer.default_root_dir}` in a base file follows an override in a later file or on the command line, and an option
can reach into a dictionary of components (`--callbacks.checkpoint.save_top_k 3`). jsonargparse then checks the result
against the signatures.

Text that a user writes is data: the value of an option of type `str` is taken literally. `null` stands for null
where the type allows it, but in a prompt it is a word: only a file disables a prompt.
"""

from __future__ import annotations

import argparse
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from luve_lightning.cli.keys import COMPONENT_KEYS, Keys, Text, Verbatim, read_texts
from luve_lightning.cli.signatures import Parameter
from luve_lightning.config_files import SWITCHED_OFF, CompositionError, merge, parse_yaml, read_config

_OPTION = re.compile(r"--[^\s=]+(=|$)")  # a key holds no space, so `--a cat` is a text
_INTERPOLATION = re.compile(r"(\\*)\$\{")
# OmegaConf's words around a resolver's error, such as "Environment variable 'X' not found".
_RAISED = re.compile(r"\w+ raised while resolving interpolation: [\"']?(.*?)[\"']?")
_LISTED = "..."  # after the name of a positional option that is a list
_MISSING = "${oc.decode:\"'???'\"}"  # the text ???, which OmegaConf would read as a missing value


class Flag(str):
    """The value of an option given without one: `--flag` is `--flag true`."""


@dataclass
class Arguments:
    """The words after a verb, sorted.

    Attributes:
        files: Values of `--config`, in order.
        options: `--key value` pairs, in order, values as text.
        help: Whether `--help` was given.
        class_help: `(key, class path)` when `--KEY.help CLASS` was given.
        print_config: Whether `--print_config` was given.
        listed: Words for the positional option that takes any number of them.
    """

    files: list[Path] = field(default_factory=list)
    options: list[tuple[str, str]] = field(default_factory=list)
    help: bool = False
    class_help: tuple[str, str] | None = None
    print_config: bool = False
    listed: list[str] = field(default_factory=list)


def read_arguments(words: Sequence[str], positional: str | None = None) -> Arguments:
    """Sorts the words after a verb into files, options and requests for help.

    Args:
        words: For example `["--config", "a.yaml", "--model.lr=1e-4", "--flag"]`. An option without a value is
            true. A value that begins with `--` must hold a space or be given as `--key=--value`. Words after `--`
            are no options.
        positional: The options whose values may be given without their names, once each and in this order,
            separated by spaces; `paths...` at the end takes all further words as a list. None: there are none.

    Raises:
        CompositionError: On a word that belongs to no option, or `--config` without a file.
    """
    result = Arguments()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "-c":
            word = "--config"
        if word in ("-h", "--help"):
            result.help = True
            continue
        if word == "--print_config":
            result.print_config = True
            continue
        if word == "--" and rest:
            for own in rest:
                _add_positional(result, positional, own)
            break
        if not _OPTION.match(word):
            if word.startswith("--") or (word.startswith("-") and not re.search(r"\s", word)):
                raise CompositionError(f"unexpected argument {word!r}; options look like --key value")
            _add_positional(result, positional, word)
            continue
        key, equals, value = word[2:].partition("=")
        takes_next = not equals and bool(rest) and not _OPTION.match(rest[0]) and rest[0] != "--"
        if takes_next:
            value = rest.pop(0)
        if key.endswith(".help"):
            result.class_help = (key.removesuffix(".help"), value)
        elif key == "config":
            if not value:
                raise CompositionError("--config: expected a YAML file")
            result.files.append(Path(value))
        else:
            result.options.append((key, value if equals or takes_next else Flag("true")))
    if result.listed and positional is not None:
        name = positional.split()[-1].removesuffix(_LISTED)
        if name in {key for key, _ in result.options}:
            raise CompositionError(f"unexpected argument {result.listed[0]!r}; {name} is given already")
        result.options.append((name, escaped(json.dumps(result.listed, ensure_ascii=False))))
    return result


def _add_positional(arguments: Arguments, positional: str | None, word: str) -> None:
    if positional is None:
        raise CompositionError(f"unexpected argument {word!r}; options look like --key value")
    given = {key for key, _ in arguments.options}
    free = next((name for name in positional.split() if name not in given), None)
    if free is not None and free.endswith(_LISTED):
        arguments.listed.append(word)
        return
    if free is None:
        known = " and ".join(positional.split())
        quote = "is given already, quote it" if known == positional else "are given already"
        raise CompositionError(f"unexpected argument {word!r}; {known} {quote}")
    arguments.options.append((free, word))


def named_options(options: Iterable[tuple[str, str]], keys: Sequence[str]) -> list[tuple[str, str]]:
    """Turns `--videos NAME=VALUE`, which may be repeated, into `--videos.NAME VALUE`, for the dictionaries `keys`.

    Raises:
        CompositionError: When the text is no NAME=VALUE, the name has a dot (which would be a key inside), or two
            values have one name.
    """
    result: list[tuple[str, str]] = []
    for key, text in options:
        if key in keys and text != "null" and not text.startswith("{"):
            name, equals, value = text.partition("=")
            if not (name and equals and value) or "." in name:
                raise CompositionError(f"--{key}: expected NAME=VALUE with no dot in the name, got {text!r}")
            key, text = f"{key}.{name}", value
            if others := [other for known, other in result if known == key and other != value]:
                raise CompositionError(f"--{key}: given twice, as {others[0]!r} and {value!r}")
        result.append((key, text))
    return result


def compose(files: Iterable[Path], options: Iterable[tuple[str, str]] = (), keys: Keys | None = None) -> dict[str, Any]:
    """Merges files, then options, then resolves interpolations.

    Args:
        files: YAML files. Mappings merge key by key, everything else (lists too) is replaced.
        options: Dotted keys and their text. `null` is null, text that starts with `{` is read as YAML, any other
            text is kept for the key's type to read.
        keys: Says which keys are texts, which are taken literally and become `Text`, and which are paths, where
            `~` is expanded. None: nothing is known of the keys.

    Returns:
        A plain mapping without interpolations.

    Raises:
        CompositionError: When a file is missing or malformed, an option contradicts the structure, an
            interpolation points nowhere or a `???` value was not given.
    """
    config: Any = {}
    for file in files:
        config = merge(config, read_config(file))
    try:
        for key, text in options:
            _set_option(config, key, text, keys)
        if keys is not None:
            _read_groups(config, keys)
        resolved = _resolve(_without_switched_off(config))
        if keys is not None:
            read_texts(resolved, keys)
    except RecursionError:
        raise CompositionError("the configuration is nested too deeply") from None
    return resolved


def _read_groups(config: dict[str, Any], keys: Keys) -> None:
    """Replaces files that stand for a group of keys by their content: `--guidance guidance.yaml`."""
    for leaf in keys.leaves(config):
        value = leaf.holder[leaf.place]
        is_file = isinstance(value, str) and value.endswith((".yaml", ".yml"))
        if is_file and leaf.parameter is not None and leaf.parameter.fields() is not None:
            leaf.holder[leaf.place] = read_config(Path(value), f"--{leaf.key}")


def escaped(value: Any) -> Any:
    """A configuration whose texts `compose` reads back unchanged: `${` and `???` in them mean nothing."""

    def escape(leaf: Any) -> Any:
        if not isinstance(leaf, str):
            return leaf
        return _MISSING if leaf == "???" else _INTERPOLATION.sub(lambda found: found[1] * 2 + r"\${", leaf)

    return map_leaves(value, escape)


def words_of(options: Mapping[str, Any], keys: Keys, prefix: str = "") -> Iterator[str]:
    """Options as words of a command line that `compose` reads back unchanged; those that are None are left out."""
    for key, value in options.items():
        name = f"{prefix}{key}"
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if isinstance(value, Mapping):
            yield from words_of(value, keys, f"{name}.")
        elif value is not None:
            if isinstance(value, bool | tuple):
                value = str(value).lower() if isinstance(value, bool) else list(value)
            parameter = keys.root.get(name)
            literal = parameter is not None and parameter.is_text
            yield f"--{name}={value if literal else _as_word(value)}"


def _as_word(value: object) -> str:
    """A value as the command line reads it back: a path may look like YAML, or like an interpolation."""
    word = str(value)
    if isinstance(value, Path) and (word in ("null", "???") or word[0] in "{~#&!"):
        word = f"./{word}"
    return str(escaped(word))


def map_leaves(node: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a configuration, plain or parsed, in which each leaf value is changed."""
    if isinstance(node, argparse.Namespace):  # jsonargparse's is one
        return type(node)(**{key: map_leaves(value, change) for key, value in vars(node).items()})
    if isinstance(node, Mapping):
        return {key: map_leaves(value, change) for key, value in node.items()}
    return [map_leaves(value, change) for value in node] if isinstance(node, list) else change(node)


class StandIns:
    """Words without meaning that replace texts while another package reads the configuration.

    Attributes:
        texts: Each word's text.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self._mark = uuid.uuid4().hex

    def hide(self, node: Any, stands_in: Callable[[Any], bool]) -> Any:
        """A copy in which words replace the texts that `stands_in` selects."""

        def change(leaf: Any) -> Any:
            if not stands_in(leaf):
                return leaf
            word = f"text-{self._mark}-{len(self.texts)}-"
            self.texts[word] = leaf
            return word

        return map_leaves(node, change)

    def show(self, node: Any) -> Any:
        """A copy with the texts restored, even where one is only part of a text."""

        def change(leaf: Any) -> Any:
            if not isinstance(leaf, str):
                return leaf
            if leaf in self.texts:  # whatever kind of text it is
                return self.texts[leaf]
            for word, text in self.texts.items():
                leaf = leaf.replace(word, text)
            return leaf

        return map_leaves(node, change) if self.texts else node


def drop_nulls(config: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Removes the entries disabled with null from the named dictionaries, e.g. `callbacks`."""
    named = {key: config[key] or {} for key in keys if key in config}
    for key, entries in named.items():
        if not isinstance(entries, dict):
            raise CompositionError(f"{key}: expected a dictionary of components by name, got {entries!r}")
    return {**config, **{key: {n: v for n, v in d.items() if v is not None} for key, d in named.items()}}


def _set_option(config: dict[str, Any], key: str, text: str, keys: Keys | None) -> None:
    """Sets one dotted key in place, adding `init_args` where the key leaves it out."""
    node, parts = config, key.split(".")
    if not all(parts):
        raise CompositionError(f"--{key}: expected a key such as --model.lr")
    parameter = keys.at(config, parts) if keys is not None else None
    if isinstance(text, Flag) and parameter is not None and (parameter.holds_texts or parameter.is_path):
        raise CompositionError(f"--{key}: expected a value; one that begins with -- is given as --{key}=VALUE")
    for depth, part in enumerate(parts):
        if isinstance(node.get("class_path"), str) and part not in COMPONENT_KEYS:
            node = node.setdefault("init_args", {})
        child = node.get(part)
        if depth == len(parts) - 1:
            node[part] = merge(child, _value(key, text, child, parameter))
            return
        if child is None:
            child = node[part] = {}
        elif isinstance(child, str):  # a class given by its path alone: `--model my.Module --model.lr 1e-3`
            child = node[part] = {"class_path": child}
        inside = ".".join(parts[: depth + 1])
        if child is SWITCHED_OFF:
            raise CompositionError(
                f"--{key}: {inside} is disabled by null in a file; --{inside} CLASS before it enables it"
            )
        if not isinstance(child, dict):
            raise CompositionError(f"--{key}: {inside} is {child!r} and has no keys inside")
        node = child


def _value(key: str, text: str, current: Any, parameter: Parameter | None) -> Any:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CompositionError(f"--{key}: expected a text in UTF-8, got {text!r}") from None
    if parameter is not None and parameter.is_text:
        null = text == "null" and parameter.may_be_null and not parameter.is_prompt
        return None if null else Text(text)
    if text == "null":
        return None
    if not text.startswith("{"):
        named = key.startswith("trainer.") and text.islower() and "." not in text  # by Lightning, such as `ddp`
        is_component = isinstance(current, dict) and "class_path" in current and not named
        value: Any = {"class_path": text} if is_component else str(text)  # not a Flag
    else:
        value = parse_yaml(text, f"--{key}")
    if parameter is None or not parameter.holds_texts:
        return value
    return map_leaves(value, lambda leaf: Verbatim(leaf) if isinstance(leaf, str) else leaf)


def _without_switched_off(node: Any, by_name: bool = False) -> Any:
    """Removes disabled components from dictionaries by name; elsewhere (an argument of a class) they are null."""
    if isinstance(node, dict):
        kept = {key: value for key, value in node.items() if not (by_name and value is SWITCHED_OFF)}
        return {key: _without_switched_off(value, key != "init_args") for key, value in kept.items()}
    return None if node is SWITCHED_OFF else node


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    literal = StandIns()
    hidden = literal.hide(config, lambda leaf: isinstance(leaf, Verbatim))
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(hidden), resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise CompositionError(f"{error.full_key}: required (??? in the file), but not given") from error
    except OmegaConfBaseException as error:
        what = str(error).splitlines()[0]
        if raised := _RAISED.fullmatch(what):
            what = raised[1]
        raise CompositionError(f"{error.full_key}: {what}" if error.full_key else what) from error
    assert isinstance(resolved, dict)
    return {str(key): literal.show(value) for key, value in resolved.items()}
