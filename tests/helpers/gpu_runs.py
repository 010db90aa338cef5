"""`luve fit` in bfloat16 on a GPU, with the mini backbone and the tiny clips, by the experiments' own files."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.gpu import DEVICE
from tests.helpers.run_luve import Outcome, run_luve

REPOSITORY = Path(__file__).resolve().parents[2]
TASKS = {
    "vluer": ["vluer/mini.yaml"],
    "adaptation": ["experts/mini-adaptation.yaml"],
    "lfe": ["experts/mini-lfe.yaml"],
    "hfe": ["experts/mini-lfe.yaml", "experts/mini-hfe.yaml"],
    "vae": ["mini/vae.yaml"],
    "backbone": ["mini/backbone.yaml"],
}
"""Every task that can be trained, and the files under experiments/ that do."""
PRECISIONS = ("bf16-mixed", "32-true")


@dataclass(frozen=True)
class GpuWorld:
    """What the tiny overlays of the experiments refer to, as environment variables.

    Attributes:
        environment: the variables.
    """

    environment: dict[str, str]

    def words(self, task: str, overlay: Path, **trainer: Any) -> list[str]:
        """`luve fit` of a task for two steps; `overlay` is a file to write.

        Args:
            task: one of TASKS.
            overlay: holds what this machine's devices need.
            trainer: further options of the Trainer.
        """
        options = {
            "accelerator": "cpu" if DEVICE.type == "cpu" else "gpu",
            "max_steps": 2,
            "limit_train_batches": 1.0,
            "val_check_interval": 2,
        }
        nothing = {"callbacks": {"record": None}, "loggers": {"wandb": None}}  # wandb may not be installed there
        overlay.write_text(yaml.safe_dump({"trainer": options | trainer, **nothing}))
        own = [REPOSITORY / "tests" / "conf" / name for name in TASKS[task]]
        files = [*(REPOSITORY / "experiments" / name for name in TASKS[task]), REPOSITORY / "tests/conf/one_step.yaml"]
        return ["fit", *(f"--config={file}" for file in (*files, *own, overlay))]


def make_world(folder: Path, clips: Path, luve: Callable[..., Outcome]) -> GpuWorld:
    """Latents and embeddings of the tiny clips by the mini backbone, made on the device by `luve`'s own verbs."""
    backbone = REPOSITORY / "data" / "mini" / "wan"
    names = {"BACKBONE": backbone, "WORLD": clips, "LATENTS": folder / "latents", "TEXTS": folder / "texts"}
    world = GpuWorld({f"TINY_{name}": str(path) for name, path in names.items()} | {"TINY_RUN": str(folder / "run")})
    kind = {"trainer.accelerator": "cpu" if DEVICE.type == "cpu" else "gpu", "trainer.precision": "bf16-mixed"}
    configs = [f"--config={REPOSITORY / place / 'precompute/mini.yaml'}" for place in ("experiments", "tests/conf")]
    embed = {"backbone": backbone, "index": clips / "clips.csv", "store": folder / "texts", "dtype": "bfloat16"}
    embed |= {"device": DEVICE.type}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in world.environment.items():
            patch.setenv(name, value)
        for words in (
            ["precompute", *configs, *(f"--{key}={value}" for key, value in kind.items())],
            ["embed", *(f"--{key}={value}" for key, value in embed.items())],
        ):
            outcome = luve(*words)
            assert outcome.code == 0, outcome.err
    return world


def losses(run: Path) -> list[float]:
    """The logged losses of a run's steps; finite numbers."""
    (file,) = run.glob("logs/version_*/metrics.csv")
    with file.open() as lines:
        found = [float(row["train/loss"]) for row in csv.DictReader(lines) if row.get("train/loss")]
    assert all(map(math.isfinite, found)), found
    return found


def runs(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs `luve` in this process."""
    return lambda *words: run_luve(capsys, *words)
