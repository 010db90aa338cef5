"""Epochs of a sampler that can resume."""

from __future__ import annotations

from luve_lightning.datamodules.sampling import BucketBatchSampler, ResumableBatchSampler, SampleKey


def batches(
    sampler: ResumableBatchSampler | BucketBatchSampler, epoch: int = 0, start: int = 0
) -> list[list[SampleKey]]:
    """Batches of an epoch, from the one numbered `start` on."""
    sampler.set_epoch(epoch)
    sampler.resume_at(start)
    return list(sampler)


def check_resumed(sampler: ResumableBatchSampler | BucketBatchSampler, epoch: int, start: int) -> None:
    """A resumed epoch is the rest of it, and the next one is whole."""
    whole, following = batches(sampler, epoch), batches(sampler, epoch + 1)
    assert batches(sampler, epoch, start) == whole[start:]
    sampler.set_epoch(epoch + 1)
    assert list(sampler) == following
