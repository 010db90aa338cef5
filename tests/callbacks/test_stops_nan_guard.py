"""A loss or gradient that is not finite stops the run before it does harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luve_lightning.callbacks import AtomicCheckpointIO, NonFiniteLoss
from tests.helpers.processes import run_processes
from tests.helpers.resumable import CropsTask, Run, difference, train


def report(run: Run) -> dict[str, Any]:
    [path] = run.folder.glob("nan-*.json")
    assert path.name == f"nan-{run.task['nan_at']}.json"
    return json.loads(path.read_text(), parse_constant=pytest.fail)  # type: ignore[no-any-return]


def clips(run: Run, step: int, rank: int = 0) -> list[list[str]]:
    """What a healthy run trained on in this optimiser step."""
    first = step * run.accumulate
    return [entry[3] for entry in run.trained(rank)[first : first + run.accumulate]]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_step_is_not_taken_and_its_clips_are_named(
    tmp_path: Path, where: str, accumulate: int, fused: bool
) -> None:
    healthy = Run(tmp_path / "healthy", steps=4, accumulate=accumulate)
    train(healthy)
    run = healthy.with_(
        folder=tmp_path / "sick", every_n_steps=1, steps=9, task={"nan_at": 3, "nan_in": where, "fused": fused}
    )
    task = CropsTask(**run.task)
    with pytest.raises(NonFiniteLoss) as error:
        train(run, task)
    message, content = str(error.value), report(run)
    assert "\n" not in message
    assert message.startswith("step 3: the loss is nan on rank 0 for" if where == "loss" else "step 3: the gradient's")
    assert "the step was not taken" in message
    assert str(tmp_path / "sick" / "nan-3.json") in message
    assert content["step"] == 3
    [rank] = content["ranks"]
    assert [batch["clip_ids"] for batch in rank["batches"]] == clips(healthy, 3)
    assert all(batch["loss"] == "nan" for batch in rank["batches"]) == (where == "loss")
    assert "net.0.weight" in rank["non_finite_gradients"]
    assert "train/loss" in content["logged"]
    # The weights in memory are those of the last good checkpoint, bit by bit.
    saved = AtomicCheckpointIO().load_checkpoint(run.last)
    assert saved["global_step"] == 3
    weights = {k: v for k, v in task.state_dict().items() if "running" not in k and "batches" not in k}
    assert difference({k: saved["state_dict"][k] for k in weights if "frozen" not in k},
                      {k: v for k, v in weights.items() if "frozen" not in k}) is None  # fmt: skip
    assert all(v.isfinite().all() for v in saved["state_dict"].values())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fused", [False, True])
def test_two_processes_stop_together_and_one_speaks(tmp_path: Path, rank: int, fused: bool) -> None:
    healthy = Run(tmp_path / "healthy", steps=3, processes=2)
    assert run_processes(healthy) == [0, 0]
    run = healthy.with_(
        folder=tmp_path / "sick", every_n_steps=1, steps=9, task={"nan_at": 2, "nan_rank": rank, "fused": fused}
    )
    assert run_processes(run) == [1, 0]
    outputs = [(run.folder / f"output-{r}.txt").read_text() for r in (0, 1)]
    assert [output.count("NonFiniteLoss: ") for output in outputs] == [1, 0]
    named = ", ".join(clips(healthy, 2, rank)[0])
    assert f"step 2: the loss is nan on rank {rank} for clips {named};" in outputs[0]
    assert [r["batches"][0]["clip_ids"] for r in report(run)["ranks"]] == [clips(healthy, 2, r)[0] for r in (0, 1)]
    assert AtomicCheckpointIO().load_checkpoint(run.last)["global_step"] == 2


class NoIds(CropsTask):
    """Sees batches without clip ids."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"x": batch["x"]} if isinstance(batch, dict) else batch


def test_batches_may_have_no_ids(tmp_path: Path) -> None:
    run = Run(tmp_path, task={"nan_at": 0, "nan_in": "constant"})
    with pytest.raises(NonFiniteLoss, match=r"^step 0: the loss is inf on rank 0 for clips unknown;"):
        train(run, NoIds(**run.task))
    assert report(run)["ranks"][0]["non_finite_gradients"] == []


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_ranks_agree_when_only_ones_loss_is_infinite_and_no_gradient(tmp_path: Path, fused: bool) -> None:
    run = Run(tmp_path, processes=2, task={"nan_at": 1, "nan_rank": 1, "nan_in": "constant", "fused": fused})
    assert run_processes(run) == [1, 0]
    first, second = report(run)["ranks"]
    assert (first["batches"][0]["loss"] != "inf", second["batches"][0]["loss"]) == (True, "inf")
    assert first["non_finite_gradients"] == second["non_finite_gradients"] == []
