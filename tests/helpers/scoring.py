"""A world whose captions name the clips, and `luve score` as a process."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.helpers.luve_process import LuveProcess
from tests.helpers.small_world import write_world
from tests.helpers.waiting import wait_for

REPOSITORY = Path(__file__).resolve().parents[2]


def captioned_world(folder: Path, count: int) -> Path:
    """`write_world`, each clip with its own id as its summary; returns the CSV."""
    index = write_world(folder, count)
    return set_captions(index, {row["clip_id"]: row["clip_id"] for row in _rows(index)})


def set_captions(index: Path, captions: dict[str, str]) -> Path:
    """Change the summaries of some clips of a CSV."""
    rows = _rows(index)
    for row in rows:
        row["Summarized Description"] = captions.get(row["clip_id"], row["Summarized Description"])
    with index.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return index


def recorded(log: Path) -> list[list[str]]:
    """The clips of each call of `Recording`, each named once."""
    if not log.exists():
        return []
    return [list(dict.fromkeys(line.split())) for line in log.read_text().splitlines()]


class ScoreProcess(LuveProcess):
    """`luve score` with `Recording` as a process of its own.

    Args:
        index: CSV of the clips.
        output: folder of the scores.
        log: of `Recording`.
        options: more words for the command line.
        environment: more variables.
        prepare: called in the process before anything else.
    """

    def __init__(
        self,
        index: Path,
        output: Path,
        log: Path,
        *options: str,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        words = [f"--index={index}", f"--output={output}", "--scorer=tests.helpers.scorers.Recording"]
        words += [f"--scorer.log={log}", *options]
        printed = log.with_name(f"{log.name}.out")
        super().__init__(printed, "score", *words, environment=environment, prepare=prepare)


def wait_until_recorded(log: Path, calls: int, run: ScoreProcess) -> None:
    """Return once so many batches have been given to the scorer."""
    assert wait_for(lambda: len(recorded(log)) >= calls or not run.alive(), every=0.005)
    assert run.alive(), run.text()


def _rows(index: Path) -> list[dict[str, str]]:
    with index.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))
