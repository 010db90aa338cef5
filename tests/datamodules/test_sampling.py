"""The order of training samples, and its continuation."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from luve_lightning.datamodules.sampling import ResumableBatchSampler
from tests.helpers.epochs import batches, check_resumed

SIZES = st.integers(1, 5)


@settings(max_examples=60, deadline=None)
@given(
    items=st.integers(1, 23), batch=SIZES, world=SIZES, passes=SIZES, seed=st.integers(0, 9), epoch=st.integers(0, 9)
)
def test_ranks_share_the_epochs_order(items: int, batch: int, world: int, passes: int, seed: int, epoch: int) -> None:
    assume(items * passes >= batch * world)
    ranks = [
        batches(ResumableBatchSampler(items, batch, seed, (1.0, 3.0), passes, rank, world), epoch)
        for rank in range(world)
    ]
    steps = items * passes // (batch * world)
    assert {len(rank) for rank in ranks} == {steps}
    assert all(len(b) == batch for rank in ranks for b in rank)
    # Reference: permutations one after another, dealt out batch by batch to the ranks in turn.
    rng = np.random.default_rng([seed, epoch])
    order = [int(i) for _ in range(passes) for i in rng.permutation(items)]
    dealt = [key for step in range(steps) for rank in ranks for key in rank[step]]
    assert [key.index for key in dealt] == order[: steps * batch * world]
    assert max(Counter(key.index for key in dealt).values()) <= passes
    assert len({key.seed for key in dealt}) == len(dealt)
    for step in range(steps):
        assert len({key.kind for rank in ranks for key in rank[step]}) == 1


@settings(max_examples=40, deadline=None)
@given(batch=SIZES, epoch=st.integers(0, 3), data=st.data())
def test_a_resumed_epoch_is_the_rest_of_it_and_the_next_one_is_whole(batch: int, epoch: int, data: Any) -> None:
    sampler = ResumableBatchSampler(13, batch, 7, (1.0, 1.0), passes=2)
    check_resumed(sampler, epoch, data.draw(st.integers(0, len(sampler))))


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [key.index for b in batches(ResumableBatchSampler(50, 5, seed), epoch) for key in b]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert all(sorted(o) == list(range(50)) for o in orders)


def test_no_sample_shares_its_generator_with_its_epochs_order() -> None:
    first = batches(ResumableBatchSampler(4, 1, 0))[0][0]
    of_sample = np.random.default_rng(list(first.seed)).integers(1 << 30, size=4)
    assert not np.array_equal(of_sample, np.random.default_rng([0, 0]).integers(1 << 30, size=4))


def test_kinds_come_as_often_as_their_weights() -> None:
    sampler = ResumableBatchSampler(1000, 1, 0, (1.0, 2.0, 5.0), passes=4)
    counts = Counter(b[0].kind for b in batches(sampler))
    shares = [counts[i] / len(sampler) for i in range(3)]
    np.testing.assert_allclose(shares, [1 / 8, 2 / 8, 5 / 8], atol=0.03)


class Keys(Dataset[list[int]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, key: Any) -> Any:
        return torch.tensor([key.index, key.kind, *key.seed])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_starts_where_it_is_told_with_and_without_workers(workers: int) -> None:
    sampler = ResumableBatchSampler(12, 2, 0)
    expected = [[[k.index, k.kind, *k.seed] for k in b] for b in batches(sampler, 4, 3)]
    loader = DataLoader(Keys(), batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    sampler.set_epoch(4)
    sampler.resume_at(3)
    iterator = iter(loader)
    sampler.set_epoch(9)  # as Lightning does between making the iterator and reading from it; only ever the same epoch
    assert [b.tolist() for b in iterator] == expected
    assert len([b.tolist() for b in iter(loader)]) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0, 0), "batch_size and passes must be >= 1, got 0 and 1"),
        ((10, 1, 0, (1.0,), 0), "got 1 and 0"),
        ((10, 1, 0, ()), r"kinds' weights must be positive, got \[\]"),
        ((10, 1, 0, (1.0, 0.0)), r"got \[1.0, 0.0\]"),
        ((3, 2, 0, (1.0,), 1, 0, 2), r"3 items x 1 passes do not fill one batch of 2 on 2 process\(es\)"),
    ],
)
def test_impossible_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResumableBatchSampler(*arguments)
