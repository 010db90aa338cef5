"""Numbers of parameters in a checkpoint's optimiser states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from luve_lightning.tasks.optimizer_states import numbered_by_place


@pytest.fixture
def model() -> nn.Module:
    """A frozen weight, and two layers whose matrices and vectors alternate."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 3), nn.Linear(3, 4))
    model[0].requires_grad_(False)
    return model


@pytest.fixture
def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if (p.ndim >= 2) is matrix]} for matrix in (True, False)]
    optimizer = torch.optim.AdamW(groups)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer


def test_a_state_is_numbered_by_place_and_loads_as_before(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    before = optimizer.state_dict()
    state = numbered_by_place(before, optimizer, model)
    assert [group["params"] for group in state["param_groups"]] == [[1, 3], [2, 4]]
    shapes = {number: tuple(own["exp_avg"].shape) for number, own in state["state"].items()}
    assert shapes == {number: tuple(p.shape) for number, p in enumerate(model.parameters()) if number}
    optimizer.load_state_dict(state)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("state", [{}, {"state": {1: {}}, "param_groups": [{"params": [1, 3]}, {"params": [2, 4]}]}])
def test_what_another_process_holds_or_is_numbered_by_place_stays(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    assert numbered_by_place(state, optimizer, model) is state
