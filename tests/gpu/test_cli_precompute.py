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

from luve_lightning.__main__ import main
from tests.helpers.gpu import BF16, error

# Means of a few thousand roundings through some twenty layers.
NEAR = 4 * BF16


def precompute(repository: Path, clips: Path, store: Path, alone: bool = True, **trainer: Any) -> list[Tensor]:
    """The latents that the command stores, in the order of their names; not alone, it starts a second process."""
    names = {"BACKBONE": repository / "data/mini/wan", "WORLD": clips, "LATENTS": store}
    places = [str(repository), *filter(None, [os.environ.get("PYTHONPATH")])]
    configs = [f"--config={repository / place / 'precompute/mini.yaml'}" for place in ("experiments", "tests/conf")]
    words = ["precompute", *configs, *(f"--trainer.{key}={value}" for key, value in trainer.items())]
    with pytest.MonkeyPatch.context() as patch:
        for name, path in names.items():
            patch.setenv(f"TINY_{name}", str(path))
        if alone:
            assert main(words) == 0
        else:
            patch.setenv("PYTHONPATH", os.pathsep.join(places))
            command = [sys.executable, "-m", "luve_lightning", *words]
            done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
    files = sorted(store.rglob("*.safetensors"), key=lambda file: str(file.relative_to(store)))
    found = [tensor.float() for file in files for _, tensor in sorted(load_file(file).items())]
    return [tensor for tensor in found if tensor.ndim >= 4]


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory: pytest.TempPathFactory, repository: Path, tiny_clips: Path) -> list[Tensor]:
    """In float32."""
    return precompute(repository, tiny_clips, tmp_path_factory.mktemp("cpu"))


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.two_gpus)])
def test_it_stores_the_cpus_latents(
    tmp_path: Path, repository: Path, tiny_clips: Path, device: torch.device, on_the_cpu: list[Tensor], devices: int
) -> None:
    kind = {"accelerator": "cpu" if device.type == "cpu" else "gpu", "devices": devices}
    options = {"strategy": "ddp" if devices == 2 else "auto", "precision": "bf16-mixed", **kind}
    got = precompute(repository, tiny_clips, tmp_path / "gpu", devices == 1, **options)
    assert len(on_the_cpu) >= 6 * 4
    assert [x.shape for x in got] == [x.shape for x in on_the_cpu]
    assert error(got, on_the_cpu) < NEAR
