"""How parameters are numbered in a checkpoint's optimiser states, sharded or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.optim import Optimizer


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
