"""Training steps of an expert in several processes; see processes.py."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from luve_lightning.models.experts import activate, add_expert, expert_parameters, save_expert, train_only
from tests.helpers.resumable import Run
from tests.helpers.tiny_wan import HFE, LFE, inputs, output, randomise, tiny_transformer


def prepared(**changes: Any) -> Any:
    """A transformer with both experts, of which lfe is trained."""
    transformer = tiny_transformer(**changes)
    for name, config in (("lfe", LFE), ("hfe", HFE)):
        add_expert(transformer, name, config)
        randomise(transformer, name)
    activate(transformer, "lfe")
    train_only(transformer, "lfe")
    return transformer


def gradients(transformer: Any) -> list[torch.Tensor]:
    return [p.grad for p in expert_parameters(transformer, "lfe") if p.grad is not None]


def one_sample(rank: int) -> dict[str, Any]:
    return {key: value[rank : rank + 1] for key, value in inputs().items()}


def data_parallel_step(run: Run) -> None:
    """One sample a process, with gradient checkpointing; gradients to gradients-RANK.pt."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank)
    transformer = prepared()
    transformer.enable_gradient_checkpointing()
    model = DistributedDataParallel(transformer)
    for _ in range(2):  # a parameter without a gradient is found at the second forward
        transformer.zero_grad()
        output(model, one_sample(rank)).square().mean().backward()
    torch.save(gradients(transformer), run.folder / f"gradients-{rank}.pt")
    dist.barrier()  # the first process holds the store that the others still use
    dist.destroy_process_group()


def sharded_save(run: Run) -> None:
    """FSDP2: one step, then the expert is saved from its shards."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank)
    mesh = init_device_mesh("cpu", (run.processes,))
    transformer = prepared()
    transformer.enable_gradient_checkpointing()
    for block in transformer.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(transformer, mesh=mesh)
    output(transformer, one_sample(rank)).square().mean().backward()
    torch.save([g.full_tensor() for g in gradients(transformer)], run.folder / f"gradients-{rank}.pt")  # type: ignore[attr-defined]
    save_expert(transformer, "lfe", run.folder / "lfe")
    dist.barrier()  # the first process holds the store that the others still use
    dist.destroy_process_group()
