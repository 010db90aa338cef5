"""Encoding with claims that others hold."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from pathlib import Path

import lightning as L
import pytest
import torch

from luve_lightning.data.clip_windows import WindowReader, plan_windows
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import LatentKey, LatentRecipe, LatentStore
from luve_lightning.data.quarantine import Quarantine
from luve_lightning.data.variants import Unchanged
from luve_lightning.data.video_index import VideoIndex
from luve_lightning.datamodules.clips import EncodeDataModule
from luve_lightning.models.backbones import load_backbone
from luve_lightning.tasks.encode import EncodeTask, EncodeTotals
from tests.helpers.small_world import write_world
from tests.helpers.store_size import store_size

CLIPS = 3


class Encoding:
    """A small world, a store, and a Trainer that encodes the one into the other."""

    def __init__(self, folder: Path, backbone: Path) -> None:
        codec = load_backbone(backbone).latent_space()
        self.store = LatentStore(folder / "store")
        self.recipe = LatentRecipe(codec.fingerprint(), (48, 48), (2.0,), frames=5)
        self.clips = [entry.path for entry in VideoIndex.from_csv(write_world(folder, CLIPS)).entries]
        self.hashes = ClipHashes(folder)
        reader = WindowReader(self.recipe, self.store, self.hashes)
        windows, _ = plan_windows(VideoIndex.from_csv(folder / "clips.csv").entries, self.recipe)
        self.quarantine = Quarantine(folder / "bad.jsonl", 1.0, CLIPS)
        self.task = EncodeTask(codec, reader, {"plain": Unchanged()}, self.quarantine, batch_size=2)
        self.data = EncodeDataModule(windows, reader, batch_size=2, num_workers=0)
        self.trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )

    def run(self) -> EncodeTotals:
        self.trainer.predict(self.task, datamodule=self.data, return_predictions=False)
        return self.task.totals

    def keys(self, clip: int) -> list[LatentKey]:
        return list(self.recipe.keys(self.hashes.digest(self.clips[clip]), (0, 5)).values())


@pytest.fixture
def encoding(tmp_path: Path, tiny_backbone: Path) -> Encoding:
    return Encoding(tmp_path, tiny_backbone)


class Elsewhere(threading.Thread):
    """Claims entries as another process would, and lets go when the rest is done: with or without writing."""

    def __init__(self, store: LatentStore, keys: list[LatentKey], until: int, write: bool) -> None:
        super().__init__()
        self.store, self.keys, self.until, self.write = LatentStore(store.root), keys, until, write
        self.ready = threading.Event()

    def run(self) -> None:
        with ExitStack() as claims:
            for key in self.keys:
                assert claims.enter_context(self.store.claim(key))
            self.ready.set()
            while store_size(self.store.root).entries < self.until:
                time.sleep(0.01)
            time.sleep(0.3)  # the run is now waiting for these
            if self.write:
                for key in self.keys:
                    self.store.write(key, torch.full((16, 2, 2, 2), 7.0))


@pytest.mark.parametrize("write", [True, False])
def test_entries_being_made_elsewhere_are_waited_for(encoding: Encoding, write: bool) -> None:
    theirs = encoding.keys(0)
    other = Elsewhere(encoding.store, theirs, until=2 * (CLIPS - 1), write=write)
    other.start()
    other.ready.wait()
    totals = encoding.run()
    other.join()
    assert totals.encoded == 2 * (CLIPS - 1) + (0 if write else 2)
    assert store_size(encoding.store.root).entries == 2 * CLIPS
    assert (encoding.store.read(theirs[0]) == 7).all().item() is write


def test_scale_claimed_elsewhere_does_not_hold_up_the_others(encoding: Encoding) -> None:
    high, low = encoding.keys(1)
    other = Elsewhere(encoding.store, [low], until=2 * CLIPS - 1, write=True)
    other.start()
    other.ready.wait()
    assert encoding.run().encoded == 2 * CLIPS - 1
    other.join()
    assert encoding.store.shape(high) == (16, 2, 6, 6)


def test_two_files_of_the_same_bytes_are_one_entry(encoding: Encoding) -> None:
    encoding.clips[2].write_bytes(encoding.clips[1].read_bytes())
    totals = encoding.run()
    assert (totals.encoded, totals.bad) == (2 * (CLIPS - 1), 0)
    assert store_size(encoding.store.root).entries == 2 * (CLIPS - 1)


def test_bad_clip_is_counted_and_named(encoding: Encoding) -> None:
    encoding.clips[1].write_bytes(b"broken")
    totals = encoding.run()
    assert (totals.encoded, totals.bad) == (2 * (CLIPS - 1), 1)
    assert [bad.path for bad in encoding.quarantine.bad()] == [str(encoding.clips[1])]
    assert totals.bytes == store_size(encoding.store.root).bytes


def test_nothing_left_is_no_error(encoding: Encoding) -> None:
    encoding.run()
    encoding.task.totals = EncodeTotals()
    assert encoding.run() == EncodeTotals()
