from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from luve_lightning.cli.compose import Arguments
from luve_lightning.cli.errors import UsageError
from luve_lightning.cli.parsing import run_function


@dataclass
class View:
    """A kind of crop.

    Args:
        frames: How long.
        size: How large.
    """

    frames: int
    size: int = 8


@dataclass
class Part:
    """A part of a picture.

    Args:
        frames: How long.
        size: How large.
    """

    frames: int
    size: int | None = None


calls: list[dict[str, Any]] = []


def verb(
    count: int,
    folder: Path = Path("x"),
    scales: list[float] | None = None,
    fast: bool = False,
    more: dict[str, Any] | None = None,
    views: dict[str, View] | None = None,
) -> None:
    """Counts something.

    Args:
        count: How many.
        folder: Where.
        scales: Which.
        fast: Hurry.
        more: Anything.
        views: By name.
    """
    if count < 0:
        raise ValueError(f"count must be >= 0, got {count}")
    calls.append({"count": count, "folder": folder, "scales": scales, "fast": fast, "more": more})


def with_module(module: torch.nn.Module) -> None:
    """Takes a component.

    Args:
        module: Any.
    """


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls.clear()


def test_options_are_read_by_their_types() -> None:
    more = {"devices": "8", "bar": "false", "rate": "1e-3", "name": "x"}
    config = {"count": "3", "scales": "[1.5, 2]", "fast": "true", "folder": "a/b", "more": more}
    run_function("count", verb, Arguments(), config)
    (call,) = calls
    assert call.pop("more") == {"devices": 8, "bar": False, "rate": 1e-3, "name": "x"}
    assert call == {"count": 3, "folder": Path("a/b"), "scales": [1.5, 2.0], "fast": True}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, ["count"]),
        ({"count": "x"}, ["count", "int", "x"]),
        ({"count": 1, "fastt": True}, ["fastt"]),
        ({"count": 1, "scales": ["a"]}, ["scales", "float", "a"]),
        ({"count": 1, "fast": "maybe"}, ["fast", "bool", "maybe"]),
        ({"count": 1, "views": {"a": {"frames": 1}, "b": {"size": 2}}}, ["views", "frames"]),
        ({"count": 1, "views": {"a": {"frames": 1}, "b": {"frames": 1, "sizes": 2}}}, ["views", "sizes"]),
        ({"count": 1, "views": {"a": {"frames": 1}, "b": {"frames": "long"}}}, ["views", "int", "long"]),
    ],
)
def test_what_does_not_fit_is_one_line(config: dict[str, Any], told: list[str]) -> None:
    """The words are jsonargparse's own: what is tested is what they name."""
    with pytest.raises(UsageError) as caught:
        run_function("count", verb, Arguments(), config)
    assert not [word for word in told if word not in str(caught.value)]
    assert "\n" not in str(caught.value)
    assert not calls


def test_a_value_that_does_not_fit_is_told_without_what_is_around_it() -> None:
    schedule = {"class_path": "torch.nn.L1Loss", "init_args": {"reduction": 5}}
    task = {"class_path": "tests.helpers.tiny.TinyModule", "init_args": {"losses": {"l1": schedule}, "lr": 1}}
    with pytest.raises(UsageError, match=r"^module\.init_args\.losses\.l1\.init_args: .*reduction") as caught:
        run_function("count", with_module, Arguments(), {"module": task})
    assert "TinyModule" not in str(caught.value)
    task["init_args"] = {"seed" * 5: 1}
    with pytest.raises(UsageError, match=r"^module\.init_args\.seedseedseedseedseed: unknown key"):
        run_function("count", with_module, Arguments(), {"module": task})
    with pytest.raises(UsageError, match=r"^module\.class_path: cannot import 'torch\.nn\.L3Loss'"):
        run_function("count", with_module, Arguments(), {"module": {"class_path": "torch.nn.L3Loss"}})


def sized(size: int | tuple[int, int] | View, shift: float | None = None, name: str = "") -> None:
    """Takes a group of keys, or something shorter.

    Args:
        size: How large.
        shift: How far.
        name: Text.
    """
    calls.append({"size": size, "shift": shift, "name": name})


class Sized:
    """Takes the same."""

    def __init__(self, size: int | View = 1, shift: float = 1.0) -> None:
        self.size, self.shift = size, shift


def with_sized(module: Sized) -> None:
    """Takes a component.

    Args:
        module: Any.
    """


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": {"frame": 3}}, "size.frame: unknown key; did you mean 'frames'?"),
        ({"size": {"frames": "long"}}, '.*"size.frames".*long'),
        ({"size": 3, "shift": "nan"}, "shift: expected a number, got nan"),
        ({"size": 3, "shift": "-Inf"}, "shift: expected a number, got -Inf"),
    ],
)
def test_a_wrong_group_of_keys_and_no_number_are_told_without_the_types_that_were_tried(
    values: dict[str, Any], message: str
) -> None:
    pattern = message.replace("?", r"\?")
    with pytest.raises(UsageError, match=f"^{pattern}") as caught:
        run_function("count", sized, Arguments(), values)
    assert "Union" not in str(caught.value)
    component = {"class_path": f"{Sized.__module__}.Sized", "init_args": values}
    with pytest.raises(UsageError, match=rf"^module\.init_args[.:] ?{pattern}"):
        run_function("count", with_sized, Arguments(), {"module": component})


def test_a_group_of_keys_and_a_name_like_no_number_fit() -> None:
    run_function("count", sized, Arguments(), {"size": {"frames": 3}, "name": "nan"})
    assert calls == [{"size": View(3), "shift": None, "name": "nan"}]


def test_help_shows_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    run_function("count", verb, Arguments(help=True), {})
    text = capsys.readouterr().out
    assert text.startswith("usage: luve count [--config FILE]... [--key value]...\n\nCounts something.")
    assert "How many." in text
    assert not calls


def test_print_config_prints_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    run_function("count", verb, Arguments(print_config=True), {"count": 3})
    assert "count: 3" in capsys.readouterr().out
    assert not calls


def test_a_word_that_is_none_of_a_union_is_told_what_it_takes() -> None:
    def choosing(
        switch: float | Literal["spectrum"] | None = None, steps: int | None = None, view: Part | None = None
    ) -> None:
        """Chooses.

        Args:
            switch: Where.
            steps: How many.
            view: Of what.
        """
        calls.append({"switch": switch, "steps": steps, "view": view})

    for config, message in (
        ({"view": {"frames": 3, "size": "big"}}, "view.size: expected a whole number or null, got 'big'"),
        ({"switch": "spectrumm"}, "switch: expected spectrum, a number or null, got 'spectrumm'"),
        ({"steps": "few", "switch": 0.5}, "steps: expected a whole number or null, got 'few'"),
        ({"switch": "spectrum", "steps": "few"}, "steps: expected a whole number or null, got 'few'"),
    ):
        with pytest.raises(UsageError) as raised:
            run_function("choose", choosing, Arguments(), config)
        assert str(raised.value) == message
