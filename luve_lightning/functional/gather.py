"""Gathers what each process holds on all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch.distributed

K = TypeVar("K")
V = TypeVar("V")


def gather_mappings(mapping: Mapping[K, V]) -> dict[K, V]:
    """The union of all processes' mappings, sorted by key; every process must call it.

    For results keyed by sample: means over the union are the same for any number of processes, even when shards
    are uneven or a sampler gave one sample to two of them (the highest rank's value is kept). Without a process
    group, the mapping itself.

    Args:
        mapping: this process's results, possibly empty; keys must be sortable, keys and values picklable.
    """
    shards: list[Any] = [dict(mapping)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shards = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shards, dict(mapping))
    union = {key: value for shard in shards for key, value in shard.items()}
    return {key: union[key] for key in sorted(union)}
