"""The latent store and several processes: one writes an entry, and a killed one leaves none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from luve_lightning.data.latent_store import LatentKey, LatentStore
from tests.helpers.store_processes import Entries, check_killed_writer, check_race

KEY = LatentKey(clip="a" * 64, vae="b" * 64, size=(192, 128), frames=(3, 12))
ENTRIES = Entries(
    lambda number: replace(KEY, stride=number + 1),
    lambda number: torch.randn((16, 3, 6, 5), generator=torch.Generator().manual_seed(number)),
    stored=torch.Tensor.half,
)


@pytest.mark.slow
def test_killed_writer_frees_its_claim_and_leaves_no_entry(tmp_path: Path) -> None:
    check_killed_writer(LatentStore(tmp_path / "store"), ENTRIES, tmp_path / "ready")


def test_processes_never_write_one_entry_twice(tmp_path: Path) -> None:
    check_race(LatentStore(tmp_path / "store"), ENTRIES, 4)
