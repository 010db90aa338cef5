"""Turns what went wrong into one line that names the key and what was expected.

jsonargparse nests its messages: "Parser key "model": Problem with given class_path ...: Parser key "lr": Expected
a <class 'float'>". Each level is also an exception in the `__cause__` chain, so the chain is read from the outside
in: levels give the dotted key, the first exception that is no such level gives the reason.
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from luve_lightning.commands.outside_errors import describe_outside_error, describe_worker_error

_KEY_LEVEL = re.compile(r'Parser key "(?P<key>[^"]+)"')
_CLASS_LEVEL = re.compile(r"Problem with given class_path '(?P<path>[^']+)'")
_UNION_LEVEL = "Does not validate against any of the Union subtypes"
_NO_KEYS = "Unable to load config"
_UNKNOWN = re.compile(r"(?:Group '(?P<group>[^']+)' does not accept option|Option) '(?P<key>[^']+)'")
_REQUIRED = re.compile(
    r"(?:the following arguments are required: (?P<keys>.+)|Key \"(?P<key>[^\"]+)\" is required)"
)
_NO_CLASS = re.compile(
    r"Import path (?P<path>\S+) does not correspond to a subclass of (?P<base>\w+)"
    r"|Expected a dot import path string: (?P<name>\S+)"
)
_EXPECTED = re.compile(r"Expected an? (?P<type>.+?)\. Got value: (?P<value>.*)", re.DOTALL)
_SUBTYPES = re.compile(r"^Subtypes: \[(?P<types>.*)\]$", re.MULTILINE)
_WORKER = re.compile(r"Caught \w+ in \w+ worker process")

# Keys that Lightning's own documentation spells differently.
_MOVED = {
    "trainer.callbacks": "callbacks is a dictionary by name at the top level: callbacks.NAME.class_path",
    "trainer.logger": "loggers is a dictionary by name at the top level: loggers.NAME.class_path",
}

KnownKeys = Callable[[str | None], Iterable[str]]


class UsageError(Exception):
    """What the user can mend; the message is the one line to print."""


def one_line(text: object) -> str:
    """Joins a message of several lines into one."""
    return " ".join(str(text).split())


def describe_configuration_error(error: BaseException, config: Mapping[str, Any], known: KnownKeys) -> str:
    """Describes a failure to check or instantiate a configuration.

    Args:
        error: What jsonargparse or a constructor raised.
        config: The composed configuration, to name the entries of dictionaries of components.
        known: Gives the keys that a class (by its import path), or the top level (None), accepts.

    Returns:
        One line, for example `model.init_args.lr: expected float, got 'abc'`.
    """
    levels = list(_chain(error))
    got = _EXPECTED.match(str(levels[-1]))
    where = _Place(config, got["value"] if got else None)
    union = ""
    previous = ""
    for level in levels:
        text = str(level)
        if text == previous:  # the same level, re-raised as another type
            continue
        previous = text
        if match := _KEY_LEVEL.match(text):
            where.enter_key(match["key"])
            if _NO_KEYS in text and not isinstance(where.node, Mapping):
                value = _shortened(where.node)
                return f"{where}: expected keys inside, such as --{where}.KEY VALUE, or a file of them, got {value}"
        elif match := _CLASS_LEVEL.match(text):
            where.enter_class(match["path"])
        elif text.startswith(_UNION_LEVEL):
            union = text
            continue
        else:
            return _reason(level, where, union, known)
        union = ""
    return one_line(error)


def describe_runtime_error(error: BaseException, config: Mapping[str, Any]) -> str | None:
    """Describes a failure while a verb runs, when it is one the user can mend.

    That is an error class of ours, Lightning's MisconfigurationException, a ValueError raised by our own code, or
    what outside_errors.py knows of the system and of other packages. Ours is this package and any other package whose
    classes the configuration names, except Lightning and PyTorch. Anything else is a bug and deserves its traceback.

    Returns:
        One line, or None for a bug.
    """
    text = str(error)
    if _WORKER.match(text):  # a DataLoader worker's error arrives as text
        return describe_worker_error(text)
    key = _component_at_fault(error, config)
    if (outside := describe_outside_error(error)) is not None:
        return one_line(f"{key}: {outside}" if key and key != "trainer" else outside)
    ours = {"luve_lightning"} | {path.partition(".")[0] for path, _, _ in _components(config)} - {
        "lightning",
        "torch",
    }
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    mendable = (
        type(error).__module__.partition(".")[0] in ours
        or (isinstance(error, OSError) and error.errno is None)  # a library's, such as transformers'
        or type(error).__name__ == "MisconfigurationException"
        or (isinstance(error, ValueError) and raised_in.partition(".")[0] in ours)
    )
    if not mendable:
        return None
    return f"{key}: {one_line(text)}" if key else one_line(text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Ends a message on an unknown word: the closest known one, or all of them when they are few."""
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= 24 else ""


class _Place:
    """Where in the configuration a chain of messages has got to.

    Messages do not name the entries of dictionaries. An entry is found by its `class_path`, or, when its class is a
    dataclass and so has none in the configuration, by the key that is wrong in it.
    """

    def __init__(self, config: Mapping[str, Any], wrong_value: str | None) -> None:
        self.config = config
        self.wrong_value = wrong_value
        self.node: Any = config
        self.keys: list[str] = []
        self.dataclass: str | None = None

    @property
    def class_path(self) -> str | None:
        return self.node.get("class_path") if isinstance(self.node, Mapping) else None

    def enter_key(self, dotted: str, missing: bool = False) -> None:
        """Goes to a key of the current component, or to one it lacks."""
        self._enter_entry_by_key(dotted, missing)
        if self.class_path is not None and dotted.split(".")[0] not in ("class_path", "init_args"):
            self._step("init_args")
        for key in dotted.split("."):
            self._step(key)

    def enter_class(self, class_path: str) -> None:
        """Goes to the entry of a dictionary or list that has this class, unless already there."""
        if isinstance(self.node, str):  # a class given by its path alone
            self.node = {"class_path": self.node}
        if self.class_path == class_path:
            return
        for key, entry in _entries(self.node):
            if isinstance(entry, Mapping) and entry.get("class_path") == class_path:
                self._step(key)
                return
        self.dataclass = class_path

    def _enter_entry_by_key(self, dotted: str, missing: bool) -> None:
        key = dotted.split(".")[0]
        entries = [(name, entry) for name, entry in _entries(self.node) if isinstance(entry, Mapping)]
        if self.dataclass is None or len(entries) != len(self.node or ()):
            return
        found = [name for name, entry in entries if (key in entry) != missing]
        exact = [name for name in found if str(self.node[name].get(key)) == self.wrong_value]
        for name in (exact or found)[:1]:
            self._step(name)

    def _step(self, key: Any) -> None:
        self.keys.append(str(key))
        self.dataclass = None
        try:
            self.node = self.node[key]
        except (KeyError, IndexError, TypeError):
            self.node = None

    def __str__(self) -> str:
        return ".".join(self.keys)


def _entries(node: Any) -> Iterable[tuple[Any, Any]]:
    """The keys or positions of a mapping or list, with what they hold; nothing for anything else."""
    if isinstance(node, Mapping):
        return node.items()
    return enumerate(node) if isinstance(node, list) else ()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, then what caused it, and so on to the innermost."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _reason(level: BaseException, where: _Place, union: str, known: KnownKeys) -> str:
    text = str(level)
    if match := _UNKNOWN.match(text):
        return _unknown_key(match["key"], match["group"], where, known)
    if match := _REQUIRED.match(text):
        names = [name.strip() for name in (match["keys"] or match["key"]).split(",")]
        if len(names) > 1:
            inside = f"{where}.init_args." if where.class_path else ""
            return f"{', '.join(inside + name for name in names)}: required, but not given"
        where.enter_key(names[0], missing=True)
        return f"{where}: required, but not given"
    if match := _EXPECTED.match(text):
        types = _SUBTYPES.search(union)
        expected = _readable_types(types["types"] if types else match["type"])
        value = where.node if not isinstance(where.node, Mapping | list | None) else one_line(match["value"])
        options = re.findall(r"'([^']+)'", expected)
        hint = did_you_mean(str(value), options) if options else ""
        return (
            f"{where}: expected {expected}, got {_shortened(value)}{hint if hint.startswith('; did') else ''}"
        )
    if isinstance(level, ImportError | AttributeError) and where.class_path:
        return f"{where}.class_path: cannot import {where.class_path!r}: {one_line(text)}"
    if match := _NO_CLASS.match(text):
        expected = (
            f"a subclass of {match['base']}"
            if match["base"]
            else "an import path such as package.module.Class"
        )
        return f"{where}.class_path: expected {expected}, got {(match['path'] or match['name'])!r}"
    trainer = {"class_path": "Trainer", "init_args": where.config.get("trainer")}
    prefix = str(where) or _component_at_fault(level, {**where.config, "trainer": trainer})
    return f"{prefix}: {one_line(text)}" if prefix else one_line(text)


def _shortened(value: Any) -> str:
    """A value as it is written in code, cut when it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:120]}... ({len(text)} characters)"


def _unknown_key(key: str, group: str | None, where: _Place, known: KnownKeys) -> str:
    owner = where.class_path or where.dataclass
    if group:
        candidates = [name[len(group) + 1 :] for name in known(None) if name.startswith(f"{group}.")]
        where.enter_key(group)
    else:
        candidates = list(known(owner))
    where.enter_key(key)
    if str(where) in _MOVED:
        return f"{where}: unknown key; {_MOVED[str(where)]}"
    return f"{where}: unknown key{did_you_mean(key, {name.split('.')[0] for name in candidates})}"


def _readable_types(types: str) -> str:
    """`<class 'float'>, <class 'NoneType'>` becomes `float or null`."""
    types = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", types).replace("typing.", "")
    names = re.split(r", (?![^\[]*\])", types)  # not at commas inside brackets
    choices = ", ".join(name[len("Literal[") : -1] for name in names if name.startswith("Literal["))
    readable = [name for name in names if name != "NoneType" and not name.startswith("Literal[")]
    readable += [f"one of {choices}"] if choices else []
    readable += ["null"] if "NoneType" in names else []
    return " or ".join(readable)


def _component_at_fault(error: BaseException, config: Mapping[str, Any]) -> str | None:
    """The key of the outermost configured component whose method is on the error's traceback."""
    components = list(_components(config))
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if "self" in frame.f_code.co_freevars:
            continue  # a function that a component put around one of the Trainer's, which runs everything
        owner = type(frame.f_locals.get("self")).__name__
        found = [(key, arguments) for path, key, arguments in components if path.rpartition(".")[2] == owner]
        if not found:
            continue
        keys, arguments = [key for key, _ in found], found[0][1]
        # The argument it is about: the message's first word, or one written as `name=value`.
        words = [*re.findall(r"^\w+", str(error)), *re.findall(r"`(\w+)=", str(error))]
        named = [word for word in words if word in arguments]
        if named and len(keys) == 1:
            return f"{keys[0]}.{named[0]}" if keys[0] == "trainer" else f"{keys[0]}.init_args.{named[0]}"
        return " or ".join(keys)
    return None


def _components(node: Any, path: str = "") -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Class path, dotted key and arguments of every component in a configuration."""
    if isinstance(node, Mapping) and isinstance(node.get("class_path"), str):
        yield node["class_path"], path, node.get("init_args") or {}
    for key, value in _entries(node):
        yield from _components(value, f"{path}.{key}" if path else str(key))
