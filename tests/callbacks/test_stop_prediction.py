"""SIGTERM while a Trainer predicts."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path

from luve_lightning.datasets.latent_store import LatentStore
from tests.helpers.precompute_run import PrecomputeRun, keys_of_last_clip, wait_for_entries
from tests.helpers.small_world import write_world


def test_sigterm_ends_a_prediction_with_its_code_and_leaves_nothing_half_done(
    tmp_path: Path, tiny_backbone: Path
) -> None:
    world, store = write_world(tmp_path, 2), LatentStore(tmp_path / "store")
    with ExitStack() as claims:
        for key in keys_of_last_clip(tiny_backbone, world):
            assert claims.enter_context(store.claim(key))
        run = PrecomputeRun(tmp_path, tiny_backbone, world, store.root)
        wait_for_entries(store, 4, run)
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(30) == 128 + signal.SIGTERM, run.text()
    assert store.size().unfinished == 0
    assert "Traceback" not in run.text()
