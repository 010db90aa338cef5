"""The state of a GPU's generator comes back."""

from __future__ import annotations

import torch

from luve_lightning.callbacks.repeatable import random_state, set_random_state


def test_the_gpus_generator_goes_on_where_it_was(device: torch.device) -> None:
    state = random_state(device)
    expected = torch.randn(3, device=device)
    set_random_state(state, device)
    assert torch.equal(torch.randn(3, device=device), expected)
