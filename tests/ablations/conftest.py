"""Fixtures of the small table in tests/helpers/ablations.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from luve_lightning.ablations.graph import AblationPlanner
from tests.helpers.ablations import planner_of, write_table


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the program that stands in for `luve` notes what it does."""
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log.jsonl"))
    return tmp_path / "log.jsonl"


@pytest.fixture
def planner(tmp_path: Path) -> AblationPlanner:
    """What makes the stages of the table's rows."""
    return planner_of(write_table(tmp_path / "small"), tmp_path / "runs")
