"""What only shows with decord itself."""

from __future__ import annotations

import sys

import pytest

from luve_lightning.data.clips import load_decord


def test_a_reader_whose_constructor_never_began_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal's exception leaves it that comes between the object and its constructor's first line."""
    decord = load_decord()
    assert decord is not None
    dropped: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)
    reader = decord.VideoReader.__new__(decord.VideoReader)
    del reader
    assert not dropped
