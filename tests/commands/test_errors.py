from __future__ import annotations

import json

import pytest

from luve_lightning.commands.errors import UsageError, describe_runtime_error, did_you_mean, one_line
from luve_lightning.config_files import CompositionError


def caught(function: object, *arguments: object) -> BaseException:
    with pytest.raises(BaseException) as info:
        function(*arguments)  # type: ignore[operator]
    return info.value


def test_errors_of_ours_are_one_line() -> None:
    assert describe_runtime_error(UsageError("a\n  b"), {}) == "a b"
    assert describe_runtime_error(CompositionError("c"), {}) == "c"
    assert "nosuch" in str(describe_runtime_error(caught(open, "nosuch"), {}))


def test_a_value_error_counts_only_when_our_code_raises_it() -> None:
    from luve_lightning.commands.compose import read_arguments

    assert describe_runtime_error(caught(read_arguments, ["stray"]), {})
    assert describe_runtime_error(caught(json.loads, "{"), {}) is None  # a ValueError of the standard library
    assert describe_runtime_error(caught({}.__getitem__, "x"), {}) is None


def test_a_loader_workers_error_is_read_from_its_text() -> None:
    text = (
        "Caught ClipError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\nluve_lightning.datasets.clip_types.ClipError: a.mp4: truncated\n'
    )
    assert describe_runtime_error(RuntimeError(text), {}) == "a.mp4: truncated"
    assert describe_runtime_error(RuntimeError(text.replace("luve_lightning.datasets", "torch")), {}) is None


def test_a_components_own_method_is_named() -> None:
    from tests.helpers.tiny import TinyData

    config = {"data": {"class_path": "tests.helpers.tiny.TinyData", "init_args": {"share": 2.0}}}
    error = caught(TinyData(share=2.0).setup, "fit")
    assert describe_runtime_error(error, config) == "data.init_args.share: share must be in [0, 1], got 2.0"


def test_suggestions() -> None:
    assert did_you_mean("fitt", ["fit", "test"]) == "; did you mean 'fit'?"
    assert did_you_mean("zzz", ["b", "a"]) == "; known: a, b"
    assert did_you_mean("zzz", [f"key{n}" for n in range(100)]) == ""


def test_one_line() -> None:
    assert one_line("a\n   b\tc ") == "a b c"
