"""`luve bench --subject vluer`: both networks take the sizes that are timed."""

from __future__ import annotations

import torch

from luve_lightning.analysis.benchmarks.vluer import LOW, TARGETS
from luve_lightning.models.vluer import ReleasedVLUer, VLUer


def test_both_networks_take_the_sizes() -> None:
    with torch.device("meta"):
        nets = [VLUer().bfloat16(), ReleasedVLUer(crop=True).bfloat16()]
        latents = torch.empty(1, 16, *LOW, dtype=torch.bfloat16)
    with torch.inference_mode():
        for net in nets:
            assert {net(latents, size).shape[2:] for size in TARGETS.values()} == set(TARGETS.values())
