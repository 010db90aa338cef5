"""A small table of ablations, run by a program that starts in an instant."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from luve_lightning.ablations.graph import AblationPlanner, Contents
from luve_lightning.ablations.runners import Standing
from luve_lightning.ablations.stage_process import Failure
from luve_lightning.ablations.table import read_table
from luve_lightning.cli.compose import compose

PROGRAM = (sys.executable, "-S", str(Path(__file__).with_name("fake_luve.py")))

TABLE: dict[str, Any] = {
    "title": "Small table",
    "world": "tiny world: nothing here is anybody's number",
    "results": "tiny",
    "seeds": [0, 1],
    "reference": "full",
    "rows": ["full", "low", "plain"],
    "settings": {"value": 5.0},
    "metrics": {"score": {"better": "higher", "unit": "points", "paper": "Score"}},
    "stages": {
        "data": {"verb": "generate", "options": {"output": "{out}"}},
        "expert": {"verb": "fit", "options": {"trainer.default_root_dir": "{out}", "seed": "{seed}", "data": "{data}"}},
        "generate": {
            "verb": "generate",
            "options": {"output": "{out}", "seed": "{seed}", "value": "${settings.value}", "expert": "{expert}"},
        },
        "evaluate": {
            "verb": "evaluate",
            "options": {"output": "{out}/table.csv", "videos.{row}": "{generate}", "cache": "{cache}"},
        },
    },
}
ROWS: dict[str, dict[str, Any]] = {
    "full": {"paper": {"Score": 9.0}},
    "low": {"paper": {"Score": 8.0}, "settings": {"value": 3.0}},
    "plain": {"title": "plain words", "stages": {"generate": {"options": {"expert": None}}}},
}


def write_table(
    folder: Path, table: dict[str, Any] | None = None, rows: dict[str, dict[str, Any]] | None = None
) -> Path:
    """The files of a table; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.yaml").write_text(yaml.safe_dump(table or TABLE, sort_keys=False))
    for name, row in (ROWS if rows is None else rows).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(row, sort_keys=False))
    return folder


def planner_of(folder: Path, root: Path, **changes: Any) -> AblationPlanner:
    return AblationPlanner(read_table(folder, changes), root, compose, Contents(root))


def events(log: Path) -> list[dict[str, Any]]:
    """What the program noted, in order."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def started(log: Path) -> list[str]:
    """Folders of the stages that were started, in order."""
    return [event["stage"] for event in events(log) if event["event"] == "start"]


def keep_numbers_alone(root: Path) -> None:
    """Delete weights, videos and logs of all stages: what is not JSON in a stage's own folder."""
    for file in (root / "stages").rglob("*"):
        if file.is_file() and (file.suffix != ".json" or file.parent.parent.name != "stages"):
            file.unlink()


class Notes:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.failures: list[Failure] = []
        self.last: Standing | None = None

    def standing(self, standing: Standing) -> None:
        self.last = standing

    def finished(self, stage: Any, seconds: float, standing: Standing) -> None:
        assert seconds >= 0
        self.done.append(stage.name)
        self.last = standing

    def failed(self, failure: Failure) -> None:
        self.failures.append(failure)
