"""`luve bench --subject loading` with small latents and clips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from luve_lightning.analysis.benchmarks import loading
from luve_lightning.cli.costs import bench
from luve_lightning.data.clips import probe_clip, read_clip

SMALL = {"latents": (3, 16, 24), "pairs": (3, 64, 64), "samples": 2, "tokens": 16, "heights": (144,), "frames": 9}


@pytest.mark.slow
def test_rows_of_training_and_of_reading(capsys: pytest.CaptureFixture[str]) -> None:
    options = SMALL | {"codecs": ("h264", "hevc"), "workers": 1, "steps": 3, "step_seconds": 0.01}
    bench("loading", device="cpu", repeats=1, gpu_seconds=1e-6, cores=4, **options)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    reading = ["decode", "decode, crop and resize", "precompute"]
    assert [row["what"] for row in rows] == ["experts", "vluer", *reading, *reading]
    experts, vluer, *clips = rows
    # float16 latents and bfloat16 embeddings; low and high latents of a crop, as they are stored.
    assert experts["mib_per_batch"] == pytest.approx(2 * (16 * 3 * 16 * 24 + 16 * 4096) / 2**20, abs=0.05)
    assert vluer["mib_per_batch"] == pytest.approx(2 * 16 * 3 * (64 * 64 + 32 * 32) / 2**20, abs=0.05)
    for row in (experts, vluer):
        assert row["waiting"] == pytest.approx(row["waited_ms"] / (row["waited_ms"] + 10), abs=1e-3)
    assert [(row["codec"], row["size"]) for row in clips] == [("h264", [9, 144, 256])] * 3 + [
        ("hevc", [9, 144, 256])
    ] * 3
    for decode, fitted, precompute in (clips[:3], clips[3:]):
        assert decode["core_seconds"] <= fitted["core_seconds"]
        assert fitted["to"] == precompute["to"] == [96, 144]
        assert precompute["seconds_a_window"] == pytest.approx(precompute["core_seconds"] / 4, abs=1e-3)
        # The start of a process is subtracted, which leaves nothing of so short a clip when the machine is busy.
        assert precompute["bound"] == ("reading" if precompute["of_gpu_time"] >= 1 else "gpu")


def test_the_slower_of_reading_and_encoding_is_what_is_waited_for() -> None:
    assert loading.bound(4.0, 4, 0.5)["bound"] == "reading"
    assert loading.bound(4.0, 8, 4.25) == {
        "cores": 8, "seconds_a_window": 0.5, "gpu_seconds": 4.25, "of_gpu_time": 0.118, "bound": "gpu"
    }  # fmt: skip


def test_clips_are_what_the_rows_say(tmp_path: Path) -> None:
    for codec in loading.ENCODERS:
        clip = loading._write_clip(tmp_path / f"{codec}.mp4", codec, 144, 9)
        info = probe_clip(clip.path)
        assert (info.codec, info.frames, info.fps, info.height, info.width) == (codec, 9, 24, 144, 256)
        first, last = read_clip(clip.path, 0, 9)[[0, 8]].astype(float)
        assert abs(first - last).mean() > 10  # it moves


@pytest.mark.parametrize(("option", "value"), [("codecs", ("av1",)), ("workers", 0), ("steps", 0), ("cores", 0)])
def test_refuses_what_it_cannot_measure(option: str, value: object) -> None:
    with pytest.raises(ValueError, match="expected codecs of h264, hevc, and workers, cores, steps"):
        next(loading.measure(torch.device("cpu"), **{option: value}))  # type: ignore[arg-type]
