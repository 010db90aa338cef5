"""Training the recogniser: labels in the captions' words, and losses that fall."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luve_lightning.datamodules.painted_scenes import PaintedViews
from luve_lightning.models.recogniser import RecognisedLabels, Recogniser
from luve_lightning.tasks.recogniser import RecogniserTask, world_labels


def test_every_part_of_a_combination_has_its_sentence() -> None:
    labels = world_labels()
    assert labels.sizes() == {"photographs": 17, "motions": 9, "sprites": 9, "faults": 7}
    assert all(len(set(kind)) == len(kind) for kind in (labels.photographs, labels.motions, labels.sprites))
    assert "the camera turns clockwise" in labels.motions
    assert "a red heart is in front" in labels.sprites


def test_training_goes_on_from_a_saved_network(tmp_path: Path) -> None:
    first = RecogniserTask(spotted=8)
    first.export(tmp_path, None)
    again = RecogniserTask(init_from=tmp_path / "recogniser.safetensors")
    assert all(p.requires_grad for p in again.parameters())
    for name, weight in again.net.state_dict().items():
        torch.testing.assert_close(weight, first.net.state_dict()[name], rtol=1e-3, atol=1e-4)
    other = Recogniser(RecognisedLabels(("a",), ("b",), ("c",), ("d",)))
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="another world's labels"):
        RecogniserTask(init_from=tmp_path / "other.safetensors")


@pytest.mark.slow
def test_the_losses_fall_on_one_batch() -> None:
    torch.manual_seed(0)
    task = RecogniserTask()
    views = PaintedViews(11, 4, 1, spoilt=True)
    batch = {name: torch.stack([views[i][name] for i in range(4)]) for name in views[0]}
    optimizer = torch.optim.AdamW(task.parameters(), 3e-3)
    totals = []
    for _ in range(8):
        losses = task.losses(batch)
        totals.append(torch.stack(list(losses.values())).sum())
        optimizer.zero_grad()
        totals[-1].backward()
        optimizer.step()
    assert totals[-1] < 0.7 * totals[0]
