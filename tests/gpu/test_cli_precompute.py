"""`luve precompute` on a GPU in bfloat16 and over two GPUs, against a CPU in float32."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.gpu import BF16, error

# Means of a few thousand roundings through some twenty layers.
NEAR = 4 * BF16


def precompute(repository: Path, clips: Path, store: Path, **trainer: Any) -> list[Tensor]:
    """Run the command, as its user does; the latents that it stored, in the order of their names."""
    names = {"BACKBONE": repository / "data/mini/wan", "WORLD": clips, "LATENTS": store}
    places = [str(repository), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {f"TINY_{name}": str(path) for name, path in names.items()}
    environment |= {"PYTHONPATH": os.pathsep.join(places)}
    configs = [f"--config={repository / place / 'precompute/mini.yaml'}" for place in ("experiments", "tests/conf")]
    options = [f"--trainer.{key}={value}" for key, value in trainer.items()]
    command = [sys.executable, "-m", "luve_lightning", "precompute", *configs, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    files = sorted(store.rglob("*.safetensors"), key=lambda file: str(file.relative_to(store)))
    found = [tensor.float() for file in files for _, tensor in sorted(load_file(file).items())]
    return [tensor for tensor in found if tensor.ndim >= 4]


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.two_gpus)])
def test_it_stores_the_cpus_latents(
    tmp_path: Path, repository: Path, tiny_clips: Path, device: torch.device, devices: int
) -> None:
    want = precompute(repository, tiny_clips, tmp_path / "cpu")
    kind = {"accelerator": "cpu" if device.type == "cpu" else "gpu", "devices": devices}
    strategy = "ddp" if devices == 2 else "auto"
    got = precompute(repository, tiny_clips, tmp_path / "gpu", strategy=strategy, precision="bf16-mixed", **kind)
    assert len(want) >= 6 * 4
    assert [x.shape for x in got] == [x.shape for x in want]
    assert error(got, want) < NEAR
