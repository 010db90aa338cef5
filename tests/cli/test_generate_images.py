"""`luve generate --num_frames 1` makes pictures; the further verbs take them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from luve_lightning.cascade.pipeline import LuVePipeline
from tests.helpers.generating import PROMPT, SIZES, Luve, generating
from tests.helpers.run_luve import run_luve

KINDS = "luve_lightning.models.attention"


@pytest.fixture
def luve(capsys: pytest.CaptureFixture[str], tiny_cascade: Path, tmp_path: Path) -> Luve:
    """Runs the verb; keyword arguments replace options, or remove them when None."""
    run = generating(capsys, tiny_cascade, tmp_path / "out", num_frames=1)
    return lambda **options: run(*([] if "prompts" in options else [PROMPT]), **options)


def made(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The only picture of a folder and its JSON file's content."""
    (picture,) = folder.glob("*.png")
    return picture, json.loads(picture.with_suffix(".json").read_text())


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
        return np.asarray(picture)


def test_one_frame_is_the_picture_that_the_pipeline_makes(luve: Luve, tiny_cascade: Path, tmp_path: Path) -> None:
    outcome = luve(seed=4, contact_sheet="true", keep_stages="true", **{"guidance.scale": 3.0})
    assert outcome.code == 0, outcome.err
    picture, about = made(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.mp4"))
    pipeline = LuVePipeline.from_pretrained(tiny_cascade / "wan", tiny_cascade / "vluer")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(4)
    want = pipeline(
        PROMPT, **SIZES | {"num_frames": 1}, steps=3, skip_steps=1, guidance=3.0, generator=generator
    ).frames[0]
    assert want.shape == (1, 64, 96, 3)
    assert np.array_equal(pixels(picture), (want[0] * 255).round().astype(np.uint8))
    assert [stage["latents"] for stage in about["stages"]] == [[16, 1, 4, 6], *[[16, 1, 8, 12]] * 3]
    assert about["recipe"]["num_frames"] == 1
    assert pixels(tmp_path / "out" / "motion" / picture.name).shape == (32, 48, 3)
    assert pixels(tmp_path / "out" / "upsampled" / picture.name).shape == (64, 96, 3)
    with Image.open(picture.with_suffix(".jpg")) as sheet:
        assert sheet.format == "JPEG"
    again = luve(seed=4, contact_sheet="true", keep_stages="true", **{"guidance.scale": 3.0})
    assert "already there  1" in again.out
    picture.write_bytes(picture.read_bytes()[:-20])  # cut short by a copy: made again
    again = luve(seed=4, contact_sheet="true", keep_stages="true", **{"guidance.scale": 3.0})
    assert "written        1 video" in again.out


@pytest.mark.slow
def test_the_command_in_the_json_file_repeats_the_picture(
    luve: Luve, capsys: pytest.CaptureFixture[str], tiny_cascade: Path, tmp_path: Path
) -> None:
    """With both experts, which act at their noise levels."""
    assert luve(experts=tiny_cascade / "experts", steps=6).code == 0
    picture, about = made(tmp_path / "out")
    used = {step["expert"] for step in about["steps"] if step["stage"] == "refined"}
    assert used == {"lfe", "hfe"}
    outcome = run_luve(capsys, *shlex.split(about["command"])[1:], "--output", tmp_path / "again")
    assert outcome.code == 0, outcome.err
    assert made(tmp_path / "again")[0].read_bytes() == picture.read_bytes()


@pytest.mark.parametrize(
    "attention",
    [
        "dense",
        {"class_path": f"{KINDS}.windows.Windows", "init_args": {"cuts": [[13, 2, 2]]}},
        {"class_path": f"{KINDS}.windows.Windows", "init_args": {"cuts": [[1, 2, 3], [7, 1, 1]]}},
        {"class_path": f"{KINDS}.tiles.Tiles", "init_args": {"tile": [4, 2, 2], "reach": [3, 3, 3]}},
    ],
    ids=["dense", "windows", "windows_of_layers", "tiles"],
)
def test_every_attention_makes_pictures(luve: Luve, tmp_path: Path, attention: Any) -> None:
    """Cuts over more frames than there are cut a single latent frame once."""
    given = attention if isinstance(attention, str) else json.dumps(attention)
    outcome = luve(attention=given, output=tmp_path / "other")
    assert outcome.code == 0, outcome.err
    assert pixels(made(tmp_path / "other")[0]).std() > 0


@pytest.mark.parametrize("upsampling", ["latent", "rgb"])
def test_baselines_and_one_stage(luve: Luve, tmp_path: Path, upsampling: str) -> None:
    assert luve(upsampling=upsampling, vluer=None).code == 0
    assert luve(cascade="false", vluer=None, output=tmp_path / "direct").code == 0
    assert pixels(made(tmp_path / "out")[0]).shape == pixels(made(tmp_path / "direct")[0]).shape == (64, 96, 3)


def test_a_picture_in_place_of_a_video_leaves_no_other_file_of_its_name(luve: Luve, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    for frames, suffix in ((5, ".mp4"), (1, ".png"), (5, ".mp4")):
        prompts.write_text(json.dumps({"prompt": "calm water", "name": "water", "num_frames": frames}))
        outcome = luve(prompts=prompts, overwrite="true")
        assert outcome.code == 0, outcome.err
        found = [path.suffix for path in (tmp_path / "out").iterdir() if path.stem == "water"]
        assert sorted(found) == sorted([".json", suffix])
