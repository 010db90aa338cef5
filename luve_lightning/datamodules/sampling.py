"""A batch sampler that resumes in the middle of an epoch and gives each batch one bucket.

Everything random follows from (seed, epoch, position), never from a generator's running state, so that a resumed
run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler


@dataclass(frozen=True)
class SampleKey:
    """What a dataset needs to build one training sample.

    Attributes:
        index: which item.
        bucket: bucket (a scale, a view) that the whole batch shares.
        seed: run seed, epoch and position; `numpy.random.default_rng(list(key.seed))` is the sample's generator.
    """

    index: int
    bucket: int
    seed: tuple[int, int, int]


class ResumableBatchSampler(Sampler[list[SampleKey]]):
    """Shuffled batches for one rank; all ranks agree on each step's bucket.

    Each epoch visits every item `passes` times in a new order, cut to whole global batches: every rank gets the
    same number of full batches.

    Args:
        num_items: number of items in the dataset.
        batch_size: samples per batch on one rank.
        seed: run seed, >= 0.
        bucket_weights: relative frequency of each bucket, at least one, all > 0.
        passes: visits of each item per epoch.
        rank: rank of this process.
        world_size: processes.

    Raises:
        ValueError: when the items do not fill one global batch.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int,
        bucket_weights: Sequence[float] = (1.0,),
        passes: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or passes < 1:
            raise ValueError(f"batch_size and passes must be >= 1, got {batch_size} and {passes}")
        if not bucket_weights or min(bucket_weights) <= 0:
            raise ValueError(f"bucket weights must be positive, got {list(bucket_weights)}")
        if num_items * passes < batch_size * world_size:
            raise ValueError(
                f"{num_items} items x {passes} passes do not fill one batch of {batch_size} on {world_size} process(es)"
            )
        self.num_items, self.batch_size, self.seed, self.passes = num_items, batch_size, seed, passes
        self.bucket_probabilities = np.asarray(bucket_weights, dtype=np.float64) / float(
            np.sum(bucket_weights)
        )
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.start = 0

    @property
    def sampler(self) -> ResumableBatchSampler:
        """The object on which Lightning calls `set_epoch`: it looks for `batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def resume_at(self, batch: int) -> None:
        """Skip this many batches of the next iteration, once."""
        self.start = batch

    def __len__(self) -> int:
        return self.num_items * self.passes // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        # Read epoch and start now, not at the first `next`, which comes later without workers.
        return self._batches(self.epoch, self.start)

    def _batches(self, epoch: int, start: int) -> Iterator[list[SampleKey]]:
        # Not in __iter__: a DataLoader with workers calls that twice and uses the second iterator.
        self.start = 0
        rng = np.random.default_rng([self.seed, epoch])
        order = np.concatenate([rng.permutation(self.num_items) for _ in range(self.passes)])
        buckets = rng.choice(len(self.bucket_probabilities), size=len(self), p=self.bucket_probabilities)
        for step in range(start, len(self)):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield [
                # 1 + p: numpy treats [seed, epoch] and [seed, epoch, 0] as the same seed.
                SampleKey(int(order[p]), int(buckets[step]), (self.seed, epoch, 1 + p))
                for p in range(first, first + self.batch_size)
            ]
