"""`luve generate --refinement`: the method and its options, as they reach the video, its record and its recipe."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luve_lightning.cascade import LuVePipeline
from luve_lightning.data.video_files import read_video
from tests.helpers.generating import PROMPT, SIZES, generating
from tests.helpers.run_luve import run_luve


def made(folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    (video,) = folder.glob("*.mp4")
    return read_video(video)[0], json.loads(video.with_suffix(".json").read_text())


def test_a_method_with_options_is_recorded_and_repeated(
    capsys: pytest.CaptureFixture[str], tiny_cascade: Path, tmp_path: Path
) -> None:
    luve = generating(capsys, tiny_cascade, tmp_path / "out", lossless="true", refinement="cinescale")
    options = {"refinement_options.levels": 2, "refinement_options.ntk": 20}
    outcome = luve(PROMPT, **options)
    assert outcome.code == 0, outcome.err
    frames, about = made(tmp_path / "out")
    pipeline = LuVePipeline.from_pretrained(tiny_cascade / "wan", tiny_cascade / "vluer")
    pipeline.set_progress_bar_config(disable=True)
    want = pipeline(
        PROMPT, **SIZES, steps=3, skip_steps=1, generator=torch.Generator().manual_seed(0), refinement="cinescale",
        refinement_options={"levels": 2, "ntk": 20},
    ).frames[0]  # fmt: skip
    assert np.array_equal(frames, (want * 255).round().astype(np.uint8))
    own = {"levels": 2, "between": "bilinear", "ntk": 20, "temperature": None}
    assert {key: about["recipe"][key] for key in ("refinement", "refinement_options")} == {
        "refinement": "cinescale",
        "refinement_options": own,
    }
    assert [step["stage"] for step in about["steps"]] == ["motion"] * 3 + ["refined"] * 2 * 2
    repeated = run_luve(capsys, *shlex.split(about["command"])[1:], f"--output={tmp_path / 'again'}")
    assert repeated.code == 0, repeated.err
    assert np.array_equal(made(tmp_path / "again")[0], frames)
    # The same folder with another option, or another method, is another video.
    for other in ({"refinement_options.levels": 1}, {"refinement": "luve"}):
        outcome = luve(PROMPT, **other)
        assert outcome.code == 2
        assert "was made differently (refinement" in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refinement": "lanczos"}, "refinement: expected one of luve, cinescale, demofusion, "),
        ({"refinement_options.levels": 2}, "refinement_options: luve has no 'levels': known are none"),
        ({"refinement": "demofusion", "cascade": "false"}, "refinement demofusion: cascade is false"),
        (
            {"refinement": "demofusion", "refinement_options.overlap": "half"},
            "refinement_options.overlap: expected a number, got 'half'",
        ),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], tiny_cascade: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    outcome = generating(capsys, tiny_cascade, tmp_path / "out")(PROMPT, **options)
    assert outcome.code == 2
    last = outcome.err.splitlines()[-1]  # after the loading of weights
    assert last.startswith(f"luve generate: error: {message}")
    assert "Traceback" not in outcome.err
