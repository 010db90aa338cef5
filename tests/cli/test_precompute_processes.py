"""`luve precompute` as real processes: killed, resumed, and side by side."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from luve_lightning.cli.precompute import precompute
from luve_lightning.data.latent_store import LatentStore
from tests.helpers.precompute_run import PrecomputeRun, keys_of_last_clip, wait_for_entries
from tests.helpers.small_world import write_world
from tests.helpers.store_size import store_size

pytestmark = pytest.mark.slow

CLIPS = 6
LATENTS = 4 * CLIPS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), CLIPS)


@contextmanager
def last_clip_held(store: LatentStore, backbone: Path, world: Path) -> Iterator[None]:
    """Keeps a run from ending before it is killed or told to stop."""
    with ExitStack() as claims:
        for key in keys_of_last_clip(backbone, world):
            assert claims.enter_context(store.claim(key))
        yield


def contents(store: LatentStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.root.glob("??/*")}


def test_killed_run_finished_by_two_others_equals_an_uninterrupted_one(
    tmp_path: Path, tiny_backbone: Path, world: Path
) -> None:
    store, whole = LatentStore(tmp_path / "store"), LatentStore(tmp_path / "whole")
    with last_clip_held(store, tiny_backbone, world):
        victim = PrecomputeRun(tmp_path, tiny_backbone, world, store.root)
        wait_for_entries(store, LATENTS // 3, victim)
        victim.send(signal.SIGKILL)
        victim.finish(-signal.SIGKILL)
    done = store_size(store.root).entries
    assert LATENTS // 3 <= done < LATENTS
    first, second = (PrecomputeRun(tmp_path, tiny_backbone, world, store.root) for _ in range(2))
    assert first.encoded() + second.encoded() == LATENTS - done, "an entry was written twice, or not at all"
    uninterrupted(tiny_backbone, world, whole)
    assert contents(store) == contents(whole)
    assert store_size(store.root).unfinished == 0
    assert len(contents(store)) == LATENTS


def test_sigterm_to_the_process_group_ends_it_quietly_and_loses_nothing(
    tmp_path: Path, tiny_backbone: Path, world: Path
) -> None:
    """SLURM and `timeout` tell the loader's workers too; they must not take the run down before it ends by itself."""
    store, whole = LatentStore(tmp_path / "store"), LatentStore(tmp_path / "whole")
    with last_clip_held(store, tiny_backbone, world):
        run = PrecomputeRun(tmp_path, tiny_backbone, world, store.root, "--num_workers=2")
        wait_for_entries(store, LATENTS // 3, run)
        os.killpg(run.pid, signal.SIGTERM)
        run.finish(128 + signal.SIGTERM)
    for word in ("Traceback", "Error", "killed", "exited"):
        assert word not in run.text(), run.text()
    last = run.text().splitlines()[-1]
    assert last == "luve precompute: SIGTERM: stopped; what is stored stays, the same command continues"
    done = store_size(store.root)
    assert done.unfinished == 0
    assert LATENTS // 3 <= done.entries < LATENTS
    assert PrecomputeRun(tmp_path, tiny_backbone, world, store.root).encoded() == LATENTS - done.entries
    uninterrupted(tiny_backbone, world, whole)
    assert contents(store) == contents(whole)


def uninterrupted(backbone: Path, world: Path, store: LatentStore) -> None:
    precompute(
        str(backbone),
        world,
        store.root,
        (48, 48),
        [1.5, 2, 3],
        frames=9,
        batch_size=1,
        trainer={"accelerator": "cpu", "enable_progress_bar": False},
    )
