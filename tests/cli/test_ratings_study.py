"""`luve judge`: asking, and reading what was answered."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from luve_lightning.data.video_files import write_video
from tests.helpers.run_luve import run_luve


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two videos of each of two methods, and their prompts."""
    rng = np.random.default_rng(0)
    for method in ("a", "b"):
        for name in ("x", "y"):
            pixels = rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
            write_video(tmp_path / method / f"{name}.mp4", pixels, 8, lossless=True)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"name": "{n}", "prompt": "a boat"}}\n' for n in "xy"))
    return tmp_path


def test_from_questions_to_a_table(capsys: pytest.CaptureFixture[str], videos: Path) -> None:
    output = videos / "out"
    (videos / "b" / "broken.mp4").write_bytes(b"")
    with (videos / "prompts.jsonl").open("a") as file:
        file.write('{"name": "broken", "prompt": "nothing"}\n')
    asked = run_luve(
        capsys, "judge", f"--videos=a={videos / 'a'}", f"--videos=b={videos / 'b'}",
        f"--prompts={videos / 'prompts.jsonl'}", f"--output={output}", "--frames=2",
    )  # fmt: skip
    assert asked.code == 0, asked.err
    assert "4 questions" in asked.out
    assert "not asked: b/broken: " in asked.out
    key = json.loads((output / "key.json").read_text())["entries"]
    questions = [json.loads(line) for line in (output / "questions.jsonl").read_text().splitlines()]
    lines = []
    for question in questions:
        score = 9 if key[question["id"]]["method"] == "a" else 3
        lines.append(json.dumps({"id": question["id"], "realism": score, "detail": 5, "alignment": 10}))
    answers = videos / "answers.jsonl"
    answers.write_text("\n".join([*lines, lines[0], "?"]))
    read = run_luve(capsys, "judge", f"--output={output}", f"--answers={answers}")
    assert read.code == 0, read.err
    with (output / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["n"], row["realism"], row["realism_low"]) for row in rows] == [
        ("a", "2", "9", "9"),
        ("b", "2", "3", "3"),
    ]
    assert len((output / "videos.csv").read_text().splitlines()) == 5
    assert "| a | 2 |" in (output / "table.md").read_text()
    assert f"{answers}: line 5: {questions[0]['id']} was answered on line 1 already" in read.out
    assert f"{answers}: line 6: not JSON" in read.out
    assert f"{answers}: not asked: b/broken" in read.out
    assert "4 of 4 videos judged" in read.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected either --videos NAME=DIR, to ask, or --answers FILE"),
        (["--videos=a=HERE/a", "--answers=x.jsonl"], "expected either --videos NAME=DIR"),
        (["--videos=a=HERE/a", "--prompts=HERE/no.csv"], "prompts: HERE/no.csv: no such file"),
        (["--videos=a=HERE/a"], "prompts: 2 videos have none"),
        (["--videos=a=HERE/nowhere"], "videos.a: HERE/nowhere: no such folder"),
        (["--answers=HERE/no.jsonl"], "key.json: no such file; `luve judge --videos NAME=DIR` writes it"),
        (["--videos=a=HERE/a", "--frames=0"], "expected frames >= 1"),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], videos: Path, options: list[str], message: str
) -> None:
    words = [word.replace("HERE", str(videos)) for word in options]
    outcome = run_luve(capsys, "judge", f"--output={videos / 'out'}", *words)
    assert outcome.code == 2
    (line,) = outcome.error_lines
    assert message.replace("HERE", str(videos)) in line
    assert not (videos / "out").exists()
