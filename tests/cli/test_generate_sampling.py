"""`luve generate`: the sampler, the shift and the negative prompt, as they reach the videos and their records."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luve_lightning.cascade import LuVePipeline
from luve_lightning.data.video_files import read_video
from tests.helpers.generating import PROMPT, SIZES, Luve, generating


@pytest.fixture
def luve(capsys: pytest.CaptureFixture[str], tiny_cascade: Path, tmp_path: Path) -> Luve:
    """Runs the verb with options."""
    return partial(generating(capsys, tiny_cascade, tmp_path / "out", lossless="true"), PROMPT)


def made(folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The frames of the only video of a folder, and its record."""
    (video,) = folder.glob("*.mp4")
    return read_video(video)[0], json.loads(video.with_suffix(".json").read_text())


def want(cascade: Path, **options: Any) -> np.ndarray:
    """The frames that the pipeline makes."""
    pipeline = LuVePipeline.from_pretrained(cascade / "wan", cascade / "vluer")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    frames = pipeline(PROMPT, **SIZES, steps=3, skip_steps=1, generator=generator, **options).frames[0]
    return (frames * 255).round().astype(np.uint8)


def test_the_sampler_is_one_key_and_part_of_the_record(luve: Luve, tiny_cascade: Path, tmp_path: Path) -> None:
    assert (outcome := luve(sampler="euler", shift=4.0)).code == 0, outcome.err
    frames, about = made(tmp_path / "out")
    assert np.array_equal(frames, want(tiny_cascade, sampler="euler", shift=4.0))
    assert about["recipe"]["sampler"] == "euler"
    assert "--sampler=euler" in about["command"]
    levels = [4 * s / (1 + 3 * s) for s in (1, 2 / 3, 1 / 3)]
    assert [step["sigma"] for step in about["steps"]] == pytest.approx([*levels, *levels[1:]])
    outcome = luve(shift=4.0)
    assert outcome.code == 2
    assert "was made differently (sampler 'euler', now None)" in outcome.err
    assert luve(shift=4.0, output=tmp_path / "unipc").code == 0
    frames, about = made(tmp_path / "unipc")
    assert np.array_equal(frames, want(tiny_cascade, shift=4.0))
    assert "sampler" not in about["recipe"], "videos made before there was a choice are found again"


def test_a_negative_prompt_from_a_file_is_that_text(luve: Luve, tiny_cascade: Path, tmp_path: Path) -> None:
    file = tmp_path / "not.txt"
    file.write_text("red boat\n")
    shelf = tmp_path / "shelf"
    assert (outcome := luve(negative_prompt_file=file, latents=shelf)).code == 0, outcome.err
    frames, about = made(tmp_path / "out")
    assert np.array_equal(frames, want(tiny_cascade, negative_prompt="red boat"))
    assert about["recipe"]["negative_prompt"] == "red boat"
    assert "negative_prompt_file" not in about["command"], "the file may change"
    assert "--negative_prompt=red boat" in about["command"]

    assert "already there  1\n" in luve(negative_prompt="red boat").out
    stored = set(shelf.rglob("*.safetensors"))
    file.write_text("boat slowly")
    assert "was made differently (negative_prompt" in luve(negative_prompt_file=file).err
    assert luve(negative_prompt_file=file, latents=shelf, output=tmp_path / "other").code == 0
    assert len(set(shelf.rglob("*.safetensors")) - stored) == 2, "latents of another negative prompt were taken"
    other, _ = made(tmp_path / "other")
    assert not np.array_equal(other, frames)


def test_impossible_wishes_are_one_line_before_anything_is_loaded(
    luve: Luve, monkeypatch: pytest.MonkeyPatch, tiny_cascade: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_cascade / "wan", backbone := tmp_path / "wan")
    place = backbone / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "use_dynamic_shifting": True}))
    (tmp_path / "n.txt").write_text("blur")
    monkeypatch.setattr(LuVePipeline, "from_pretrained", None)
    wishes = [
        (
            {"negative_prompt": "a", "negative_prompt_file": tmp_path / "n.txt"},
            "negative_prompt: given as a text and by the file",
        ),
        ({"negative_prompt_file": tmp_path / "gone.txt"}, "gone.txt: no such file"),
        ({"sampler": "heun"}, "sampler"),
        (
            {"backbone": backbone, "shift": 5.0},
            "shift: the backbone's scheduler, UniPCMultistepScheduler, does not follow it with use_dynamic_shifting",
        ),
        ({"backbone": backbone, "sampler": "euler"}, "does not follow it with use_dynamic_shifting"),
    ]
    for options, message in wishes:
        outcome = luve(**options)
        assert outcome.code == 2, message
        (line,) = outcome.error_lines
        assert message in line


def test_the_spectrum_hands_over_and_the_record_says_where(luve: Luve, tiny_cascade: Path, tmp_path: Path) -> None:
    options = {"experts": tiny_cascade / "experts", "steps": 6, "switch": "spectrum", "switch_options.rate": 1e6}
    options |= {"switch_options.patience": 1, "switch_options.band": 0.75, "switch_options.high": 0.99}
    assert (outcome := luve(**options)).code == 0, outcome.err
    about = made(tmp_path / "out")[1]
    refined = [step for step in about["steps"] if step["stage"] == "refined"]
    assert [step["expert"] for step in refined] == ["lfe"] * 2 + ["hfe"] * (len(refined) - 2)
    assert about["handover"] == refined[2]["sigma"]
    assert about["recipe"]["switch"] == "spectrum"
    assert about["recipe"]["switch_options"]["patience"] == 1
    assert "--switch=spectrum" in about["command"]
    # The same video by the switch that was found.
    fixed = luve(experts=tiny_cascade / "experts", steps=6, switch=refined[1]["timestep"] / 1000, output=tmp_path / "b")
    assert fixed.code == 0
    assert "handover" not in made(tmp_path / "b")[1]
    assert made(tmp_path / "b")[1]["sha256"] == about["sha256"]
    for more, message in (
        ({"experts": None}, "switch spectrum: there are no experts between which to hand over"),
        ({"switch": 0.8}, "switch_options: they are for switch spectrum, got switch 0.8"),
    ):
        outcome = luve(**options | more, output=tmp_path / "refused")
        assert outcome.code == 2
        assert message in outcome.err.splitlines()[-1]


def test_a_cache_is_refused_before_weights_are_loaded(luve: Luve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luve_lightning.cli.generate.load_pipeline", lambda *_: pytest.fail("weights are loaded"))
    for options, message in (
        ({"switch": "spectrum"}, "switch spectrum: a cache repeats predictions from step to step"),
        ({"refinement": "demofusion"}, "demofusion: a cache between steps would mix its crops"),
    ):
        outcome = luve(**options, **{"speed.cache": "taylorseer"})
        assert outcome.code == 2
        (line,) = outcome.error_lines
        assert message in line
