"""Reads configuration files and lays them over each other, for all verbs and for ablations.

A file is YAML with a mapping at the top, of bounded size once its aliases are expanded. With `extends:
../base/training.yaml`, or a list of such files relative to its own folder, it is laid over them in order. Entries
under `definitions` are named elsewhere: `${definitions.sharpened}` stands for the entry; the key itself is not
part of the configuration.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

_MAX_BYTES = 16 * 2**20  # a configuration has kilobytes; a video given by mistake is not read whole
_MAX_VALUES = 100_000  # with every alias expanded
_EXTENDS, _DEFINITIONS = "extends", "definitions"
_NAMED = re.compile(rf"\$\{{{_DEFINITIONS}\.([^${{}}]+)\}}")

MOVED = {
    "luve_lightning.tasks.recogniser.PaintedScenes": "luve_lightning.datamodules.PaintedScenes",
    "luve_lightning.evaluation.vae_features.VAEFeatures": "luve_lightning.metrics.frame_networks.VAEFeatures",
}
"""Where classes are now that earlier configurations name elsewhere."""

SWITCHED_OFF = object()  # replaces null over a component, until all files and options are merged


class CompositionError(ValueError):
    """A configuration file or option that cannot be read or composed; the message is one line."""


def merge(base: Any, over: Any) -> Any:
    """Merges `over` into `base`: mappings key by key, anything else is replaced.

    A component (`class_path` and `init_args`) that changes its class keeps none of the earlier `init_args`. Null
    over a component leaves `SWITCHED_OFF`.
    """
    if over is None and isinstance(base, dict) and "class_path" in base:
        return SWITCHED_OFF
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "class_path" in over and base.get("class_path") not in (None, over["class_path"]):
        return over
    return {**base, **{key: merge(base[key], over[key]) if key in base else over[key] for key in over}}


def read_config(file: Path, where: str = "--config", merge: Callable[[Any, Any], Any] = merge) -> dict[str, Any]:
    """Reads a file and what it extends into one plain mapping, with interpolations left as text.

    Args:
        file: A file or a pipe (`--config <(...)`).
        where: What names the file, for the message when it is missing.
        merge: Lays the file over what it extends.

    Raises:
        CompositionError: When a file is missing, is not YAML, holds no mapping, or extends itself, or a definition
            is missing.
    """
    config = _read_extended(file, where, merge, ())
    definitions = config.pop(_DEFINITIONS, {})
    return {key: _with_definitions(value, definitions, f"{file}: {key}") for key, value in config.items()}


def _with_definitions(node: Any, definitions: Any, where: str) -> Any:
    """A copy of a value with the definitions that it names put in."""
    if isinstance(node, dict):
        return {key: _with_definitions(value, definitions, f"{where}.{key}") for key, value in node.items()}
    if isinstance(node, list):
        return [_with_definitions(value, definitions, where) for value in node]
    if not isinstance(node, str) or not (named := _NAMED.fullmatch(node)):
        return node
    found = definitions
    for part in named[1].split("."):
        if not isinstance(found, dict) or part not in found:
            known = f"; known: {', '.join(map(str, found))}" if isinstance(found, dict) and found else ""
            raise CompositionError(f"{where}: {node}: no definition {part!r}{known}")
        found = found[part]
    return deepcopy(found)


def _read_extended(file: Path, where: str, merge: Callable[[Any, Any], Any], above: tuple[Path, ...]) -> dict[str, Any]:
    own = _read_file(file, where)
    bases = own.pop(_EXTENDS, None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise CompositionError(f"{file}: {_EXTENDS}: expected a file or a list of files, got {bases!r}")
    above = (*above, file.resolve())
    config: dict[str, Any] = {}
    for base in bases:
        path = file.parent / base
        if path.resolve() in above:
            raise CompositionError(f"{file}: {_EXTENDS}: {base} extends this file itself")
        config = merge(config, _read_extended(path, f"{file}: {_EXTENDS}", merge, above))
    return merge(config, own) if bases else own


def _read_file(file: Path, where: str) -> dict[str, Any]:
    with suppress(RuntimeError):  # no such user, so no such file either
        file = file.expanduser()  # a shell does not expand --config=~/file
    if not file.exists():
        once = "; a pipe is there for one process only" if str(file).startswith("/dev/") else ""
        raise CompositionError(f"{where}: no such file: {file}{once}")
    if file.is_dir():
        raise CompositionError(f"{where}: expected a YAML file, {file} is a folder")
    try:
        with file.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise CompositionError(f"{file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CompositionError(f"{file}: not YAML: byte {error.start} is no UTF-8 text") from error
    if len(content) > _MAX_BYTES:
        raise CompositionError(f"{file}: larger than {_MAX_BYTES // 2**20} MiB, which no configuration is")
    plain = parse_yaml(text, str(file))
    if plain is None:
        return {}
    if plain and isinstance(plain, dict) and not any(sign in text for sign in ":?{"):
        raise CompositionError(f"{file}: expected a mapping of keys, got a text")  # OmegaConf makes it a key
    if not isinstance(plain, dict):
        raise CompositionError(f"{file}: expected a mapping of keys, got a {type(plain).__name__}")
    return {str(key): value for key, value in plain.items()}


def parse_yaml(text: str, where: str) -> Any:
    """Reads YAML as OmegaConf does (`1e-4` is a number, a repeated key is an error), with interpolations left as text.

    Args:
        text: The YAML.
        where: Beginning of an error message: a file's name or an option.

    Returns:
        Plain values; None for an empty text.

    Raises:
        CompositionError: on text that is not YAML, is nested too deeply or grows too large through its aliases.
    """
    try:
        return deepcopy(_parsed(text, where))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and not where.startswith("--") else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise CompositionError(f"{where}{line}: not valid YAML: {problem}") from error
    except RecursionError:
        raise CompositionError(f"{where}: nested too deeply") from None
    except (OSError, OmegaConfBaseException) as error:  # OSError: OmegaConf's error for a bare number or text
        problem = str(error).splitlines()[0]
        raise CompositionError(f"{where}: expected a mapping of keys: {problem}") from error


# The stages of a table are composed from the same few files hundreds of times.
@lru_cache(maxsize=256)
def _parsed(text: str, where: str) -> Any:
    if "&" in text:
        _check_aliases(text, where)
    content = OmegaConf.load(io.StringIO(text)) if text.strip() else None
    return None if content is None else _with_moved(OmegaConf.to_container(content, resolve=False))


def _with_moved(node: Any) -> Any:
    """A value in which every `class_path` is where the class is now."""
    if isinstance(node, list):
        return [_with_moved(value) for value in node]
    if not isinstance(node, dict):
        return node
    new = {key: _with_moved(value) for key, value in node.items()}
    if isinstance(path := new.get("class_path"), str):
        new["class_path"] = MOVED.get(path, path)
    return new


def _check_aliases(text: str, where: str) -> None:
    """Refuses a document whose aliases make it larger than any configuration, or contain themselves."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            raise CompositionError(f"{where}: an alias contains itself")
        open_nodes.add(id(node))
        inside = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            inside = [one for pair in node.value for one in pair]
        sizes[id(node)] = 1 + sum(size(one) for one in inside)
        open_nodes.discard(id(node))
        return sizes[id(node)]

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and size(root) > _MAX_VALUES:
        raise CompositionError(f"{where}: its aliases stand for more than {_MAX_VALUES} values")


@dataclass(frozen=True)
class ToExport:
    """A training that will export a model.

    Attributes:
        file: its configuration.
        model: class path and arguments of its task.
    """

    file: Path
    model: Mapping[str, Any]

    def argument(self, name: str, kind: Any) -> Any:
        """An argument of the task, of the type that it has there."""
        from jsonargparse import ArgumentParser  # which what only composes configurations does not need

        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument(f"--{name}", type=kind)
        given = {name: self.model.get("init_args", {}).get(name)}
        return getattr(parser.instantiate(parser.parse_object(given)), name)


def exporting(folder: Path, experiments: Path = Path("experiments")) -> ToExport | None:
    """The training that will export into a folder, its run's or one inside it; None where there is none.

    Args:
        folder: the export.
        experiments: folder of configurations.
    """
    runs = {str(folder), str(folder.parent)}
    for file in sorted(experiments.rglob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        if any(run in text for run in runs):
            config = read_config(file)
            if str(config.get("trainer", {}).get("default_root_dir")) not in runs:
                continue
            # A file of differences opens with its command, which gives it after others.
            command = next((line for line in text.splitlines() if "luve fit" in line and file.name in line), "")
            for given in reversed(re.findall(r"--config (\S+)", command)[:-1]):
                config = merge(read_config(experiments.parent / given), config)
            return ToExport(file, config.get("model", {}))
    return None
