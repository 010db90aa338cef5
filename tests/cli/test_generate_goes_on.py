"""`luve generate` when decoding or writing fails: nothing that was denoised is lost. And where a video's time goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luve_lightning.cascade import LuVePipeline
from luve_lightning.data.video_files import VideoInProgress, read_video
from luve_lightning.functional.frames.codec import FrameCodec
from luve_lightning.models.backbones import wan_vae
from luve_lightning.models.backbones.wan_vae import WanLatentSpace
from tests.helpers.run_luve import Outcome, run_luve

SIZES = {"height": 64, "width": 96, "motion_height": 32, "motion_width": 48, "num_frames": 5}


def generate(capsys: pytest.CaptureFixture[str], cascade: Path, output: Path, **more: Any) -> Outcome:
    parts = {"backbone": cascade / "wan", "vluer": cascade / "vluer", "output": output}
    options = {**parts, "steps": 3, "skip_steps": 1, "device": "cpu", "lossless": "true", **SIZES, **more}
    return run_luve(capsys, "generate", "a red boat", *(f"--{key}={value}" for key, value in options.items()))


def made(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The only video of a folder and its JSON file's content."""
    (video,) = folder.glob("*.mp4")
    return video, json.loads(video.with_suffix(".json").read_text())


def no_room(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("more", [{}, {"speed.decode_tile": "[64, 64]"}])
def test_a_video_that_does_not_fit_goes_on_at_decoding(
    capsys: pytest.CaptureFixture[str],
    tiny_cascade: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, str],
) -> None:
    """Without any option the denoised latents wait, however the next run decodes them, and go with the video."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(WanLatentSpace, "decode", no_room)
        outcome = generate(capsys, tiny_cascade, out)
    assert outcome.code == 2
    assert "decoding takes more memory than is free on the GPU: --speed.decode_tile '[64, 64]' or" in outcome.err
    assert len(list(out.rglob("*.safetensors"))) == 1
    assert not list(out.glob("*.mp4"))
    with monkeypatch.context() as patch:
        patch.delattr(LuVePipeline, "__call__")  # nothing is denoised again
        outcome = generate(capsys, tiny_cascade, out, **more)
    assert outcome.code == 0, outcome.err
    video, about = made(out)
    assert [(s["stage"], s["seconds"] is None) for s in about["stages"]] == [("refined", True), ("decoded", False)]
    assert not list(out.rglob("*.safetensors"))
    assert generate(capsys, tiny_cascade, tmp_path / "alone", **more).code == 0
    assert video.read_bytes() == made(tmp_path / "alone")[0].read_bytes()


def test_a_video_that_cannot_be_written_goes_on_there_with_its_earlier_stages(
    capsys: pytest.CaptureFixture[str], tiny_cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "x.mp4")

    with monkeypatch.context() as patch:
        patch.setattr("luve_lightning.evaluation.sample_sources.write_video", full)
        assert generate(capsys, tiny_cascade, out, keep_stages="true").code != 0
    assert generate(capsys, tiny_cascade, out, keep_stages="true").code == 0
    video, about = made(out)
    assert [s["seconds"] is None for s in about["stages"]] == [True, True, True, False]
    assert about["steps"] == []
    assert len(list(out.rglob("*.safetensors"))) == 2
    assert generate(capsys, tiny_cascade, tmp_path / "alone").code == 0
    assert np.array_equal(read_video(video)[0], read_video(made(tmp_path / "alone")[0])[0])


def test_a_video_is_written_while_it_is_decoded(
    capsys: pytest.CaptureFixture[str], tiny_cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where frames come a few at a time: the same bytes, whatever is decoded afterwards fails or not."""
    monkeypatch.setattr(wan_vae, "suits", lambda *_: True)
    monkeypatch.setattr(wan_vae, "WHOLE_CLIP_PIXELS", 0)
    monkeypatch.setattr(FrameCodec, "at_once", lambda *_: 1)
    more = {"num_frames": 9, "lossless": "false", "contact_sheet": "true"}
    came: list[int] = []
    arrived = VideoInProgress.arrived

    def counted(self: VideoInProgress, frames: np.ndarray, there: int) -> None:
        came.append(there)
        arrived(self, frames, there)

    with monkeypatch.context() as patch:
        patch.setattr(VideoInProgress, "arrived", lambda *_: None)
        assert generate(capsys, tiny_cascade, tmp_path / "after", **more).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(VideoInProgress, "arrived", counted)
        outcome = generate(capsys, tiny_cascade, tmp_path / "beside", **more)
    assert outcome.code == 0, outcome.err
    assert came[0] < came[-1] == 9
    files = [{f.name: f for f in (tmp_path / name).iterdir() if f.is_file()} for name in ("after", "beside")]
    assert set(files[0]) == set(files[1])
    for name in files[0]:
        if name.endswith((".mp4", ".jpg")):
            assert files[0][name].read_bytes() == files[1][name].read_bytes()
    decode = WanLatentSpace.decode

    def twice(self: WanLatentSpace, latents: torch.Tensor, **more: Any) -> torch.Tensor:
        """Room for the last stage alone, which is decoded first."""
        if latents.shape[-1] != SIZES["width"] // 8:
            no_room()
        return decode(self, latents, **more)

    monkeypatch.setattr(WanLatentSpace, "decode", twice)
    outcome = generate(capsys, tiny_cascade, tmp_path / "none", contact_sheet="true")
    assert outcome.code == 2
    assert not [file for file in (tmp_path / "none").iterdir() if "seed0" in file.name]


def test_a_videos_seconds_sum_up(capsys: pytest.CaptureFixture[str], tiny_cascade: Path, tmp_path: Path) -> None:
    outcome = generate(capsys, tiny_cascade, tmp_path / "out", keep_stages="true")
    _, about = made(tmp_path / "out")
    seconds = about["seconds"]
    assert seconds["whole"] == pytest.approx(seconds["making"] + seconds["writing"], abs=0.01)
    parts = sum(seconds[name] for name in ("embedding", "storing", "showing"))
    stages = sum(stage["seconds"] for stage in about["stages"])
    assert 0 < parts + stages <= seconds["making"] + 0.01
    assert min(seconds.values()) > 0
    assert about["loading_seconds"] > 0
    assert ", written " in outcome.out
