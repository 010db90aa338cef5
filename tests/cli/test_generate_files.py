"""`luve generate` and `luve plan` with transformers in files of one piece, against the same ones in folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luve_lightning.data.video_files import read_video
from luve_lightning.models.backbones import load_backbone
from tests.helpers.run_luve import Outcome, run_luve
from tests.helpers.tiny_wan import tiny_transformer
from tests.helpers.wan_files import own_config, own_weights, write_weights

Luve = Callable[..., Outcome]
WINDOWS = {
    "class_path": "luve_lightning.models.attention.windows.Windows",
    "init_args": {"cuts": [[2, 1, 1], [1, 2, 3]]},
}


@pytest.fixture
def luve(capsys: pytest.CaptureFixture[str], files: Path, tiny_cascade: Path, tmp_path: Path) -> Luve:
    def run(folder: str, **options: Any) -> Outcome:
        given = {"backbone": files / "wan", "vluer": tiny_cascade / "vluer", "output": tmp_path / folder}
        given |= {"steps": 2, "skip_steps": 1, "device": "cpu", "lossless": "true", "height": 64, "width": 96}
        given |= {"motion_height": 32, "motion_width": 48, "num_frames": 5, "keep_stages": "true"} | options
        return run_luve(capsys, "generate", "a red boat", *(f"--{k}={v}" for k, v in given.items() if v is not None))

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_cascade: Path) -> Path:
    """The tiny cascade's transformers as ComfyUI names their weights, with Wan's own configuration beside them.

    Beside folders of the same weights, in half precision too: what is converted to float32 lies in memory of its own,
    whereas at the address that a mapped file happens to give a weight, kernels differ in the last bits.
    """
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(tiny_cascade / "wan", folder / "wan")
    for name, source, target in (
        ("first", tiny_cascade / "wan", folder / "wan" / "transformer"),
        ("refiner", tiny_cascade / "refiner", folder / "refiner"),
    ):
        denoiser = load_backbone(source).denoiser()
        weights = own_weights(denoiser.module, "model.diffusion_model.", torch.half)
        write_weights(folder / f"{name}.safetensors", weights)
        (folder / "config.json").write_text(json.dumps(own_config(denoiser.module)))
        denoiser.save(target, torch.half)
    return folder


def made(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """Frames of the only video of a folder, and what its JSON file says of the models."""
    (video,) = folder.glob("*.mp4")
    models: dict[str, Any] = json.loads(video.with_suffix(".json").read_text())["recipe"]["models"]
    return read_video(video)[0].tobytes(), models


def test_a_file_makes_the_video_of_its_folder(luve: Luve, files: Path, tmp_path: Path) -> None:
    assert luve("folder", refiner=files / "refiner").code == 0
    outcome = luve("file", refiner=files / "refiner.safetensors")
    assert outcome.code == 0, outcome.err
    (video, models), (expected, others) = made(tmp_path / "file"), made(tmp_path / "folder")
    assert video == expected
    assert models["backbone"] == others["backbone"]
    shutil.copytree(files, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("wan"))
    assert "0 videos" in luve("file", refiner=tmp_path / "elsewhere" / "refiner.safetensors").out, "known by content"
    latents = [sorted(path.name for path in (tmp_path / name / "latents").iterdir()) for name in ("file", "folder")]
    assert latents[0] == latents[1], "the first stages are the same, and found"


def test_the_first_stages_transformer_may_be_a_file(luve: Luve, files: Path, tmp_path: Path) -> None:
    """Beside a folder that has no weights for it; latents of other transformers are not found for it."""
    bare = tmp_path / "bare"
    shutil.copytree(files / "wan", bare)
    (bare / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    refiner = files / "refiner"
    assert luve("folder", refiner=refiner).code == 0
    outcome = luve("file", backbone=bare, transformer=files / "first.safetensors", refiner=refiner)
    assert outcome.code == 0, outcome.err
    assert made(tmp_path / "file")[0] == made(tmp_path / "folder")[0]
    stages = [{path.name for path in (tmp_path / name / "latents").iterdir()} for name in ("file", "folder")]
    assert (
        luve("other", backbone=bare, transformer=refiner, refiner=refiner, latents=tmp_path / "file/latents").code == 0
    )
    assert not stages[0] & stages[1]
    assert {path.name for path in (tmp_path / "file" / "latents").iterdir()} > stages[0]
    assert made(tmp_path / "other")[0] != made(tmp_path / "folder")[0]


def test_an_attention_of_the_configuration_acts_on_a_file(luve: Luve, files: Path, tmp_path: Path) -> None:
    """As T3-Video's weights are used: one stage, Wan's own names, windows by layer."""
    options = {"cascade": "false", "vluer": None, "attention": json.dumps(WINDOWS), "skip_steps": None}
    options |= {"motion_height": None, "motion_width": None, "keep_stages": None}
    for name, refiner in (("file", files / "refiner.safetensors"), ("folder", files / "refiner")):
        outcome = luve(name, refiner=refiner, **options)
        assert outcome.code == 0, outcome.err
        assert "Windows" in outcome.out
    assert luve("only", transformer=files / "refiner.safetensors", **options).code == 0
    assert luve("dense", refiner=files / "refiner", **options | {"attention": None}).code == 0
    frames = {path.name: made(path)[0] for path in tmp_path.iterdir()}
    assert frames["file"] == frames["folder"] == frames["only"] != frames["dense"]


def test_a_plan_reads_a_files_header_alone(capsys: pytest.CaptureFixture[str], files: Path, tmp_path: Path) -> None:
    options = ["--backbone", files / "wan", "--height", "64", "--width", "96", "--num_frames", "5"]
    folder = run_luve(capsys, "plan", *options, "--refiner", files / "refiner")
    file = run_luve(capsys, "plan", *options, "--refiner", files / "refiner.safetensors")
    assert file.code == 0, file.err
    assert file.out == folder.out
    wide = tiny_transformer(num_attention_heads=2, attention_head_dim=128, in_channels=16, out_channels=16)
    first = write_weights(tmp_path / "wide.safetensors", own_weights(wide))
    assert run_luve(capsys, "plan", *options, "--transformer", first).out != file.out


def test_mistakes_are_one_line(luve: Luve, files: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    write_weights(other, own_weights(tiny_transformer(num_attention_heads=1, attention_head_dim=128)))
    text = {"num_attention_heads": 1, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16}
    (tmp_path / "text").mkdir()
    narrow = write_weights(tmp_path / "text" / "a.safetensors", own_weights(tiny_transformer(**text)))
    lora = write_weights(tmp_path / "lora.safetensors", {"blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)})
    for options, message in (
        ({"backbone": files / "first.safetensors"}, "first.safetensors: holds a transformer, but no vae/; expected a"),
        ({"refiner": lora}, f"backbone {lora}: holds a LoRA"),
        ({"refiner": other}, f"{other}: takes 4 latent channels, the backbone gives 16"),
        ({"transformer": narrow}, f"{narrow}: takes 8 channels of a text embedding, the backbone gives 16"),
        ({"transformer": tmp_path / "none.safetensors"}, "transformer: "),
    ):
        outcome = luve("out", **options)
        assert outcome.code == 2, options
        assert message in outcome.err.splitlines()[-1]
