"""Bringing what each process has to all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch.distributed

K = TypeVar("K")
V = TypeVar("V")


def gather_mappings(mapping: Mapping[K, V]) -> dict[K, V]:
    """The union of all processes' mappings, in the order of sorted keys; every process must call it.

    For results keyed by sample: means over the union are the same for any number of processes, also when shards are
    uneven or a sampler gave one sample to two of them (of equal keys, the highest rank's value is kept). Without a
    process group, the mapping itself.

    Args:
        mapping: of this process, possibly empty; keys can be sorted, keys and values pickled.
    """
    shards: list[Any] = [dict(mapping)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shards = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shards, dict(mapping))
    union = {key: value for shard in shards for key, value in shard.items()}
    return {key: union[key] for key in sorted(union)}
