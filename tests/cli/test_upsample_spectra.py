"""`luve spectra` on the tiny backbone."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.run_luve import Outcome, run_luve
from tests.helpers.tiny_spectra import tiny_pipeline
from tests.helpers.tiny_wan import flow_scheduler

Luve = Callable[..., Outcome]


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny backbone with a scheduler and a transformer whose predictions change."""
    folder = tmp_path_factory.mktemp("spectra") / "backbone"
    folder.mkdir()
    for part in ("vae", "text_encoder", "tokenizer"):
        (folder / part).symlink_to(tiny_backbone / part)
    tiny_pipeline(tiny_backbone).transformer.save_pretrained(folder / "transformer")
    flow_scheduler(3.0).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def luve(capsys: pytest.CaptureFixture[str], backbone: Path, tmp_path: Path) -> Luve:
    """Runs the verb; keyword arguments replace or add options."""

    def run(**options: object) -> Outcome:
        given: dict[str, object] = {"backbone": backbone, "output": tmp_path / "out", "device": "cpu"}
        given |= {"prompts": '["left", "squares drift"]', "height": 32, "width": 48, "frames": 5, "steps": 3}
        return run_luve(capsys, "spectra", *(f"--{k}={v}" for k, v in (given | options).items()))

    return run


@pytest.mark.slow
def test_it_writes_table_plot_and_switch(luve: Luve, tmp_path: Path) -> None:
    outcome = luve(edges="[0, 0.5, 1]", share=0.3)
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["spectra.csv", "spectra.png", "switch.json"]
    with (tmp_path / "out" / "spectra.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2
    switch = json.loads((tmp_path / "out" / "switch.json").read_text())
    assert switch["share"] == 0.3
    assert switch["settings"]["shift"] == 3.0
    assert switch["settings"]["prompts"] == ["left", "squares drift"]
    # sigma 0.875 lies between the steps: what is said of it must, too.
    low = [float(row["resolved"]) for row in rows if row["band"] == "0-0.5"]
    assert min(low) <= switch["released"]["low"] <= max(low)
    assert outcome.out.startswith(f"sigma_switch {switch['sigma']:.3f} (95 % interval ")
    assert "at the released 0.875: 0-0.5 resolved to" in outcome.out
    assert "2 videos of 3 steps" in outcome.out


def test_a_shift_replaces_the_backbones_own(luve: Luve, tmp_path: Path) -> None:
    assert luve(edges="[0, 0.5, 1]", prompts='["left"]', shift=7.0).code == 0
    switch = json.loads((tmp_path / "out" / "switch.json").read_text())
    assert switch["settings"]["shift"] == 7.0
    assert switch["sigma_low"] is None, "one video has no interval, and NaN is no JSON"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "steps: expected at least 2 denoising steps, got 1"),
        ({"prompts": "[]"}, "prompts: expected at least one"),
        ({"share": 1.5}, "share: expected a number between 0 and 1, got 1.5"),
        ({"shift": 0}, "shift: expected a number greater than 0, got 0"),
        ({"shift": ".nan"}, "shift: expected a number, got nan"),
        ({"height": 20}, "height 20: expected a multiple of 8, nearest are 16 and 24"),
        ({"frames": 6}, "6 frames: expected 4k + 1, nearest are 5 and 9"),
        ({"device": "tpu9"}, "device: expected auto, cpu, cuda or cuda:N"),
        ({"backbone": "nowhere"}, "backbone nowhere: no such folder"),
    ],
)
def test_errors_are_one_line(luve: Luve, tmp_path: Path, options: dict[str, object], message: str) -> None:
    outcome = luve(**options)
    assert outcome.code == 2
    (line,) = [line for line in outcome.error_lines if "Loading" not in line]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_backbone_without_a_scheduler(luve: Luve, tiny_backbone: Path) -> None:
    outcome = luve(backbone=tiny_backbone)
    assert outcome.code == 2
    assert "no scheduler/scheduler_config.json there; give the schedule's --shift instead" in outcome.err
