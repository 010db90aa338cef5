"""The optimiser, AdamW, and how parameters are numbered in a checkpoint's optimiser states, sharded or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer


def adamw(
    groups: Sequence[dict[str, Any]], lr: float, betas: tuple[float, float], fused: bool = False
) -> torch.optim.AdamW:
    """The optimiser of every task.

    Args:
        groups: parameters with their weight decay.
        lr: learning rate.
        betas: decays of the first and second moment.
        fused: one kernel for all weights, where `fusible`. Otherwise a step of a small model is hundreds of short
            operations, and the host counts the steps of each weight.
    """
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused or None)
    optimizer.register_load_state_dict_pre_hook(_with_own_kernel)
    # Lightning clips no gradients that the optimiser may still have to unscale; it does so with a scaler alone.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def fusible(trainer: L.Trainer, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether all weights are whole, on a GPU, and their gradients are not scaled."""
    whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    return whole and not scaled and all(parameter.device.type == "cuda" for parameter in parameters)


def skips_marked(optimizer: Optimizer) -> bool:
    """Whether the optimiser takes no step that is marked; see `StepMark`."""
    return isinstance(optimizer, torch.optim.AdamW) and all(group["fused"] for group in optimizer.param_groups)


class StepMark:
    """A mark on an optimiser's next step, by which the device leaves it out, and the host's later look at it.

    Args:
        optimizer: one that `skips_marked`.
        bad: whether to leave the step out, on the device; one process's word is enough.
        processes: how many train together.
    """

    def __init__(self, optimizer: Any, bad: Tensor, processes: int) -> None:
        optimizer.found_inf = found = bad.float()
        if processes > 1:  # not by Lightning's strategy, which first lets the hosts wait for each other
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        self._found = found.to("cpu", non_blocking=True)
        self._there = torch.cuda.Event() if found.is_cuda else None
        if self._there is not None:
            self._there.record()

    def __bool__(self) -> bool:
        """Wait until the device knows, not until it has done all that it was given since."""
        if self._there is not None:
            self._there.synchronize()
        return bool(self._found)


def _with_own_kernel(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's state for this optimiser's kernel, which decides where the numbers of steps must lie."""
    pairs = zip(state["param_groups"], optimizer.param_groups, strict=False)
    groups = [{**saved, "fused": own["fused"]} for saved, own in pairs]
    # Where the groups differ, AdamW says so itself.
    return {**state, "param_groups": groups} if len(groups) == len(state["param_groups"]) else state


def numbered_by_place(state: dict[str, Any], optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """An optimiser's state with parameters numbered by their place in the model, not in the optimiser's groups.

    `ModelParallelStrategy` reads and writes them so. Elsewhere only their order in each group counts. What
    is numbered in another way, or held by another process, as with FSDP1, is left as it is.
    """
    if _numbers(state) != list(range(sum(len(group["params"]) for group in optimizer.param_groups))):
        return state
    groups = [
        {**saved, "params": own} for saved, own in zip(state["param_groups"], _places(optimizer, model), strict=True)
    ]
    numbers = {
        old: new
        for saved, group in zip(state["param_groups"], groups, strict=True)
        for old, new in zip(saved["params"], group["params"], strict=True)
    }
    return {"state": {numbers[old]: own for old, own in state["state"].items()}, "param_groups": groups}


class CheckedModelParallel(ModelParallelStrategy):
    """Sharding that refuses a checkpoint from which it would give parameters each other's state."""

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """See ModelParallelStrategy.

        Raises:
            ValueError: an earlier version wrote it without sharding; says how it can be resumed.
        """
        if self.optimizers and Path(checkpoint_path).is_file():
            assert self.model is not None
            _check_numbers(Path(checkpoint_path), self.optimizers, self.model)
        return super().load_checkpoint(checkpoint_path, weights_only)


def check_sharded(strategy: Strategy) -> None:
    """Make Lightning's ModelParallelStrategy a CheckedModelParallel; others stay as they are."""
    if type(strategy) is ModelParallelStrategy:
        strategy.__class__ = CheckedModelParallel  # it has the same state


def _check_numbers(path: Path, optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    """Refuse what an earlier version wrote, which numbered parameters by their place in the optimiser's groups."""
    states = torch.load(path, map_location="meta", mmap=True).get("optimizer_states", ())
    for state, optimizer in zip(states, optimizers, strict=False):
        numbers = _numbers(state)
        own = [place for places in _places(optimizer, model) for place in places]
        if numbers == list(range(len(own))) != own:
            raise ValueError(
                f"checkpoint {path} cannot be resumed with sharded weights: an earlier version wrote it without "
                "sharding; resume it with --trainer.strategy auto, and with sharded weights from the checkpoint that "
                "this writes"
            )


def _numbers(state: dict[str, Any]) -> list[Any]:
    """Those of all groups, in order."""
    return [number for group in state.get("param_groups", ()) for number in group["params"]]


def _places(optimizer: Optimizer, model: nn.Module) -> list[list[int]]:
    """The places in the model of each group's parameters."""
    places = {parameter: place for place, parameter in enumerate(model.parameters())}
    return [[places[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
