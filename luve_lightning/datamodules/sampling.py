"""Orders of training samples that resume: a batch is a function of (seed, epoch, step) and the process alone.

`ResumableBatchSampler` is for items of one size, `BucketBatchSampler` for those of several buckets.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from luve_lightning.datamodules.buckets import Bucket
from luve_lightning.terminal import amount


@dataclass(frozen=True)
class SampleKey:
    """What a dataset needs to build one training sample.

    Attributes:
        index: which item.
        kind: what the whole batch is read as: a place among the scales, or the views, of the data.
        seed: run seed, epoch and position; `numpy.random.default_rng(list(key.seed))` is the sample's generator.
    """

    index: int
    kind: int
    seed: tuple[int, int, int]


class BatchOrder(Sampler[list[SampleKey]]):
    """Batches for one rank, as many for each; all ranks agree on each step's kind and size.

    Args:
        seed: run seed, >= 0.
        kind_weights: relative frequency of each kind, at least one, all > 0.
        rank: rank of this process.
        world_size: processes.
    """

    def __init__(self, seed: int, kind_weights: Sequence[float], rank: int, world_size: int) -> None:
        if not kind_weights or min(kind_weights) <= 0:
            raise ValueError(f"kinds' weights must be positive, got {list(kind_weights)}")
        weights = np.asarray(kind_weights, dtype=np.float64)
        self.kind_probabilities = weights / float(np.sum(kind_weights))
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = self.start = 0

    @property
    def sampler(self) -> BatchOrder:
        """The object on which Lightning calls `set_epoch`: it looks for `batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def resume_at(self, batch: int) -> None:
        """Skip this many batches of the next iteration, once."""
        self.start = batch

    def __iter__(self) -> Iterator[list[SampleKey]]:
        # Read epoch and start now, not at the first `next`, which comes later without workers.
        return self._from(self.epoch, self.start)

    def _from(self, epoch: int, start: int) -> Iterator[list[SampleKey]]:
        # Not in __iter__: a DataLoader with workers calls that twice and uses the second iterator.
        self.start = 0
        yield from self.batches(epoch, start)

    @abstractmethod
    def order(self) -> dict[str, Any]:
        """What decides which samples a batch holds, under the configuration's names; plain values."""

    @abstractmethod
    def __len__(self) -> int:
        """Batches in an epoch."""

    @abstractmethod
    def batches(self, epoch: int, start: int) -> Iterator[list[SampleKey]]:
        """This rank's batches of an epoch, from the given one on."""

    def _key(self, epoch: int, position: int, item: int, kind: int) -> SampleKey:
        # 1 + position: numpy treats [seed, epoch] and [seed, epoch, 0] as the same seed.
        return SampleKey(item, kind, (self.seed, epoch, 1 + position))


class ResumableBatchSampler(BatchOrder):
    """Shuffled batches of items that all have one size.

    Each epoch visits every item `passes` times in a new order, cut to whole global batches: every rank gets the
    same number of full batches.

    Args:
        num_items: number of items in the dataset.
        batch_size: samples per batch on one rank.
        seed: see BatchOrder.
        kind_weights: see BatchOrder.
        passes: visits of each item per epoch.
        rank: see BatchOrder.
        world_size: see BatchOrder.

    Raises:
        ValueError: when the items do not fill one global batch.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int,
        kind_weights: Sequence[float] = (1.0,),
        passes: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or passes < 1:
            raise ValueError(f"batch_size and passes must be >= 1, got {batch_size} and {passes}")
        super().__init__(seed, kind_weights, rank, world_size)
        if num_items * passes < batch_size * world_size:
            raise ValueError(
                f"{num_items} items x {passes} passes do not fill one batch of {batch_size} on {world_size} process(es)"
            )
        self.num_items, self.batch_size, self.passes = num_items, batch_size, passes

    def order(self) -> dict[str, Any]:
        """See BatchOrder."""
        return {
            "seed": self.seed,
            "items": self.num_items,
            "passes": self.passes,
            "batch_size": self.batch_size,
            "processes": self.world_size,
        }

    def __len__(self) -> int:
        return self.num_items * self.passes // (self.batch_size * self.world_size)

    def batches(self, epoch: int, start: int) -> Iterator[list[SampleKey]]:
        """See BatchOrder."""
        rng = np.random.default_rng([self.seed, epoch])
        order = np.concatenate([rng.permutation(self.num_items) for _ in range(self.passes)])
        kinds = rng.choice(len(self.kind_probabilities), size=len(self), p=self.kind_probabilities)
        for step in range(start, len(self)):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield [self._key(epoch, p, int(order[p]), int(kinds[step])) for p in range(first, first + self.batch_size)]


@dataclass(frozen=True)
class BatchGroup:
    """The items of one bucket, which may share a batch.

    Attributes:
        number: the bucket's place among all of the configuration.
        bucket: the bucket.
        items: their places in the dataset.
        volume: latents of one sample, frames x height x width.
        batch_size: samples per batch on one rank.
        draws: samples in an epoch.
    """

    number: int
    bucket: Bucket
    items: tuple[int, ...] = field(repr=False)
    volume: int
    batch_size: int
    draws: int

    def drawn(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The items of an epoch: the next `draws` of endless permutations of all, one after another.

        So every item comes once before any comes again, also where an epoch takes only some of them.
        """
        count = len(self.items)
        first = epoch * self.draws
        rounds = range(first // count, (first + self.draws - 1) // count + 1)
        # Four numbers: no sample's generator, nor that of the batches' order, has such a seed.
        order = [np.random.default_rng([seed, self.number, each, 1]).permutation(count) for each in rounds]
        places = np.concatenate(order)[first - rounds[0] * count :][: self.draws]
        return np.asarray(self.items)[places]


class BucketBatchSampler(BatchOrder):
    """Shuffled batches, each from one bucket, the same one on all ranks.

    An epoch takes each bucket's `draws` and drops none: the last batch of a bucket is smaller. Where it does not divide
    among the ranks, items of the bucket come again until it does. The batch that holds the most latents comes first in
    each epoch, so that a run that lacks memory ends in its first step. The others come in random order.

    A training step takes the mean over its batch, as ever: a step counts the same whatever its batch's size, so a
    sample of a smaller batch counts more.

    Args:
        groups: the buckets' items, at least one bucket; each has at least one item and one draw.
        seed: see BatchOrder.
        kind_weights: see BatchOrder.
        rank: see BatchOrder.
        world_size: see BatchOrder.
        first_kind: kind of each epoch's first batch; None leaves it to chance.
    """

    def __init__(
        self,
        groups: Sequence[BatchGroup],
        seed: int,
        kind_weights: Sequence[float] = (1.0,),
        rank: int = 0,
        world_size: int = 1,
        first_kind: int | None = None,
    ) -> None:
        super().__init__(seed, kind_weights, rank, world_size)
        if not groups or min(min(len(g.items), g.batch_size, g.draws) for g in groups) < 1:
            raise ValueError(f"expected buckets with items, batches and draws, got {list(groups)}")
        self.groups, self.first_kind = list(groups), first_kind
        # Of each batch: its group, the samples of the group before it, and its samples on one rank.
        self.plan: list[tuple[int, int, int]] = []
        self.filled = 0
        for number, group in enumerate(self.groups):
            whole, rest = divmod(group.draws, group.batch_size * world_size)
            sizes = [group.batch_size] * whole + ([-(-rest // world_size)] if rest else [])
            self.plan += [(number, i * group.batch_size * world_size, size) for i, size in enumerate(sizes)]
            self.filled += sum(sizes) * world_size - group.draws
        self._positions = np.cumsum([0, *(size * world_size for _, _, size in self.plan)])
        held = [size * self.groups[number].volume for number, _, size in self.plan]
        self._largest = held.index(max(held))

    def order(self) -> dict[str, Any]:
        """See BatchOrder."""
        return {
            "seed": self.seed,
            "items": sum(len(group.items) for group in self.groups),
            "buckets": ", ".join(f"{g.draws} of {len(g.items)} {g.bucket} by {g.batch_size}" for g in self.groups),
            "processes": self.world_size,
        }

    def __len__(self) -> int:
        return len(self.plan)

    def batches(self, epoch: int, start: int) -> Iterator[list[SampleKey]]:
        """See BatchOrder."""
        rng = np.random.default_rng([self.seed, epoch])
        shuffled = rng.permutation(len(self.plan))
        steps = [self._largest, *(int(batch) for batch in shuffled if batch != self._largest)]
        kinds = rng.choice(len(self.kind_probabilities), size=len(self), p=self.kind_probabilities)
        if self.first_kind is not None:
            kinds[0] = self.first_kind
        drawn = [group.drawn(self.seed, epoch) for group in self.groups]
        for step in range(start, len(steps)):
            number, first, size = self.plan[steps[step]]
            items = drawn[number]
            own = range(self.rank * size, (self.rank + 1) * size)
            yield [
                # What is beyond the last starts again with the first.
                self._key(
                    epoch, int(self._positions[steps[step]]) + i, int(items[(first + i) % len(items)]), int(kinds[step])
                )
                for i in own
            ]

    def table(self) -> str:
        """What an epoch takes of each bucket, as lines of text."""
        buckets, steps = amount(len(self.groups), "bucket"), amount(len(self), "step")
        lines = [f"{buckets}, {steps} an epoch on {self.world_size} process(es):"]
        for place, group in enumerate(self.groups):
            sizes = [size for at, _, size in self.plan if at == place]
            last = f", the last of {sizes[-1]}" if sizes[-1] != sizes[0] else ""
            batches = f"{amount(len(sizes), 'batch', 'batches')} of {sizes[0]}{last}"
            drawn = f"{amount(group.draws, 'sample')} of {len(group.items)}"
            lines.append(f"  {group.number}  {group.bucket}: {drawn}, {batches}")
        if self.filled:
            lines.append(f"  {self.filled} samples come a second time, so that every process gets as many")
        return "\n".join(lines)


def batch_groups(
    buckets: Iterable[Bucket],
    chosen: Sequence[Bucket],
    volumes: Mapping[Bucket, int],
    batch_size: int,
    passes: int = 1,
    fill_batches: bool = False,
    stills_share: float | None = None,
) -> list[BatchGroup]:
    """The groups of a training split, in the order of the buckets.

    Args:
        buckets: all buckets of the configuration.
        chosen: the bucket of each item.
        volumes: latents of one sample of each bucket.
        batch_size: samples per batch on one rank, of the largest bucket where `fill_batches`.
        passes: visits of each item per epoch, of stills only without `stills_share`.
        fill_batches: a smaller bucket takes as many samples a batch as hold no more latents than the largest's batch.
        stills_share: share of an epoch's samples that are from buckets of one frame; None takes them as they come.

    Raises:
        ValueError: a share of what is not there.
    """
    if batch_size < 1 or passes < 1:
        raise ValueError(f"batch_size and passes must be >= 1, got {batch_size} and {passes}")
    numbers = {bucket: number for number, bucket in enumerate(buckets)}
    items: dict[Bucket, list[int]] = {bucket: [] for bucket in sorted(set(chosen), key=numbers.__getitem__)}
    for place, bucket in enumerate(chosen):
        items[bucket].append(place)
    draws = {bucket: passes * len(places) for bucket, places in items.items()}
    if stills_share is not None:
        draws |= _shared({b: len(places) for b, places in items.items()}, passes, stills_share)
    largest = max(volumes[bucket] for bucket in items)
    return [
        BatchGroup(
            numbers[bucket],
            bucket,
            tuple(places),
            volumes[bucket],
            batch_size * largest // volumes[bucket] if fill_batches else batch_size,
            draws[bucket],
        )
        for bucket, places in items.items()
        if draws[bucket]
    ]


def _shared(counts: Mapping[Bucket, int], passes: int, share: float) -> dict[Bucket, int]:
    """Samples of an epoch by bucket: those of clips `passes` times, and of stills as many as make up the share."""
    stills = {bucket: count for bucket, count in counts.items() if bucket.frames == 1}
    many, clips = sum(stills.values()), sum(counts.values()) - sum(stills.values())
    if (share > 0 and not many) or (share < 1 and not clips):
        raise ValueError(
            f"stills_share {share:g}: training has {amount(many, 'sample')} in buckets of one frame "
            f"and {clips} in longer ones"
        )
    if share == 1:
        return {bucket: passes * stills.get(bucket, 0) for bucket in counts}
    wanted, before, found = share / (1 - share) * passes * clips, 0, {}
    for bucket, count in stills.items():
        # Rounded so that they add up; at least one, so that no bucket is left out.
        found[bucket] = round(wanted * (before + count) / many) - round(wanted * before / many)
        found[bucket] = max(1, found[bucket]) if share else 0
        before += count
    return found


def evaluation_batches(
    buckets: Sequence[Bucket | int], batch_size: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """Places of items for evaluation: each batch from one bucket, as many and as large ones on every rank.

    Some items come twice where a bucket does not divide among the ranks.

    Args:
        buckets: the bucket of each item, or its number.
        batch_size: items per batch on one rank.
        rank: rank of this process.
        world_size: processes.
    """
    found = []
    for bucket in dict.fromkeys(buckets):
        items = [place for place, one in enumerate(buckets) if one == bucket]
        each = -(-len(items) // world_size)
        own = [items[(rank + i * world_size) % len(items)] for i in range(each)]
        found += [own[i : i + batch_size] for i in range(0, each, batch_size)]
    return found


def check_order(resume: Mapping[str, Any], sampler: BatchOrder) -> None:
    """Raise ValueError when a checkpoint from the middle of an epoch is of another order than the sampler's."""
    then, now = resume["order"], sampler.order()
    # A run of one size has no buckets, one of several no passes and one batch size.
    names = {**then, **now}
    changed = [f"{name} was {then.get(name)}, is {now.get(name)}" for name in names if then.get(name) != now.get(name)]
    if changed and resume["batches"]:
        done = amount(resume["batches"], "batch", "batches")
        raise ValueError(
            f"the checkpoint is {done} into epoch {resume['epoch']} of another order of the data "
            f"({'; '.join(changed)}): resume with the same values, or start a new run from its weights"
        )
