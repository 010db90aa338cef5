"""A rehearsal refuses what cannot go well before it begins, and resumes where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.run_luve import run_luve

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", "0"], "devices: expected at least 1, got 0"),
        (["--devices", "9999"], "devices: "),
        (["--video_devices", "9999"], "video_devices: "),
        (["--video_steps", "0"], "video_steps: expected at least 1, got 0"),
        (["--clips", "0"], "clips: expected at least 1, got 0"),
        (["--limit", "0"], "limit: expected seconds above 0, got 0"),
        (["--stages", ","], "stages: expected one or more of material, index, "),
        (["--backbone", "nowhere"], "backbone nowhere: no such folder; expected a diffusers pipeline folder"),
        (["--backbone", "experiments"], "backbone experiments: no model_index.json in it"),
        (["--gpu", "none.jsonl"], "gpu: no such file: none.jsonl"),
        (
            ["--gpu", "/missing"],
            "gpu: no such file: /missing; expected h200 or a file that luve bench --subject speed ",
        ),
        (["--data", "nowhere"], "data: no such file or folder: nowhere"),
        (["--changes.scor", "{}"], "changes: no stage 'scor'; did you mean 'score'?"),
        (["--changes.score", "{batch_siz: 2}"], "changes.score: batch_siz: unknown key; did you mean 'batch_size'?"),
        (["--changes.index", "{processes: few}"], "processes: expected a whole number or null, got 'few'"),
        (["--changes.material", "{clip: 3}"], "changes.material: no key 'clip'; did you mean 'clips'?"),
        (["--changes.material", "{clips: few}"], "changes.material: clips: expected 0 or more, got 'few'"),
        (["--changes.material", "{size: 3}"], "changes.material: size: expected a height and a width, got 3"),
        (["--changes.material", "{size: [192]}"], "material: size: expected a height and a width, got [192]"),
        (["--changes.material", "{fps: x}"], "changes.material: fps: expected a number in (0, 240], got 'x'"),
    ],
)
def test_a_rehearsal_that_cannot_go_well_is_refused_before_it_begins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], message: str
) -> None:
    monkeypatch.chdir(REPOSITORY)
    outcome = run_luve(capsys, "rehearse", *words, "--output", tmp_path / "rehearsal")
    assert outcome.code == 2
    assert message in outcome.err
    assert "gpu_tflops" not in outcome.err  # an option of luve plan
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "rehearsal/stages").exists()


@pytest.mark.parametrize("verb", ["rehearse", "scaling"])
def test_a_file_is_no_folder_for_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    monkeypatch.chdir(REPOSITORY)
    file = tmp_path / "file"
    file.write_text("mine")
    folders = [rehearsed(tmp_path, 1, 2.0), rehearsed(tmp_path, 2, 2.5)] if verb == "scaling" else []
    outcome = run_luve(capsys, verb, *folders, "--output", file)
    assert outcome.code == 2
    assert outcome.error_lines == [f"luve {verb}: error: output: {file} is a file; expected a folder"]


@pytest.mark.parametrize(
    ("gpus", "words", "message"),
    [
        (0, ["--devices", "9999"], "devices: without a GPU each is a process, here at most "),
        (0, ["--video_devices", "2"], "video_devices: one video is spread over GPUs, and there is none here"),
        (4, ["--video_devices", "8"], "video_devices: here are 4 GPUs, got 8"),
        (4, ["--video_devices", "3"], "video_devices 3: the transformer's 4 attention heads are spread evenly; "),
        (
            8,
            ["--backbone", "wan2.1-1.3b", "--video_devices", "8"],
            "12 attention heads are spread evenly; expected one",
        ),
    ],
)
def test_more_than_is_here_or_can_share_a_video_is_refused_before_it_begins(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    gpus: int,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("luve_lightning.cli.rehearse.visible_gpus", lambda: ["NVIDIA H100 80GB HBM3"] * gpus)
    outcome = run_luve(capsys, "rehearse", *words, "--output", tmp_path / "rehearsal")
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "rehearsal/stages").exists()


def rehearsed(folder: Path, devices: int, seconds: float) -> Path:
    """A rehearsal's folder with the table of one training."""
    facts = {"of": "mini, mini, dense", "gpu": "CPU", "versions": "torch", "python": "3", "video_devices": "1"}
    facts |= {"clips": "10", "revision": "abc", "devices": str(devices)}
    row = {"stage": "lfe", "status": "done", "unit": "step", "processes": devices, "measured_seconds": seconds}
    made = folder / str(devices)
    made.mkdir()
    (made / "rehearsal.json").write_text(json.dumps({**facts, "rows": [row]}))
    return made


def test_rehearsals_stand_side_by_side(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folders = [rehearsed(tmp_path, 1, 2.0), rehearsed(tmp_path, 2, 2.5)]
    outcome = run_luve(capsys, "scaling", *folders, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "80%" in outcome.out
    page = (tmp_path / "out/scaling.md").read_text()
    assert page.startswith("# Scaling: mini, mini, dense\n")
    assert "| lfe | 2 |  | 2.5 a step |" in page
    refused = run_luve(capsys, "scaling", folders[0], tmp_path / "none", "--output", tmp_path / "out")
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert "none; expected a folder of luve rehearse" in refused.err


@pytest.mark.slow
def test_a_rehearsal_runs_stops_and_resumes_stages_of_the_recipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_clips: Path
) -> None:
    """Two of its stages, by the real command: all of them are `make rehearse`."""
    monkeypatch.chdir(REPOSITORY)
    root = tmp_path / "rehearsal"
    words = ["rehearse", "--data", tiny_clips / "clips", "--stages", "score", "--output", root]
    outcome = run_luve(capsys, *words, "--changes.score", "{batch_size: 1}")
    assert outcome.code == 0, outcome.out + outcome.err
    rows = {row["stage"]: row for row in json.loads((root / "rehearsal.json").read_text())["rows"]}
    assert [row["status"] for row in rows.values()] == ["done", "done"]
    # Of the clips after a process's first. How far the stopped one came, even to the end, depends on the machine.
    made = json.loads((root / "stages" / "score" / "row.json").read_text())["records"][-1]["made"]
    assert bool(rows["score"]["measured_seconds"]) == (made != 1)
    page = (root / "rehearsal.md").read_text()
    assert "| index | ok |" in page
    assert "luve score --config experiments/score/mini.yaml" in page
    assert run_luve(capsys, *words, "--changes.score", "{batch_size: 1}").out.count("done already") == 1
    refused = run_luve(capsys, *words, "--changes.scores", "{}")
    assert refused.code == 2
    assert "changes: no stage 'scores'; did you mean 'score'?" in refused.err
