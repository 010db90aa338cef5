"""The attention of `luve generate`'s models: used, recorded, repeated, and replaced by name."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from luve_lightning.models.backbones import load_backbone
from tests.helpers.attending import FrameAttention
from tests.helpers.run_luve import Outcome, run_luve

PROMPT = "a red boat sails slowly"


def made(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The only video of a folder and its JSON file's content."""
    (video,) = folder.glob("*.mp4")
    return video, json.loads(video.with_suffix(".json").read_text())


@pytest.mark.slow
def test_it_is_that_of_the_refiner_or_asked_for_by_name(
    capsys: pytest.CaptureFixture[str], tiny_cascade: Path, tmp_path: Path
) -> None:
    """It is printed, recorded and repeated, and stages made with another one are not taken for the same."""

    def luve(**options: Any) -> Outcome:
        models = {"backbone": tiny_cascade / "wan", "vluer": tiny_cascade / "vluer"}
        sizes = {"height": 64, "width": 96, "num_frames": 5, "steps": 3, "skip_steps": 1, "device": "cpu"}
        given = models | sizes | options
        return run_luve(capsys, "generate", PROMPT, *(f"--{key}={value}" for key, value in given.items()))

    denoiser = load_backbone(tiny_cascade / "refiner").denoiser()
    denoiser.use_attention(FrameAttention())
    denoiser.save(tmp_path / "framed", torch.float32)
    saved = luve(refiner=tmp_path / "framed", output=tmp_path / "saved", latents=tmp_path / "shelf")
    assert saved.code == 0, saved.err
    assert "attention: Dense in the transformer, FrameAttention in the refiner" in saved.out
    video, about = made(tmp_path / "saved")
    assert about["attention"]["refiner"] == {"name": "FrameAttention", "frames": 1}
    assert "attention" not in about["recipe"]

    asked = json.dumps({"class_path": "tests.helpers.attending.FrameAttention", "init_args": {"frames": 1}})
    options = {"attention": asked, "output": tmp_path / "asked", "latents": tmp_path / "shelf"}
    outcome = luve(refiner=tiny_cascade / "refiner", **options)
    assert outcome.code == 0, outcome.err
    other, about = made(tmp_path / "asked")
    assert other.read_bytes() == video.read_bytes()
    assert about["recipe"]["attention"] == {"name": "FrameAttention", "frames": 1}
    assert [stage["seconds"] is None for stage in about["stages"]] == [True, True, False, False]
    repeated = run_luve(capsys, *shlex.split(about["command"])[1:], "--output", tmp_path / "again")
    assert repeated.code == 0, repeated.err
    assert made(tmp_path / "again")[0].read_bytes() == video.read_bytes()

    # Where one transformer does everything, the first stage is another, too.
    alone = luve(**options | {"output": tmp_path / "alone"})
    assert "attention: FrameAttention in the transformer" in alone.out
    assert [stage["seconds"] is None for stage in made(tmp_path / "alone")[1]["stages"]] == [False] * 4
    dense = luve(refiner=tmp_path / "framed", output=tmp_path / "dense", attention="dense")
    assert dense.code == 0, dense.err
    assert made(tmp_path / "dense")[0].read_bytes() != video.read_bytes()
    experts = {"experts": tiny_cascade / "experts", "refiner": tmp_path / "framed", "output": tmp_path / "experts"}
    refused = luve(**experts)
    assert refused.code == 2
    assert "trained with the attention Dense, the transformer has FrameAttention:" in refused.err
    assert luve(**experts, attention=asked).code == 0
    for name, message in (
        ("windows", "attention Windows: .*'cuts'"),
        ("none", "attention 'none': expected one of (.*, )?Dense, (.*, )?Tiles, (.*, )?Windows"),
    ):
        outcome = luve(attention=name, output=tmp_path / "wrong")
        assert outcome.code == 2
        assert re.search(message, outcome.err)
