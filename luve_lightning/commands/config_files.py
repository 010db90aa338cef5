"""Reads one configuration file: YAML with a mapping at the top, of a bounded size once its aliases are expanded."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

_MAX_BYTES = 16 * 2**20  # a configuration has kilobytes; a video given by mistake is not read whole
_MAX_VALUES = 100_000  # with every alias expanded


class CompositionError(ValueError):
    """A configuration file or option that cannot be read or composed; the message is one line."""


def read_config(file: Path) -> dict[str, Any]:
    """Reads one YAML file into a plain mapping, interpolations left as text.

    Args:
        file: A file or a pipe (`--config <(...)`).

    Raises:
        CompositionError: When the file is missing, is no YAML, or holds something else than a mapping.
    """
    with suppress(RuntimeError):  # there is no such user: no such file either
        file = file.expanduser()  # a shell does not in --config=~/file
    if not file.exists():
        once = (
            "; a pipe is there for one process only: give several a file"
            if str(file).startswith("/dev/")
            else ""
        )
        raise CompositionError(f"--config: no such file: {file}{once}")
    if file.is_dir():
        raise CompositionError(f"--config: expected a YAML file, {file} is a folder")
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
    """Reads YAML as OmegaConf does (`1e-4` is a number, a key given twice is an error), interpolations left as text.

    Args:
        text: The YAML.
        where: Begins the message of an error: a file's name or an option.

    Returns:
        Plain values; None for a text that holds none.

    Raises:
        CompositionError: on a text that is no YAML, is nested too deeply or grows too large through its aliases.
    """
    try:
        if "&" in text:
            _check_aliases(text, where)
        content = OmegaConf.load(io.StringIO(text)) if text.strip() else None
        return None if content is None else OmegaConf.to_container(content, resolve=False)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and not where.startswith("--") else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise CompositionError(f"{where}{line}: not valid YAML: {problem}") from error
    except RecursionError:
        raise CompositionError(f"{where}: nested too deeply") from None
    except (
        OSError,
        OmegaConfBaseException,
    ) as error:  # OSError: OmegaConf's word for a number or a text alone
        problem = str(error).splitlines()[0]
        raise CompositionError(f"{where}: expected a mapping of keys: {problem}") from error


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
        inside: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inside = [one for pair in node.value for one in pair]
        elif isinstance(node, yaml.SequenceNode):
            inside = list(node.value)
        sizes[id(node)] = 1 + sum(size(one) for one in inside)
        open_nodes.discard(id(node))
        return sizes[id(node)]

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and size(root) > _MAX_VALUES:
        raise CompositionError(f"{where}: its aliases stand for more than {_MAX_VALUES} values")
