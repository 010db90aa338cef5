"""Composes configuration files and `--key value` options into one plain mapping.

The order is: files in the order given, then options, then interpolations. So `${trainer.default_root_dir}` in a
base file follows an override in a later file or on the command line, and an option can reach into a dictionary
of components (`--callbacks.checkpoint.save_top_k 3`). jsonargparse then checks the result against the signatures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

_COMPONENT_KEYS = {"class_path", "init_args", "dict_kwargs"}
_OFF = object()  # stands where null came over a component, until all files and options are merged


class CompositionError(ValueError):
    """A configuration file or option that cannot be read or composed; the message is one line."""


@dataclass
class Arguments:
    """The words after a verb, sorted.

    Attributes:
        files: Values of `--config`, in order.
        options: `--key value` pairs, in order, values as text.
        help: Whether `--help` was given.
        class_help: `(key, class path)` when `--KEY.help CLASS` was given.
        print_config: Whether `--print_config` was given.
    """

    files: list[Path] = field(default_factory=list)
    options: list[tuple[str, str]] = field(default_factory=list)
    help: bool = False
    class_help: tuple[str, str] | None = None
    print_config: bool = False


def read_arguments(words: Sequence[str], positional: str | None = None) -> Arguments:
    """Sorts the words after a verb into files, options and requests for help.

    Args:
        words: For example `["--config", "a.yaml", "--model.lr=1e-4", "--flag"]`. An option without a value
            is true.
        positional: The option whose value may stand without its name, once. None: there is none.

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
        if not word.startswith("--") or len(word) == 2:
            if positional is None or word.startswith("-"):
                raise CompositionError(f"unexpected argument {word!r}; options look like --key value")
            if any(key == positional for key, _ in result.options):
                raise CompositionError(
                    f"unexpected argument {word!r}; {positional} is given already, quote it"
                )
            result.options.append((positional, word))
            continue
        key, equals, value = word[2:].partition("=")
        takes_next = not equals and bool(rest) and not rest[0].startswith("--")
        if takes_next:
            value = rest.pop(0)
        if key.endswith(".help"):
            result.class_help = (key.removesuffix(".help"), value)
        elif key == "config":
            if not value:
                raise CompositionError("--config: expected a YAML file")
            result.files.append(Path(value))
        else:
            result.options.append((key, value if equals or takes_next else "true"))
    return result


def named_options(options: Iterable[tuple[str, str]], keys: Sequence[str]) -> list[tuple[str, str]]:
    """Turns `--videos NAME=VALUE`, which may be repeated, into `--videos.NAME VALUE`.

    Args:
        options: As `read_arguments` gives them.
        keys: Of the dictionaries for which that is done.

    Raises:
        CompositionError: When the text is no NAME=VALUE, or the name has a dot, which would be a key inside.
    """
    result = []
    for key, text in options:
        if key in keys and text != "null" and not text.startswith("{"):
            name, equals, value = text.partition("=")
            if not (name and equals and value) or "." in name:
                raise CompositionError(f"--{key}: expected NAME=VALUE with no dot in the name, got {text!r}")
            key, text = f"{key}.{name}", value
        result.append((key, text))
    return result


def compose(files: Iterable[Path], options: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
    """Merges files, then options, then resolves interpolations.

    Args:
        files: YAML files. Mappings merge key by key, everything else (lists too) is replaced.
        options: Dotted keys and their text. `null` is null, text that starts with `{` is read as YAML, any other
            text is kept as it is, for the key's type to read.

    Returns:
        A plain mapping without interpolations.

    Raises:
        CompositionError: When a file is missing or malformed, an option contradicts the structure, an
            interpolation points nowhere or a `???` value was not given.
    """
    config: Any = {}
    for file in files:
        config = merge(config, load(file))
    for key, text in options:
        _set_option(config, key, text)
    return _resolve(_without_switched_off(config))


def load(file: Path) -> dict[str, Any]:
    """Reads one YAML file into a plain mapping, interpolations left as text.

    Raises:
        CompositionError: When the file is missing, is no YAML, or holds something else than a mapping.
    """
    if not file.is_file():
        raise CompositionError(f"--config: no such file: {file}")
    try:
        content = OmegaConf.load(file)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise CompositionError(f"{file}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise CompositionError(f"{file}: cannot be read: {error}") from error
    plain = OmegaConf.to_container(content, resolve=False)
    if not isinstance(plain, dict):
        raise CompositionError(f"{file}: expected a mapping of keys, got a {type(plain).__name__}")
    return {str(key): value for key, value in plain.items()}


def merge(base: Any, over: Any) -> Any:
    """Merges `over` into `base`: mappings key by key, anything else is replaced.

    A component (`class_path` and `init_args`) that changes its class keeps nothing of the earlier `init_args`. Null
    over a component switches it off: `compose` removes it from a dictionary of components by name.
    """
    if over is None and isinstance(base, dict) and "class_path" in base:
        return _OFF
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "class_path" in over and base.get("class_path") not in (None, over["class_path"]):
        return over
    return {**base, **{key: merge(base[key], over[key]) if key in base else over[key] for key in over}}


def drop_nulls(config: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Removes the entries switched off with null from the dictionaries named, e.g. `callbacks`."""
    named = {key: config[key] or {} for key in keys if key in config}
    for key, entries in named.items():
        if not isinstance(entries, dict):
            raise CompositionError(f"{key}: expected a dictionary of components by name, got {entries!r}")
    return {**config, **{key: {n: v for n, v in d.items() if v is not None} for key, d in named.items()}}


def _set_option(config: dict[str, Any], key: str, text: str) -> None:
    """Sets one dotted key in place, adding `init_args` where the key leaves it out."""
    node, parts = config, key.split(".")
    if not all(parts):
        raise CompositionError(f"--{key}: expected a key such as --model.lr")
    for depth, part in enumerate(parts):
        if isinstance(node.get("class_path"), str) and part not in _COMPONENT_KEYS:
            node = node.setdefault("init_args", {})
        child = node.get(part)
        if depth == len(parts) - 1:
            node[part] = merge(child, _value(key, text, child))
            return
        if child is None:
            child = node[part] = {}
        elif isinstance(child, str):  # a class given by its path alone: `--model my.Module --model.lr 1e-3`
            child = node[part] = {"class_path": child}
        if not isinstance(child, dict):
            inside = ".".join(parts[: depth + 1])
            raise CompositionError(f"--{key}: {inside} is {child!r} and has no keys inside")
        node = child


def _value(key: str, text: str, current: Any) -> Any:
    if text == "null":
        return None
    if not text.startswith("{"):
        is_component = isinstance(current, dict) and "class_path" in current
        return {"class_path": text} if is_component else text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CompositionError(f"--{key}: not valid YAML: {text}") from error


def _without_switched_off(node: Any, by_name: bool = False) -> Any:
    """Removes switched-off components from dictionaries by name; elsewhere (an argument of a class) they are null."""
    if isinstance(node, dict):
        kept = {key: value for key, value in node.items() if not (by_name and value is _OFF)}
        return {key: _without_switched_off(value, key != "init_args") for key, value in kept.items()}
    return None if node is _OFF else node


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(dict(config)), resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise CompositionError(f"{error.full_key}: required (??? in the file), but not given") from error
    except OmegaConfBaseException as error:
        what = str(error).splitlines()[0]
        raise CompositionError(f"{error.full_key}: {what}" if error.full_key else what) from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}
