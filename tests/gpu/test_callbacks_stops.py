"""NaNGuard on a GPU: no step that is not finite, and in the others the host waits for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from luve_lightning.callbacks import AtomicCheckpointIO, NonFiniteLoss
from luve_lightning.tasks.optimizer_states import skips_marked
from tests.helpers.resumable import CropsTask, Run, difference, train


@pytest.mark.only_gpu
@pytest.mark.parametrize("where", ["loss", "gradient", "constant"])
def test_the_device_leaves_the_step_out(tmp_path: Path, where: str) -> None:
    options = {"accelerator": "gpu", "precision": "bf16-mixed"}
    run = Run(tmp_path, steps=9, every_n_steps=1, trainer=options, task={"nan_at": 3, "nan_in": where, "fused": True})
    task = CropsTask(**run.task)
    with pytest.raises(NonFiniteLoss, match=r"^step 3: .*; the step was not taken"):
        train(run, task)
    saved = AtomicCheckpointIO().load_checkpoint(run.last)
    assert saved["global_step"] == 3
    own = {name: value.cpu() for name, value in task.state_dict().items() if name in ("net.0.weight", "net.3.weight")}
    assert difference({name: saved["state_dict"][name] for name in own}, own) is None


class StrictTask(CropsTask):
    """From its second step on PyTorch refuses to wait for the device, from the forward pass to the optimiser's end."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if self.global_step:
            torch.cuda.set_sync_debug_mode("error")
        try:
            super().optimizer_step(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.only_gpu
def test_the_host_does_not_wait_for_the_device(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=4, trainer={"accelerator": "gpu", "precision": "bf16-mixed"}, task={"fused": True})
    [optimizer] = train(run, StrictTask(**run.task)).optimizers
    assert skips_marked(optimizer)
