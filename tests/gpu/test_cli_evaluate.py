"""`luve upsample`, `luve evaluate` and `luve spectra` on a GPU give what they give on a CPU."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from tests.helpers.run_luve import run_luve


def configured(verb: str, repository: Path, **options: Any) -> list[str]:
    """A verb with the mini world's configuration, made tiny."""
    files = [repository / place / verb / "mini.yaml" for place in ("experiments", "tests/conf")]
    return [verb, *(f"--config={file}" for file in files), *(f"--{key}={value}" for key, value in options.items())]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_clips: Path, repository: Path) -> None:
    """What the tiny configurations refer to."""
    values = {"BACKBONE": repository / "data/mini/wan", "WORLD": tiny_clips, "RUN": tmp_path / "run"}
    for name, value in values.items():
        monkeypatch.setenv(f"TINY_{name}", str(value))
    monkeypatch.setenv("RECOGNISER", str(repository / "data/mini/recogniser"))
    monkeypatch.chdir(tmp_path)


def pixels(file: Path) -> Any:
    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)


def table(file: Path) -> dict[tuple[str, ...], float]:
    """The numbers of a table by their row and column."""
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    found = {}
    for number, row in enumerate(rows):
        for column, value in row.items():
            try:
                found[str(number), column] = float(value)
            except (TypeError, ValueError):
                continue
    return {key: value for key, value in found.items() if math.isfinite(value)}


@pytest.mark.usefixtures("environment")
def test_upsampling_and_its_measures(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, repository: Path, device: torch.device
) -> None:
    places = {"cpu": "cpu", "gpu": device.type}
    for name, where in places.items():
        words = configured("upsample", repository, output=tmp_path / name, device=where)
        outcome = run_luve(capsys, *words, f"--vluers={{vluer: {repository / 'data/mini/vluer'}}}")
        assert outcome.code == 0, outcome.err
    clips = sorted(file.relative_to(tmp_path / "cpu") for file in (tmp_path / "cpu").rglob("*.mp4"))
    assert {clip.parts[0] for clip in clips} >= {"vluer", "bilinear", "rgb_bicubic", "vae"}
    for clip in clips:
        want, got = pixels(tmp_path / "cpu" / clip), pixels(tmp_path / "gpu" / clip)
        # TF32 in convolutions; then H.264, which may decide otherwise where a pixel is one level off.
        assert np.abs(got - want).mean() < 1, clip

    numbers = {}
    for name, where in places.items():  # of the same videos
        output = tmp_path / f"{name}.csv"
        videos = f"--videos={{vluer: {tmp_path / 'cpu/vluer'}, vae: {tmp_path / 'cpu/vae'}}}"
        options = {"cache": tmp_path / f"cache-{name}", "reference": tmp_path / "cpu/reference"}
        words = configured("evaluate", repository, output=output, device=where, **options)
        outcome = run_luve(capsys, *words, videos, "--videos.bilinear=null")
        assert outcome.code == 0, outcome.err
        numbers[name] = table(output)
    assert len(numbers["cpu"]) >= 10
    assert numbers["gpu"].keys() == numbers["cpu"].keys()
    for key, want in numbers["cpu"].items():
        assert numbers["gpu"][key] == pytest.approx(want, rel=0.01, abs=1e-3), key


@pytest.mark.usefixtures("environment")
def test_spectra(capsys: pytest.CaptureFixture[str], tmp_path: Path, repository: Path, device: torch.device) -> None:
    tables = []
    for name, where in {"cpu": "cpu", "gpu": device.type}.items():
        outcome = run_luve(capsys, *configured("spectra", repository, output=tmp_path / name, device=where))
        assert outcome.code == 0, outcome.err
        files = sorted((tmp_path / name).rglob("*.csv"))
        assert files, sorted((tmp_path / name).rglob("*"))
        tables.append([table(file) for file in files])
    for want, got in zip(*tables, strict=True):
        assert got == pytest.approx(want, rel=0.05, abs=1e-3)
