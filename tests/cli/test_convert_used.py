"""A folder of the released VLUer in every verb that takes a VLUer; the class is the released one's, made narrow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan

from luve_lightning.models.vluer import ReleasedVLUer, load_vluer
from tests.helpers.noise import noise
from tests.helpers.released import SMALL, small_released
from tests.helpers.run_luve import run_luve
from tests.helpers.small_world import write_world

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE, LOW, SCALE, FRAMES = 576, 512, 1.125, 5  # 72 x 72 and 64 x 64 latents of two frames, the least that it takes
# Where the tiny backbone and this world are, over experiments/vluer/wan2.1-released.yaml.
Overlay = dict[str, Any]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def backbone(tiny_cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with a VAE of two channels: at the size that the network needs, decoding takes most time."""
    folder = tmp_path_factory.mktemp("narrow") / "wan"
    shutil.copytree(tiny_cascade / "wan", folder, ignore=shutil.ignore_patterns("vae"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderKLWan(base_dim=2, dim_mult=[1, 1, 1, 1], z_dim=16, num_res_blocks=1).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vluer/` and `world/`: a clip to train on, a clip held out."""
    made = tmp_path_factory.mktemp("used")
    small_released().save_pretrained(made / "vluer")
    write_world(made / "world", 2, FRAMES, SIZE, SIZE)
    splits = {"train": ["source-0"], "val": ["source-1"], "test": []}
    (made / "world" / "splits.json").write_text(json.dumps(splits))
    return made


@pytest.fixture
def overlay(folder: Path, backbone: Path) -> Overlay:
    """What makes the released recipe small."""
    return {
        "model": {
            "init_args": {
                "backbone": str(backbone),
                "codec_dtype": "float32",
                "net": {"init_args": {name: list(n) if isinstance(n, tuple) else n for name, n in SMALL.items()}},
                "init_from": str(folder / "vluer"),
            }
        },
        "data": {
            "init_args": {
                "index": str(folder / "world" / "clips.csv"),
                "store": str(folder / "latents"),
                "backbone": str(backbone),
                "size": [SIZE, SIZE],
                "scales": [SCALE],
                "frames": FRAMES,
                "crop": [2, 64, 64],
                "video_crop": [2, 8, 8],
                "batch_size": 1,
                "num_workers": 0,
            }
        },
    }


@pytest.fixture
def store(capsys: pytest.CaptureFixture[str], folder: Path, overlay: Overlay) -> Path:
    """The clips' latents, by `luve precompute`."""
    given = overlay["data"]["init_args"]
    words = [f"--{name}={given[name]}" for name in ("backbone", "index", "store", "size", "scales", "frames")]
    done = run_luve(capsys, "precompute", *words, "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")
    assert done.code == 0, done.err
    return Path(given["store"])


def test_generate(capsys: pytest.CaptureFixture[str], folder: Path, backbone: Path, tmp_path: Path) -> None:
    sizes = {"motion_height": LOW, "motion_width": LOW, "height": SIZE, "width": SIZE, "num_frames": FRAMES}
    given = {"backbone": backbone, "vluer": folder / "vluer", "output": tmp_path, **sizes}
    given |= {"steps": 2, "skip_steps": 1, "device": "cpu"}
    done = run_luve(capsys, "generate", "a red boat sails", *(f"--{name}={value}" for name, value in given.items()))
    assert done.code == 0, done.err
    (about,) = (json.loads(file.read_text()) for file in tmp_path.glob("*.json"))
    assert [stage["latents"] for stage in about["stages"][:2]] == [[16, 2, 64, 64], [16, 2, 72, 72]]
    refused = run_luve(
        capsys, "generate", "a boat", *(f"--{name}={value}" for name, value in (given | {"motion_height": 496}).items())
    )
    assert refused.code == 2
    assert "at least 2 latent frames of 64 x 64, got 2 of 62 x 64" in refused.error_lines[-1]


def test_upsample_and_evaluate(
    capsys: pytest.CaptureFixture[str], folder: Path, backbone: Path, tmp_path: Path
) -> None:
    given = {"backbone": backbone, "index": folder / "world" / "clips.csv", "output": tmp_path / "videos"}
    given |= {"size": f"[{SIZE}, {SIZE}]", "scale": SCALE, "frames": FRAMES, "vluers.released": folder / "vluer"}
    given |= {"baselines": "[bilinear]", "splits": "[val]", "device": "cpu"}
    done = run_luve(capsys, "upsample", *(f"--{name}={value}" for name, value in given.items()))
    assert done.code == 0, done.err
    (about,) = (json.loads(file.read_text()) for file in (tmp_path / "videos" / "released").glob("*.json"))
    assert about["recipe"]["scale"] == SCALE
    given = {f"videos.{name}": tmp_path / "videos" / name for name in ("released", "bilinear")}
    given |= {"metrics.redness": "tests.helpers.evaluation_metrics.Redness", "output": tmp_path / "table.csv"}
    given |= {"metrics.redness.log": tmp_path / "log", "replicates": 10, "device": "cpu"}
    done = run_luve(capsys, "evaluate", *(f"--{name}={value}" for name, value in given.items()))
    assert done.code == 0, done.err
    assert "released" in done.out


def test_fine_tune_by_the_released_recipe(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    store: Path,
    overlay: Overlay,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("TINY_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb"))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(overlay))
    files = [REPOSITORY / "experiments/vluer/wan2.1-released.yaml", REPOSITORY / "tests/conf/one_step.yaml"]
    words = [word for file in (*files, tmp_path / "small.yaml") for word in ("--config", file)]
    done = run_luve(capsys, "fit", *words)
    assert done.code == 0, done.err
    tuned = load_vluer(tmp_path / "run" / "vluer")
    assert type(tuned) is ReleasedVLUer
    before = small_released().state_dict()
    assert not any(torch.equal(value, before[name]) for name, value in tuned.state_dict().items())
    with torch.no_grad():
        assert tuned(noise(1, 16, 2, 64, 64), (2, 72, 72)).isfinite().all()
    # A size that it cannot take ends the run before anything is trained.
    refused = run_luve(capsys, "fit", *words, "--data.init_args.crop=[2, 32, 32]")
    assert refused.code == 2
    assert "crops of 2 x 32 x 32 latents, 2 x 36 x 36 wanted: the released VLUer takes" in refused.error_lines[-1]


def test_bench_compares_what_the_same_samples_teach(
    capsys: pytest.CaptureFixture[str], store: Path, overlay: Overlay, tmp_path: Path
) -> None:
    overlay["extends"] = str(REPOSITORY / "experiments/vluer/wan2.1-released.yaml")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(overlay))
    words = ("bench", "--subject", "vluer-train", "--device", "cpu", "--experiment", tmp_path / "small.yaml")
    done = run_luve(capsys, *words, "--steps", 2)
    assert done.code == 0, done.err
    rows = {row["method"]: row for row in map(json.loads, done.out.splitlines())}
    assert list(rows) == ["bilinear", "VLUer", "vae", "ReleasedVLUer"]
    for row in rows.values():
        assert (row["scale"], row["steps"], row["samples"], row["held_out"]) == (SCALE, 2, 2, 1)
        assert 0 < row["psnr_rgb"] < 60
    assert rows["vae"]["latent_l1"] == 0
    for name in ("VLUer", "ReleasedVLUer"):
        assert rows[name]["train_s"] > 0
        assert rows[name]["latent_l1"] != rows["bilinear"]["latent_l1"]
    overlay["data"]["class_path"] = "luve_lightning.datamodules.CaptionLatentsDataModule"
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(overlay))
    refused = run_luve(capsys, *words)
    assert refused.code == 2
    assert "data: expected LatentPairsDataModule, got luve_lightning.datamodules.Caption" in refused.error_lines[-1]
    refused = run_luve(capsys, *words, "--steps", 0)
    assert "steps: expected at least 1, got 0" in refused.error_lines[-1]
