"""AdamW as tasks use it, with one kernel for all weights or without: luve_lightning.tasks.optimizer_states."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from luve_lightning.tasks.optimizer_states import adamw, fusible, skips_marked
from tests.helpers.resumable import CropsTask, Run, train


def test_one_kernel_takes_the_same_steps_up_to_rounding() -> None:
    torch.manual_seed(0)
    one, other = (nn.Parameter(torch.ones(16, 8)) for _ in range(2))
    optimizers = [adamw([{"params": [p]}], 1e-2, (0.9, 0.99), p is other) for p in (one, other)]
    for _ in range(15):
        one.grad = torch.randn(16, 8)
        other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(other, one, rtol=0, atol=1e-6)


def test_gradients_are_clipped_in_mixed_precision(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=2, trainer={"precision": "bf16-mixed"}, task={"fused": True})
    assert train(run).global_step == 2


@pytest.mark.parametrize("first", [False, True])
def test_a_run_goes_on_with_the_other_kernel(tmp_path: Path, first: bool, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, steps=12, every_n_steps=6, trainer={"max_steps": 6}, task={"fused": first})
    train(run, CropsTask(**run.task))
    run = run.with_(resume="last", trainer={}, task={"fused": not first})
    trainer = train(run, CropsTask(**run.task))
    assert trainer.global_step == 12
    [optimizer] = trainer.optimizers
    assert skips_marked(optimizer) is not first
    assert {float(state["step"]) for state in optimizer.state.values()} == {12.0}
    assert "fused" not in caplog.text


def test_a_marked_step_changes_nothing() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = adamw([{"params": [weight]}], lr=0.1, betas=(0.9, 0.99), fused=True)
    for mark in (0.0, 1.0):
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, torch.nan if mark else 1.0)
        optimizer.found_inf = torch.tensor(mark)
        optimizer.step()
        assert torch.equal(weight, before) is bool(mark)
        state = optimizer.state[weight]
        assert float(state["step"]) == 1
        assert state["exp_avg"].isfinite().all()


def test_without_a_gpu_or_with_scaled_gradients_there_is_a_kernel_for_each(tmp_path: Path) -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    assert not fusible(trainer, [nn.Parameter(torch.ones(1))])
    assert fusible(trainer, [])
    trainer.precision_plugin.scaler = object()
    assert not fusible(trainer, [])
    assert not skips_marked(adamw([{"params": [nn.Parameter(torch.ones(1))]}], 0.1, (0.9, 0.99)))
