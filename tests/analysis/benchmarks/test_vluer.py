"""`luve bench --subject vluer`: both networks take the sizes that are timed."""

from __future__ import annotations

import itertools

import pytest
import torch

from luve_lightning.analysis.benchmarks.vluer import LOW, TARGETS
from luve_lightning.models.vluer import ReleasedVLUer, VLUer
from tests.helpers.released import small_released


def test_both_networks_take_the_sizes() -> None:
    with torch.device("meta"):
        nets = [VLUer(), ReleasedVLUer(crop=True)]
    for net, size in itertools.product(nets, TARGETS.values()):
        net.check_grids(LOW, size)
    with pytest.raises(ValueError, match="got 90 x 160"):
        small_released().check_grids(LOW, TARGETS["2K"])
