"""`luve random-models`, and what the other commands make of its folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from luve_lightning.models.backbones import load_backbone
from tests.helpers.run_luve import run_luve

SIZES = ("--height", 64, "--width", 96, "--motion_height", 32, "--motion_width", 48, "--num_frames", 5)


@pytest.mark.slow
def test_a_video_from_random_models_and_its_plan(
    tiny_cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--backbone", tiny_cascade / "wan", "--vluer", tiny_cascade / "vluer", "--dtype", "float32")
    attention = ("--attention.class_path", "luve_lightning.models.attention.dense.Dense")
    outcome = run_luve(capsys, "random-models", "--output", tmp_path / "a", *sizes, *attention)
    assert outcome.code == 0, outcome.err
    assert "experts/hfe" in outcome.out
    backbone, refiner = (load_backbone(tmp_path / "a" / name).denoiser().module for name in ("backbone", "refiner"))
    assert refiner.config["luve_attention"] == {"name": "Dense"}
    original = load_backbone(tiny_cascade / "wan").denoiser().module.state_dict()
    for module in (backbone, refiner):
        assert {name: weight.shape for name, weight in module.state_dict().items()} == {
            name: weight.shape for name, weight in original.items()
        }
    for file in (tmp_path / "a").rglob("*.safetensors"):
        flat = [name for name, weight in load_file(file).items() if weight.ndim > 1 and not weight.any()]
        assert not flat, f"{file}: a model that starts as nothing is no measure"

    models = [f"--{name}={tmp_path / 'a' / name}" for name in ("backbone", "vluer", "refiner", "experts")]
    options = (*models, *SIZES, "--steps", 4, "--skip_steps", 1)
    out = tmp_path / "out"
    assert run_luve(capsys, "generate", *options, "--device", "cpu", "--output", out, "a red boat .").code == 0
    (record,) = out.glob("*.json")
    assert {step["expert"] for step in json.loads(record.read_text())["steps"]} == {None, "lfe", "hfe"}

    plan = ("plan", *options, "--dtype", "float32", "--gpu", "h200", "--made", record)
    outcome = run_luve(capsys, *plan)
    assert outcome.code == 0, outcome.err
    table = [line.split() for line in outcome.out.partition("planned s")[2].splitlines()]
    took = {line[0]: float(line[2]) for line in table[1:]}
    stages = {stage["stage"]: stage["seconds"] for stage in json.loads(record.read_text())["stages"]}
    assert took["refine"] == pytest.approx(stages["refined"], abs=0.01)
    assert took["together"] == pytest.approx(sum(stages.values()), abs=0.03)
    outcome = run_luve(capsys, *plan, "--steps", 5)
    assert outcome.code == 2
    assert "made: the plan has motion [2, 4, 6] in 5 steps, the video's record motion [2, 4, 6] in 4 st" in outcome.err


def test_an_attention_that_does_not_fit_writes_nothing(
    tiny_cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    windows = '{"class_path": "luve_lightning.models.attention.windows.Windows", "init_args": %s}'
    wrong = windows % '{"cuts": [[1, 2, 2]], "dense_layers": [50]}'
    words = ("--backbone", tiny_cascade / "wan", "--output", tmp_path / "new", "--attention", wrong)
    outcome = run_luve(capsys, "random-models", *words)
    assert outcome.code == 2
    assert "dense_layers: expected layers of a transformer of" in outcome.error_lines[-1]
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_seed_decides_the_weights(tiny_cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("random-models", "--backbone", tiny_cascade / "wan", "--vluer", tiny_cascade / "vluer")
    state = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run_luve(capsys, *words, "--output", tmp_path / name, "--seed", seed).code == 0
    assert torch.equal(torch.get_rng_state(), state)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.safetensors")]
    assert len(files) == 7
    for file in files:
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b
        assert a != c
    assert run_luve(capsys, *words, "--output", tmp_path / "d", "--refiner_alone", "true").code == 0
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["experts", "refiner"]
    refused = run_luve(capsys, *words, "--output", tmp_path / "a")
    assert refused.code == 2
    assert refused.error_lines[-1].endswith(f"output {tmp_path / 'a'}: expected a new or empty folder")
