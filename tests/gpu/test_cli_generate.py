"""`luve generate` on the mini backbone: what makes it fast on a GPU changes little; two GPUs make the same video."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.gpu import error
from tests.helpers.luve_process import LuveProcess, finish_together
from tests.helpers.processes import free_port
from tests.helpers.run_luve import run_luve

PROMPT = "a photograph of old coins . the camera zooms in quickly ."
SIZES = {"height": 192, "width": 192, "motion_height": 96, "motion_width": 96, "num_frames": 9}


@pytest.fixture
def words(repository: Path, device: torch.device) -> list[str]:
    """Two steps of each stage by each expert, all stages kept."""
    mini = repository / "data" / "mini"
    options: dict[str, Any] = {
        "backbone": mini / "wan",
        "vluer": mini / "vluer",
        "refiner": mini / "refiner",
        "experts": mini / "experts",
        "steps": 6,
        "skip_steps": 2,
        "guidance.scale": 4.0,
        "keep_stages": True,
        "lossless": True,
        "device": "cpu" if device.type == "cpu" else "auto",
        **SIZES,
    }
    return ["generate", f"--prompt={PROMPT}", *(f"--{key}={value}" for key, value in options.items())]


def made(folder: Path) -> tuple[dict[str, Any], list[Tensor], Tensor]:
    """The record of the only video in a folder, the latents of its stages, and its frames."""
    (video,) = folder.glob("*.mp4")
    record = json.loads(video.with_suffix(".json").read_text())
    found = [tensor for file in folder.glob("latents/*/*.safetensors") for tensor in load_file(file).values()]
    # Their files are named after all that made them, and hold a generator's state, too.
    latents = sorted((tensor for tensor in found if tensor.ndim == 5), key=Tensor.numel)
    with av.open(str(video)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return record, latents, torch.from_numpy(frames).float()


def psnr(got: Tensor, want: Tensor) -> float:
    return float(20 * torch.log10(255 / (got - want).square().mean().sqrt()))


def test_a_gpu_makes_the_cpus_video(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], device: torch.device
) -> None:
    """In float32; in bfloat16 with everything that makes it faster or smaller it is nearly the same."""
    fast = {"dtype": "bfloat16", "speed.decode_half": True}
    if device.type == "cuda":
        fast |= {"speed.compile": True, "speed.offload": True}
    runs: dict[str, dict[str, Any]] = {"cpu": {"device": "cpu"}, "gpu": {}, "half": {"dtype": "bfloat16"}, "fast": fast}
    found = {}
    for name, options in runs.items():
        given = [f"--{key}={value}" for key, value in options.items()]
        outcome = run_luve(capsys, *words, *given, f"--output={tmp_path / name}")
        assert outcome.code == 0, outcome.err
        found[name] = made(tmp_path / name)
    record, latents, frames = found["cpu"]
    assert frames.shape == (9, 192, 192, 3)
    assert len(latents) == 2
    assert [stage["stage"] for stage in record["stages"]] == [s["stage"] for s in found["fast"][0]["stages"]]
    # TF32 keeps 10 bits of a convolution's factors, and six steps with guidance of 4 add their differences up.
    assert error(found["gpu"][1], latents) < 0.03
    assert psnr(found["gpu"][2], frames) > 35
    # bfloat16 keeps 7, of the weights, too: 36 dB on a CPU. Compiled blocks round in other places.
    assert psnr(found["half"][2], frames) > 30
    assert psnr(found["fast"][2], found["half"][2]) > 30


@pytest.mark.two_gpus
def test_two_gpus_make_one_video(tmp_path: Path, words: list[str]) -> None:
    """Context parallelism by NCCL, with experts whose filters need the tokens of both."""
    port, processes = str(free_port()), [LuveProcess(tmp_path / "log", *words, f"--output={tmp_path / 'one'}")]
    for rank in range(2):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        given = (*words, "--context_parallel=2", f"--output={tmp_path / 'two'}")
        processes.append(LuveProcess(tmp_path / f"log-{rank}", *given, environment=environment))
    finish_together(processes)
    (_, one, frames), (_, two, others) = made(tmp_path / "one"), made(tmp_path / "two")
    assert error(two, one) < 0.03
    assert psnr(others, frames) > 35
