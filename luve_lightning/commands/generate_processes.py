"""The processes that torchrun started for `luve generate`: each makes videos of its own, or all make one together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from luve_lightning.commands.devices import choose_device

# Others wait while one hashes files, encodes videos, or waits for a video that a stranger is making.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """Which process this is.

    Attributes:
        rank: of all, from 0.
        count: of processes.
        local: rank among those of this machine.
        together: whether all make each video together.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    together: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], context_parallel: int) -> Processes:
        """What torchrun's variables say.

        Args:
            environment: may hold RANK, WORLD_SIZE and LOCAL_RANK.
            context_parallel: over how many processes one video is spread.

        Raises:
            ValueError: when there are not as many processes as one video is to be spread over.
        """
        count = int(environment.get("WORLD_SIZE", "1"))
        if context_parallel < 1 or (context_parallel > 1 and context_parallel != count):
            raise ValueError(
                f"context_parallel {context_parallel}: expected 1, or the number of processes, which is {count}; "
                f"torchrun --nproc-per-node {max(2, context_parallel)} starts them"
            )
        rank = int(environment.get("RANK", "0")) if count > 1 else 0
        local = int(environment.get("LOCAL_RANK", str(rank))) if count > 1 else 0
        return cls(rank, count, local, context_parallel > 1)

    def device(self, name: str) -> torch.device:
        """The device of this process: its own GPU where there are several.

        Args:
            name: auto, cpu, cuda or cuda:N.

        Raises:
            ValueError: no such device, or the same GPU for all.
        """
        if self.count == 1:
            return choose_device(name)
        if name not in ("auto", "cuda", "cpu"):
            raise ValueError(
                f"device: {self.count} processes take a GPU each; expected auto, cuda or cpu, got {name!r}"
            )
        if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        device = choose_device(f"cuda:{self.local}")
        torch.cuda.set_device(device)
        return device

    def begin(self, device: torch.device) -> None:
        """Let processes that make videos together find each other.

        Raises:
            ValueError: where there is no GPU: diffusers' context parallelism asks for one.
        """
        if not self.together:
            return
        if torch.accelerator.device_count() == 0:
            raise ValueError("context_parallel: one video is spread over GPUs, and there is none here")
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=_PATIENCE)

    def end(self) -> None:
        """Part again."""
        if self.together:
            dist.destroy_process_group()

    def shared(self, value: Any) -> Any:
        """What the first process gives, for all that make videos together."""
        if not self.together:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def follow(self, make: Callable[[int], None]) -> None:
        """Make what the first process makes, until it says that all is done (None)."""
        while (number := self.shared(None)) is not None:
            make(number)
