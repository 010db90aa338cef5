"""What each key of a verb's configuration is: a text, a path, or a key that does not exist; and what it may be.

Read from source (cli/signatures.py), before anything slow is imported; the limits are of a checked configuration.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from luve_lightning.cli import function_name, verbs
from luve_lightning.cli.errors import UsageError, components, entries
from luve_lightning.cli.signatures import SPREAD, Parameter, Signature, class_signature, function_signature
from luve_lightning.machine import check_workers, cores

COMPONENT_KEYS = {"class_path", "init_args", "dict_kwargs"}
TRAINER = "lightning.pytorch.Trainer"
# LightningCLI passes these to the Trainer's methods itself.
_HANDED_OVER = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}
_SECTIONS = ("data", "model")  # sections of a training verb, both required
_SYNTAX = ("#", "&", "!")  # at the start of a path, where jsonargparse's YAML reads nothing or fails
_LEAST = {"gradient_clip_val": 0, "log_every_n_steps": 0}
# Far above any real training. Whether a size fits into memory is checked where it is used.
MOST = {
    **dict.fromkeys(("height", "width", "motion_height", "motion_width", "size", "tile", "max_side"), 65_536),
    **dict.fromkeys(("frames", "num_frames", "val_frames", "windows", "passes", "replicates"), 100_000),
    **dict.fromkeys(("frechet_replicates", "videos", "items"), 100_000),
    **dict.fromkeys(("batch_size", "crop", "length"), 65_536),
    **dict.fromkeys(("steps", "skip_steps", "repeats", "raters", "num_nodes"), 10_000),
    **dict.fromkeys(("train", "val", "test"), 1_000_000),  # clips of a mini world
    "rank": 65_536,
    "fps": 1_000,
    "seed_everything": 2**32 - 1,
    "seed": 2**63 - 1,
}
_PROCESSES = ("num_workers", "processes", "slots")


class Verbatim(str):
    """What a user wrote on the command line; `${...}` in it is no interpolation."""


class Text(Verbatim):
    """Literal text, whatever it looks like: `null`, `5` or `- a` are words, not YAML."""


@dataclass(frozen=True)
class Leaf:
    """A value in a configuration, its place, and what the source says about it.

    Attributes:
        key: Dotted key.
        holder: The dictionary or list that holds it.
        place: Its key or position in the holder.
        parameter: The parameter that it sets; None when the source does not show it.
        known: The valid keys; None unless this one is certainly wrong.
    """

    key: str
    holder: Any
    place: Any
    parameter: Parameter | None
    known: tuple[str, ...] | None = None


class Keys:
    """The keys of one verb.

    Args:
        verb: Its name.
        kind: One of its `kinds`; empty for its own configurations.
    """

    def __init__(self, verb: str, kind: str = "") -> None:
        self.training = verbs()[verb].trainer
        self.root = _training(verb) if self.training else _function(verb, kind)
        self.trainer = _trainer() if self.training else None

    def at(self, config: Mapping[str, Any], parts: Sequence[str]) -> Parameter | None:
        """The parameter that a dotted key sets, with or without `init_args` in it; None when the source hides it."""
        node: Any = config
        parameter: Parameter | None = None
        signature: Signature | None = self.root
        for depth, part in enumerate(parts):
            if isinstance(node, str):  # a class given by its path alone
                node = {"class_path": node}
            if _is_component(node):
                signature = class_signature(node["class_path"])
                if part not in COMPONENT_KEYS:
                    node = node.get("init_args")
            elif signature is None and parameter is not None:
                signature = parameter.fields()
            if part in COMPONENT_KEYS:  # the parameters inside belong to the class
                parameter = None
            else:
                inner = parameter.inner() if parameter is not None and signature is None else None
                parameter = signature.get(part) if signature is not None else inner
                signature = self.trainer if depth == 0 and part == "trainer" else None
            node = node.get(part) if isinstance(node, Mapping) else None
        return parameter

    def leaves(self, config: Any) -> Iterator[Leaf]:
        """Every value that is no dictionary or list, and every key that is certainly unknown."""
        return self._walk(config, "", None, self.root)

    def missing(self, config: Mapping[str, Any]) -> list[str]:
        """The required top-level keys that are missing."""
        if self.training:
            return [key for key in _SECTIONS if config.get(key) is None]
        return [name for name, one in self.root.parameters.items() if one.required and name not in config]

    def elsewhere(self, word: str, config: Mapping[str, Any]) -> list[str]:
        """Where an unknown top-level word, or a similar one, is a key inside: `trainer.max_steps`."""
        signatures = {"trainer": self.trainer}
        for section in _SECTIONS if self.training else ():
            node: Any = config.get(section)
            signatures[section] = class_signature(node["class_path"]) if _is_component(node) else None
        inside = [(name, key) for name, one in signatures.items() if one for key in one.parameters]
        close = [word] if any(key == word for _, key in inside) else []
        close = close or difflib.get_close_matches(word, [key for _, key in inside], n=1, cutoff=0.8)
        return [f"{name}.{key}" for name, key in inside if key in close]

    def _walk(self, node: Any, path: str, parameter: Parameter | None, signature: Signature | None) -> Iterator[Leaf]:
        if _is_component(node):
            inside = class_signature(node["class_path"])
            if isinstance(node.get("init_args"), Mapping):
                yield from self._walk(node["init_args"], f"{path}.init_args", None, inside)
            if isinstance(node.get("dict_kwargs"), Mapping):
                yield from self._walk(node["dict_kwargs"], f"{path}.dict_kwargs", None, Signature(open=True))
            return
        for place, value in list(entries(node)):
            key = f"{path}.{place}" if path else str(place)
            inner = parameter.inner() if parameter is not None and signature is None else None
            own = signature.get(str(place)) if signature is not None else inner
            if signature is not None and own is None and not signature.open:
                yield Leaf(key, node, place, None, tuple(signature.parameters))
            elif isinstance(value, Mapping | list):
                below = self.trainer if key == "trainer" and self.training else own.fields() if own else None
                yield from self._walk(value, key, own, below if isinstance(value, Mapping) else None)
            else:
                yield Leaf(key, node, place, own)


def read_texts(config: dict[str, Any], keys: Keys) -> None:
    """Marks the texts of a composed configuration and expands `~` in its paths, in place.

    Raises:
        ValueError: When a path is empty, which would mean the current folder, or names an unknown user's home.
    """
    for leaf in keys.leaves(config):
        value = leaf.holder[leaf.place]
        if leaf.parameter is None or not isinstance(value, str):
            continue
        if leaf.parameter.is_path:
            value = _path(leaf.key, value)
        leaf.holder[leaf.place] = Text(value) if leaf.parameter.is_text else value


def _path(key: str, value: str) -> str:
    if not value.strip():
        raise ValueError(f"{key}: expected a path, got an empty text")
    if value.startswith("~"):
        try:
            return str(Path(value).expanduser())
        except RuntimeError:
            raise ValueError(f"{key}: no home folder for {value!r}; ./{value} is a folder of that name") from None
    return f"./{value}" if value.startswith(_SYNTAX) else value


def kind_of(verb: str, given: Mapping[str, Any]) -> str:
    """Which of a verb's kinds a configuration is, by its top-level keys; empty for the verb's own.

    Raises:
        UsageError: For a configuration of another verb.
    """
    entry = verbs()[verb]

    def strange(kind: str) -> set[str]:
        known = Keys(kind or entry.reads).root.parameters.keys() | Keys(verb, kind).root.parameters.keys()
        return given.keys() - known

    def misfit(kind: str) -> tuple[int, int]:
        return len(strange(kind)), len(Keys(kind or entry.reads).missing(given))

    kind = min(("", *entry.kinds), key=misfit) if given else ""
    if len(none := strange(kind)) > 1:  # a single one is a slip, whose message says more
        raise UsageError(
            f"expected a configuration of luve {', '.join((entry.reads, *entry.kinds))}; {', '.join(sorted(none))} "
            "are keys of none"
        )
    return kind


def _function(verb: str, kind: str = "") -> Signature:
    entry = verbs()[verb]
    found = function_signature(entry.module, function_name(f"{verb} {kind}".rstrip()))
    if found is None:
        return Signature(open=True)
    parameters = dict(found.parameters)
    fields = parameters.pop(SPREAD).fields() if SPREAD in parameters else None
    parameters |= fields.parameters if fields else {}
    parts = [function_signature(module, "measure") or Signature() for module in entry.modules().values()]
    inside = {name: replace(one, required=False) for part in parts for name, one in part.parameters.items()}
    return Signature(inside | parameters, found.open and not parts)


def _training(verb: str) -> Signature:
    module, _, owner = TRAINER.rpartition(".")
    method = function_signature(module, verb, owner) or Signature()
    own = {name: one for name, one in method.parameters.items() if name not in _HANDED_OVER}
    names = [*_SECTIONS, "trainer", "callbacks", "loggers", "seed_everything", "ckpt_path"]
    return Signature({name: Parameter(name) for name in names} | own, open=not method.parameters)


def _trainer() -> Signature | None:
    found = class_signature(TRAINER)
    if found is None:
        return None
    kept = {name: one for name, one in found.parameters.items() if name not in ("callbacks", "logger")}
    return Signature(kept, found.open)


def _is_component(node: Any) -> bool:
    return isinstance(node, Mapping) and isinstance(node.get("class_path"), str)


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
            _refuse_nulls(arguments, import_class(class_path).__init__, f"{key}.init_args.")


def import_class(class_path: str) -> Any:
    """The class at an import path."""
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


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
