from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

from luve_lightning.cli import function_name, verbs
from luve_lightning.cli.signatures import Signature, class_signature, function_signature

REPOSITORY = Path(__file__).resolve().parents[2]
CLASSES = sorted(
    {
        name
        for file in (REPOSITORY / "experiments").rglob("*.yaml")
        for name in re.findall(r"class_path: ([\w.]+)", file.read_text(encoding="utf-8"))
    }
)


def assert_same(read: Signature, imported: inspect.Signature) -> None:
    """What the source shows is what Python has."""
    kinds = inspect.Parameter
    by_name = (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    named = {name: one for name, one in imported.parameters.items() if one.kind in by_name}
    assert read.open or list(read.parameters) == list(named)
    assert read.open or not any(p.kind == kinds.VAR_KEYWORD for p in imported.parameters.values())
    assert set(read.parameters) <= set(named)
    for name, one in read.parameters.items():
        assert one.required == (named[name].default is kinds.empty)


@pytest.mark.parametrize("verb", [name for name, verb in verbs().items() if not verb.trainer])
def test_a_verbs_source_shows_what_it_takes(verb: str) -> None:
    entry = verbs()[verb]
    read = function_signature(entry.module, function_name(verb))
    assert read is not None
    assert_same(read, inspect.signature(getattr(importlib.import_module(entry.module), function_name(verb))))


@pytest.mark.parametrize("path", [*CLASSES, "lightning.pytorch.Trainer"])
def test_a_classs_source_shows_what_it_takes(path: str) -> None:
    module, _, name = path.rpartition(".")
    read = class_signature(path)
    if read is not None:  # else it is left to the full check
        assert_same(read, inspect.signature(getattr(importlib.import_module(module), name)))


def test_most_classes_of_the_experiments_can_be_read() -> None:
    assert sum(class_signature(path) is None for path in CLASSES) <= 2


def test_texts_paths_and_null_are_told_apart() -> None:
    read = function_signature("luve_lightning.cli.generate", "generate")
    assert read is not None
    texts = {name for name, one in read.parameters.items() if one.is_text}
    assert texts == {"backbone", "prompt", "negative_prompt", "device"}
    paths = {name for name, one in read.parameters.items() if one.is_path}
    models = {"backbone", "vluer", "refiner", "transformer", "experts", "lora"}
    assert paths == models | {"output", "prompts", "negative_prompt_file", "latents"}
    assert {name for name, one in read.parameters.items() if one.is_prompt} == {"prompt", "negative_prompt"}
    assert read.parameters["prompt"].may_be_null
    assert not read.parameters["backbone"].may_be_null
    rows = function_signature("luve_lightning.cli.ablate", "ablate").parameters["rows"]  # type: ignore[union-attr]
    assert rows.holds_texts
    assert not rows.is_text


def test_what_is_nowhere_is_unknown() -> None:
    assert class_signature("no.such.Class") is None
    assert class_signature("Class") is None
    assert class_signature("luve_lightning.cli.VERBS") is None
    assert class_signature("../etc.passwd") is None
    assert function_signature("luve_lightning.cli.generate", "nothing") is None
