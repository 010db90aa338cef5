"""`luve plan` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.run_luve import run_luve

SIZE = ("--height", 192, "--width", 192, "--num_frames", 17)


@pytest.fixture
def backbone(repository: Path) -> str:
    return str(repository / "data/mini/wan")


@pytest.mark.slow
def test_prints_a_table_and_writes_json(
    capsys: pytest.CaptureFixture[str], backbone: str, repository: Path, tmp_path: Path
) -> None:
    file = tmp_path / "new" / "plan.json"
    options = ["--vluer", repository / "data/mini/vluer", "--gpu", "h200", "--tile", "[12,12]", "--output", file]
    options += ["--guidance.high", 0.5, "--refine_guidance.scale", 1]
    outcome = run_luve(capsys, "plan", "--backbone", backbone, *SIZE, *options)
    assert outcome.code == 0, outcome.err
    assert "refine    5x24x24" in outcome.out
    assert "peak" in outcome.out
    found = json.loads(file.read_text())
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert stages["motion"]["latents"] == [5, 12, 12]
    assert stages["motion"]["tokens"] == 180
    assert stages["refine"]["tokens"] == 720
    assert stages["refine"]["steps"] == stages["refine"]["forwards"] == 45
    assert 50 < stages["motion"]["forwards"] < 100
    assert found["motion_frames_height_width"] == [17, 96, 96]
    assert found["seconds"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--height", 200, *SIZE[2:]), "height 200: expected a multiple of 16, nearest are 192 and 208"),
        ((*SIZE[:4], "--num_frames", 16), "num_frames 16: expected 4k + 1, nearest are 13 and 17"),
        ((*SIZE, "--motion_height", 100), "motion_height 100: expected a multiple of 16"),
        ((*SIZE, "--motion_height", 256, "--motion_width", 256), "larger than the video's 192x192"),
        ((*SIZE, "--tile", "[0,4]"), "tile: expected"),
        ((*SIZE, "--gpu", "k80"), "gpu: expected h200"),
        ((*SIZE, "--vluer", "/nowhere"), "vluer /nowhere: no config.json there"),
        ((*SIZE, "--skip_steps", 51), "skip_steps 51"),
    ],
)  # fmt: skip
def test_one_line_for_what_is_impossible(
    capsys: pytest.CaptureFixture[str], backbone: str, options: tuple[object, ...], message: str
) -> None:
    outcome = run_luve(capsys, "plan", "--backbone", backbone, *options)
    assert outcome.code == 2
    [line] = outcome.error_lines
    assert message in line


def test_a_backbone_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_luve(capsys, "plan", "--backbone", "nobody/nothing", *SIZE)
    assert outcome.code == 2
    [line] = outcome.error_lines
    assert "backbone nobody/nothing: no such folder" in line
