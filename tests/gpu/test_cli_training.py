"""`luve fit` on a GPU: two steps of every task in bfloat16, beside float32, with validation, checkpoint and export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luve_lightning.__main__ import main
from luve_lightning.callbacks import AtomicCheckpointIO
from tests.helpers.gpu_runs import PRECISIONS, TASKS, GpuWorld, losses, make_world
from tests.helpers.run_luve import Outcome, run_luve


@pytest.fixture(scope="module")
def gpu_world(tmp_path_factory: pytest.TempPathFactory, tiny_clips: Path) -> GpuWorld:
    """Made by `luve precompute` and `luve embed` in bfloat16."""
    return make_world(tmp_path_factory.mktemp("gpu"), tiny_clips, lambda *words: Outcome(main(list(words)), "", ""))


@pytest.mark.parametrize("task", TASKS)
def test_two_steps_in_bfloat16(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu_world: GpuWorld, task: str
) -> None:
    for name, value in gpu_world.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    found = {}
    for precision in PRECISIONS:
        run = tmp_path / precision
        words = gpu_world.words(task, tmp_path / f"{precision}.yaml", precision=precision, default_root_dir=str(run))
        outcome = run_luve(capsys, *words)
        assert outcome.code == 0, outcome.err
        found[precision] = losses(run)
        checkpoint = AtomicCheckpointIO().load_checkpoint(run / "checkpoints" / "last.ckpt")
        assert checkpoint["global_step"] == 2
        trained = [x for x in checkpoint["state_dict"].values() if x.is_floating_point()]
        assert trained
        assert all(x.dtype == torch.float32 and bool(x.isfinite().all()) for x in trained)
    half, single = (found[precision] for precision in PRECISIONS)
    assert len(half) == len(single) == 2
    # The first step's noise is the same; the mean of thousands of squares is nearer than bfloat16's eps, 1/128.
    assert half[0] == pytest.approx(single[0], rel=0.02)
    assert half[1] == pytest.approx(single[1], rel=0.1)
