"""The order of training samples of several buckets, and its continuation."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.datamodules.buckets import Bucket
from luve_lightning.datamodules.sampling import BucketBatchSampler, batch_groups, evaluation_batches
from tests.helpers.epochs import batches, check_resumed

BUCKETS = [Bucket((48, 96), 9), Bucket((64, 64), 9), Bucket((64, 64), 1), Bucket((16, 16), 1)]
VOLUMES = {bucket: bucket.volume for bucket in BUCKETS}
ITEMS = st.lists(st.sampled_from(BUCKETS), min_size=1, max_size=40)
SMALL = st.integers(1, 4)


def ranks(chosen: list[Bucket], batch: int, world: int, seed: int = 0, **options: Any) -> list[BucketBatchSampler]:
    groups = batch_groups(BUCKETS, chosen, VOLUMES, batch, **options)
    return [BucketBatchSampler(groups, seed, (1.0, 3.0), rank, world) for rank in range(world)]


@settings(max_examples=80)
@given(chosen=ITEMS, batch=SMALL, world=SMALL, passes=SMALL, seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_every_item_comes_and_ranks_agree_on_the_bucket(
    chosen: list[Bucket], batch: int, world: int, passes: int, seed: int, epoch: int
) -> None:
    samplers = ranks(chosen, batch, world, seed, passes=passes)
    per_rank = [batches(sampler, epoch) for sampler in samplers]
    counts = Counter(chosen)
    assert {len(each) for each in per_rank} == {len(samplers[0])}
    assert len(samplers[0]) == sum(-(-passes * count // (batch * world)) for count in counts.values())
    for step in zip(*per_rank, strict=True):
        assert len({len(own) for own in step}) == 1
        assert 1 <= len(step[0]) <= batch
        assert len({chosen[key.index] for own in step for key in own}) == 1
        assert len({key.kind for own in step for key in own}) == 1
    dealt = [key for own in per_rank for batch_of_rank in own for key in batch_of_rank]
    assert len({key.seed for key in dealt}) == len(dealt)
    visits = Counter(key.index for key in dealt)
    assert all(visits[item] >= passes for item in range(len(chosen)))
    # Only what makes a bucket's last batch divide among the ranks comes once more.
    for bucket, count in counts.items():
        mine = sum(visits[item] for item, one in enumerate(chosen) if one == bucket)
        assert 0 <= mine - passes * count < world
    assert samplers[0].filled == len(dealt) - passes * len(chosen)
    if world == 1:
        assert set(visits.values()) == {passes}


@settings(max_examples=60)
@given(chosen=ITEMS, batch=SMALL, world=SMALL, fill=st.booleans(), epoch=st.integers(0, 3))
def test_the_batch_with_most_latents_is_first(
    chosen: list[Bucket], batch: int, world: int, fill: bool, epoch: int
) -> None:
    found = batches(ranks(chosen, batch, world, fill_batches=fill)[0], epoch)
    sizes = [len(each) * VOLUMES[chosen[each[0].index]] for each in found]
    assert sizes[0] == max(sizes)
    if fill:
        assert max(sizes) <= batch * max(VOLUMES[bucket] for bucket in chosen)


@settings(max_examples=40)
@given(chosen=ITEMS, batch=SMALL, world=SMALL, epoch=st.integers(0, 3), data=st.data())
def test_a_resumed_epoch_is_the_rest_of_it_and_the_next_one_is_whole(
    chosen: list[Bucket], batch: int, world: int, epoch: int, data: Any
) -> None:
    sampler = ranks(chosen, batch, world)[-1]
    check_resumed(sampler, epoch, data.draw(st.integers(0, len(sampler))))


def test_epochs_and_seeds_differ_in_batches_and_in_their_order() -> None:
    chosen = BUCKETS * 12
    found = [batches(ranks(chosen, 4, 1, seed)[0], epoch) for seed in (0, 1) for epoch in (0, 1)]
    indices = [tuple(tuple(key.index for key in batch) for batch in each) for each in found]
    orders = [tuple(chosen[batch[0].index] for batch in each) for each in found]
    assert len(set(indices)) == 4
    assert len(set(orders)) > 1
    assert all(order[0] == BUCKETS[0] for order in orders)


@settings(max_examples=60)
@given(stills=st.integers(1, 30), clips=st.integers(1, 30), share=st.floats(0.05, 0.95), passes=SMALL)
def test_a_share_of_stills_holds_and_each_comes_before_any_comes_again(
    stills: int, clips: int, share: float, passes: int
) -> None:
    chosen = [BUCKETS[0]] * clips + [BUCKETS[2]] * stills + [BUCKETS[3]] * stills
    sampler = ranks(chosen, 2, 1, passes=passes, stills_share=share)[0]
    drawn: Counter[int] = Counter()
    for epoch in range(3):
        seen = Counter(key.index for batch in batches(sampler, epoch) for key in batch)
        assert all(seen[item] == passes for item in range(clips))
        mine = sum(count for item, count in seen.items() if item >= clips)
        wanted = share / (1 - share) * passes * clips
        assert abs(mine - wanted) <= 2  # two buckets, at least one of each
        drawn += seen
    for bucket in BUCKETS[2:]:
        counts = [drawn[item] for item, one in enumerate(chosen) if one == bucket]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("share", "kept"), [(0.0, BUCKETS[:1]), (1.0, BUCKETS[2:3])])
def test_a_share_of_none_or_all_leaves_the_others_out(share: float, kept: list[Bucket]) -> None:
    chosen = [BUCKETS[0]] * 3 + [BUCKETS[2]] * 4
    [sampler] = ranks(chosen, 2, 1, stills_share=share)
    assert [group.bucket for group in sampler.groups] == kept
    seen = Counter(chosen[key.index] for batch in batches(sampler) for key in batch)
    assert seen == Counter({bucket: chosen.count(bucket) for bucket in kept})


@pytest.mark.parametrize(("present", "share"), [(0, 0.5), (0, 1.0), (2, 0.5), (2, 0.0)])
def test_a_share_of_what_is_not_there_is_refused(present: int, share: float) -> None:
    with pytest.raises(ValueError, match=rf"^stills_share {share:g}: training has \d samples in buckets of one frame"):
        ranks([BUCKETS[present]] * 3, 2, 1, stills_share=share)


def test_the_table_says_what_an_epoch_takes() -> None:
    sampler = ranks([BUCKETS[0]] * 5 + [BUCKETS[3]] * 3, 2, 2, fill_batches=True)[0]
    assert sampler.table().splitlines() == [
        "2 buckets, 3 steps an epoch on 2 process(es):",
        "  0  48x96x9: 5 samples of 5, 2 batches of 2, the last of 1",
        "  3  16x16x1: 3 samples of 3, 1 batch of 2",
        "  2 samples come a second time, so that every process gets as many",
    ]


def test_the_first_batch_has_the_kind_that_takes_most() -> None:
    groups = batch_groups(BUCKETS, BUCKETS * 3, VOLUMES, 2)
    chance = BucketBatchSampler(groups, 0, (1.0, 1.0, 1.0))
    chosen = BucketBatchSampler(groups, 0, (1.0, 1.0, 1.0), first_kind=2)
    for epoch in range(4):
        free, fixed = batches(chance, epoch), batches(chosen, epoch)
        assert {key.kind for key in fixed[0]} == {2}
        assert fixed[1:] == free[1:]


def test_no_generator_of_a_bucket_is_a_samples() -> None:
    sampler = ranks(BUCKETS * 3, 1, 1)[0]
    of_samples = {tuple(np.random.default_rng(list(b[0].seed)).integers(1 << 30, size=2)) for b in batches(sampler)}
    of_buckets = {
        tuple(np.random.default_rng([0, n, k, 1]).integers(1 << 30, size=2)) for n in range(4) for k in (0, 1)
    }
    assert not of_samples & of_buckets


@settings(max_examples=60)
@given(chosen=ITEMS, batch=SMALL, world=SMALL)
def test_evaluation_sees_every_item_in_batches_of_one_bucket(chosen: list[Bucket], batch: int, world: int) -> None:
    found = [evaluation_batches(chosen, batch, rank, world) for rank in range(world)]
    for step in zip(*found, strict=True):
        assert len({len(own) for own in step}) == 1
        assert len({chosen[item] for own in step for item in own}) == 1
    seen = [item for own in found for each in own for item in each]
    assert set(seen) == set(range(len(chosen)))
    assert len(seen) - len(chosen) < world * len(set(chosen))
