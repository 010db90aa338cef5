"""How held-out items are shared among processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import TensorDataset

from luve_lightning.datamodules.base import ResumableDataModule


def share(rank: int, world_size: int, items: int) -> list[int]:
    data = ResumableDataModule(batch_size=1, num_workers=0, seed=0)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
    loader = data.evaluation_loader(TensorDataset(torch.arange(items)))
    return [int(i) for [batch] in loader for i in batch]


@pytest.mark.parametrize(("world_size", "items"), [(1, 5), (2, 6), (2, 5), (3, 3), (3, 2), (4, 1), (5, 3)])
def test_every_item_is_seen_and_no_process_is_idle(world_size: int, items: int) -> None:
    shares = [share(rank, world_size, items) for rank in range(world_size)]
    assert all(shares)
    seen = [i for part in shares for i in part]
    assert sorted(set(seen)) == list(range(items))
    assert len(seen) == max(items, world_size)  # twice only where there are too few
