"""Reads the options of verbs and classes from their source, without importing it.

Importing PyTorch, Lightning and diffusers takes seconds. The source shows what an option is called, whether it is
a text or a path and whether it is required: enough to read a command line correctly, to refuse an unknown key at
once and to complete a word in a shell. What the source does not show is unknown here, never guessed.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

SPREAD = "options"
"""A verb's parameter of this name stands for the fields of its dataclass, which are options beside the others."""

_DEPTH = 12  # re-exports and base classes to follow before giving up
_OPTIONAL = ("None", "NoneType")
_TEXTS_ONLY = {
    "str", "None", "list", "List", "dict", "Dict", "Sequence", "tuple", "Tuple", "Iterable", "Mapping",
}  # fmt: skip
_PATH_NAMES = {"Path", "PurePath", "PathLike", "_PATH"}
# Texts by type that name a file or folder, or may (a backbone is a folder or a hub id).
_PATHS_BY_NAME = {
    "backbone", "refiner", "ckpt_path", "init_from", "text_encoder", "world", "results", "save_dir",
}  # fmt: skip
_PROMPTS = {"prompt", "negative_prompt"}
# Texts that WandbLogger passes on to wandb.init, where its own source shows `**kwargs`.
_HANDED_ON = dict.fromkeys(("notes", "group", "job_type"), "str | None") | {"tags": "list[str] | None"}


@dataclass(frozen=True)
class Source:
    """A module's source: what it defines and what it imports.

    Attributes:
        defined: Its classes and functions.
        imported: `(module, name)` of each name that `from module import name` imports.
    """

    defined: dict[str, ast.ClassDef | ast.FunctionDef]
    imported: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Parameter:
    """One option: its annotation and the module in which the annotation's names are looked up."""

    name: str
    annotation: ast.expr | None = None
    source: Source | None = None
    required: bool = False
    last: bool = False  # by keyword only, after those of subclasses

    @property
    def may_be_null(self) -> bool:
        """Whether its type allows null."""
        return any(_is_none(node) for node in self._members())

    @property
    def is_text(self) -> bool:
        """Whether it is text and nothing else: `str`, or `str | None`."""
        members = [node for node in self._members() if not _is_none(node)]
        return bool(members) and all(_name(node) == "str" for node in members)

    @property
    def is_prompt(self) -> bool:
        """Whether it is a prompt, for which even the word null is text."""
        return self.is_text and self.name in _PROMPTS

    @property
    def holds_texts(self) -> bool:
        """Whether it holds only texts, however they are arranged: `list[str]`, `str | dict[str, str]`."""
        names = self._names()
        return "str" in names and names <= _TEXTS_ONLY | {"Optional", "Union"}

    @property
    def is_path(self) -> bool:
        """Whether it is a path, or a collection of paths."""
        return bool(self._names() & _PATH_NAMES) or (self.is_text and self.name in _PATHS_BY_NAME)

    def inner(self) -> Parameter | None:
        """The type of its collection's values or items; None for other types."""
        for node in self._members():
            if isinstance(node, ast.Subscript) and _name(node.value) in _TEXTS_ONLY:
                last = node.slice.elts[-1] if isinstance(node.slice, ast.Tuple) else node.slice
                return Parameter(self.name, last, self.source)
        return None

    def fields(self) -> Signature | None:
        """The parameters of its class; None when the source shows none.

        They are open unless the class is a dataclass: a subclass may be given.
        """
        if self.source is None or self.inner() is not None:
            return None
        for node in self._members():
            if not isinstance(node, ast.Name) or node.id in _PATH_NAMES:
                continue
            found = _look_up(self.source, node.id)
            if found is not None and isinstance(found[1], ast.ClassDef):
                signature = _of_class(found[0], found[1])
                if signature is not None and not _is_dataclass(found[1]):
                    return Signature(signature.parameters, open=True)
                return signature
        return None

    def _members(self) -> list[ast.expr]:
        return list(_union(self.annotation)) if self.annotation is not None else []

    def _names(self) -> set[str]:
        nodes = ast.walk(self.annotation) if self.annotation is not None else ()
        return {name for node in nodes if (name := _name(node)) is not None}


@dataclass(frozen=True)
class Signature:
    """The options of a verb or class.

    Attributes:
        parameters: Parameters by name, in order.
        open: Whether it takes more than its source shows (`**kwargs`).
    """

    parameters: dict[str, Parameter] = field(default_factory=dict)
    open: bool = False

    def get(self, name: str) -> Parameter | None:
        """The parameter of that name; None where the source does not show it."""
        if name not in self.parameters and self.open and name in _HANDED_ON:
            return Parameter(name, ast.parse(_HANDED_ON[name], mode="eval").body)
        return self.parameters.get(name)


def function_signature(module: str, name: str, owner: str | None = None) -> Signature | None:
    """The parameters of a function, or of the method of class `owner`; None when the source does not show it.

    The module, by its dotted name, defines or re-exports it.
    """
    found = _find(module, owner or name)
    if found is None:
        return None
    source, node = found
    if isinstance(node, ast.ClassDef):
        node = _method(node, name) or node
    return _of_function(source, node) if isinstance(node, ast.FunctionDef) else None


def class_signature(path: str) -> Signature | None:
    """The parameters of a class, by its import path.

    Returns:
        None when the source does not show them: no such module, a class made at run time, an unknown base.
    """
    module, _, name = path.rpartition(".")
    found = _find(module, name) if module else None
    return _of_class(found[0], found[1]) if found is not None and isinstance(found[1], ast.ClassDef) else None


def _of_function(source: Source, node: ast.FunctionDef) -> Signature:
    named = [*node.args.posonlyargs, *node.args.args]
    without_default = len(named) - len(node.args.defaults)
    pairs = [(argument, index < without_default) for index, argument in enumerate(named)]
    keywords = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    pairs += [(argument, default is None) for argument, default in keywords]
    parameters = {
        argument.arg: Parameter(argument.arg, _unquoted(argument.annotation), source, required)
        for argument, required in pairs
        if argument.arg not in ("self", "cls")
    }
    return Signature(parameters, open=node.args.kwarg is not None)


def _of_class(source: Source, node: ast.ClassDef, depth: int = 0) -> Signature | None:
    if (constructor := _method(node, "__init__")) is not None:
        return _of_function(source, constructor)
    bases = [_name(base) for base in node.bases if _name(base) not in ("object", "Generic", "Protocol", "ABC")]
    inherited: dict[str, Parameter] = {}
    opened = False
    for base in bases[:1]:  # the first base's constructor comes first in the resolution order
        found = _look_up(source, base) if base is not None and depth < _DEPTH else None
        if found is None or not isinstance(found[1], ast.ClassDef):
            return None
        above = _of_class(found[0], found[1], depth + 1)
        if above is None:
            return None
        inherited, opened = above.parameters, above.open
    if len(bases) > 1 or not _is_dataclass(node):
        return Signature(inherited, opened or len(bases) > 1)
    own = {
        field.target.id: Parameter(
            field.target.id, _unquoted(field.annotation), source, field.value is None, _by_keyword(node)
        )
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }
    parameters = inherited | own
    return Signature({name: parameters[name] for name in sorted(parameters, key=lambda n: parameters[n].last)}, opened)


def _method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    return next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == name), None)


def _find(module: str, name: str) -> tuple[Source, ast.ClassDef | ast.FunctionDef] | None:
    source = _read(module)
    return _look_up(source, name) if source is not None else None


def _look_up(source: Source, name: str) -> tuple[Source, ast.ClassDef | ast.FunctionDef] | None:
    """Where a name that a module uses is defined, following re-exports."""
    for _ in range(_DEPTH):
        if name in source.defined:
            return source, source.defined[name]
        module, name = source.imported.get(name, ("", ""))
        following = _read(module) if module else None
        if following is None:
            return None
        source = following
    return None


@cache
def _read(module: str) -> Source | None:
    """Parses a module's source; None when it cannot be found without importing anything."""
    path = _path_of(module)
    if path is None:
        return None
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None
    defined: dict[str, ast.ClassDef | ast.FunctionDef] = {}
    imported: dict[str, tuple[str, str]] = {}
    for node in _statements(tree.body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            defined[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute(module, path.name == "__init__.py", node)
            imported |= {alias.asname or alias.name: (origin, alias.name) for alias in node.names}
    return Source(defined, imported)


def _path_of(module: str) -> Path | None:
    first, *rest = module.split(".")
    if not all(part.isidentifier() for part in (first, *rest)):
        return None
    try:
        spec = importlib.util.find_spec(first)  # imports nothing, as long as the name has no dot
    except (ImportError, ValueError):
        return None
    if spec is not None and not rest and spec.origin is not None:
        return Path(spec.origin) if spec.origin.endswith(".py") else None
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in (Path(folder, *rest, "__init__.py"), Path(folder, *rest).with_suffix(".py")):
            if path.is_file():
                return path
    return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, including those under `if` and `try`."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])
        else:
            yield node


def _absolute(module: str, package: bool, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    kept = parts[: len(parts) - node.level + package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _is_dataclass(node: ast.ClassDef) -> bool:
    names = (_name(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list)
    return "dataclass" in names


def _by_keyword(node: ast.ClassDef) -> bool:
    """Whether a dataclass takes its own fields by keyword only."""
    words = [word for one in node.decorator_list if isinstance(one, ast.Call) for word in one.keywords]
    return any(word.arg == "kw_only" and ast.unparse(word.value) == "True" for word in words)


def _unquoted(annotation: ast.expr | None) -> ast.expr | None:
    """An annotation given as text, parsed."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            return ast.parse(annotation.value, mode="eval").body
        except SyntaxError:
            return None
    return annotation


def _union(node: ast.expr) -> Iterator[ast.expr]:
    """The members of `A | B`, `Optional[A]` and `Union[A, B]`; any other type is its only member."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _union(node.left)
        yield from _union(node.right)
    elif isinstance(node, ast.Subscript) and _name(node.value) in ("Optional", "Union"):
        inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for member in inside:
            yield from _union(member)
        if _name(node.value) == "Optional":
            yield ast.Constant(None)
    else:
        yield node


def _is_none(node: ast.expr) -> bool:
    return (isinstance(node, ast.Constant) and node.value is None) or _name(node) in _OPTIONAL


def _name(node: ast.AST) -> str | None:
    """The last name of `a.b.c`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None
