"""The VLUer task's validation metrics are those of the clips, however they are shared out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from luve_lightning.functional.fidelity import psnr
from tests.helpers.processes import run_processes
from tests.helpers.resumable import Run
from tests.helpers.upsampling import SCALES, TinyPairs, tiny_task, validate


@pytest.fixture(scope="module")
def wanted(tiny_backbone: Path) -> dict[str, float]:
    """Means over a plain loop."""
    task, values = tiny_task(tiny_backbone).eval(), {}
    for item in TinyPairs(tiny_backbone, clips=3).items:
        with torch.no_grad():
            prediction = task.net(item["lr"][None], tuple(item["hr"].shape[1:]))
            video = task.codec.decode(prediction)
        scores = ((prediction[0] - item["hr"]).abs().mean().item(), psnr(video, item["video"][None]).item())
        for suffix in ("", f"_x{float(item['scale']):g}"):
            for name, score in zip(("latent_l1", "psnr_rgb"), scores, strict=True):
                values.setdefault(f"val/{name}{suffix}", []).append(score)
    assert len(values) == 2 * (1 + len(SCALES))
    return {name: sum(column) / len(column) for name, column in values.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "shards",
    [
        [[0, 1, 2, 3, 4, 5]],
        [[0, 1, 2], [3, 4, 5]],  # one scale each
        [[0, 1, 2, 3, 4], [5, 0]],  # uneven, one clip twice, met in another order
    ],
)
def test_metrics_do_not_depend_on_the_processes(
    shards: list[list[int]], wanted: dict[str, float], tiny_backbone: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path, processes=len(shards), task={"backbone": tiny_backbone, "shards": shards})
    assert run_processes(run, validate) == [0] * len(shards), (run.folder / "output-0.txt").read_text()
    for rank in range(len(shards)):
        metrics = json.loads((tmp_path / f"metrics-{rank}.json").read_text())
        assert metrics == pytest.approx(wanted, rel=1e-4)
