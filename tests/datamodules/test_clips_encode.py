"""How windows are shared among processes."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.data.clip_windows import ClipWindow, WindowReader
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import LatentRecipe, LatentStore
from luve_lightning.data.video_index import VideoIndex
from luve_lightning.datamodules.clips import ClipsToEncode, EncodeDataModule, share
from tests.helpers.small_world import write_world


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> ClipWindow:
    return ClipWindow(VideoIndex.from_csv(write_world(tmp_path_factory.mktemp("world"), 1)).entries[0], (0, 9))


@pytest.fixture
def reader(tmp_path: Path) -> WindowReader:
    recipe = LatentRecipe(vae="v", size=(48, 48), scales=(), frames=1)
    return WindowReader(recipe, LatentStore(tmp_path), ClipHashes(tmp_path))


@given(count=st.integers(0, 60), world_size=st.integers(1, 9), batch_size=st.integers(1, 9))
def test_every_window_once_and_equal_numbers_of_batches(
    window: ClipWindow, count: int, world_size: int, batch_size: int
) -> None:
    windows = [ClipWindow(window.clip, (n, n + 9)) for n in range(count)]
    shares = [share(windows, rank, world_size, batch_size) for rank in range(world_size)]
    covered = [w for shard, _ in shares for w in shard]
    assert sorted(w.frames for w in covered) == [w.frames for w in windows]
    sizes = [len(shard) for shard, _ in shares]
    assert max(sizes) - min(sizes) <= 1
    assert {batches for _, batches in shares} == {-(-max(sizes) // batch_size)}


def test_short_share_is_filled_up_with_empty_batches(window: ClipWindow, reader: WindowReader) -> None:
    dataset = ClipsToEncode([window] * 3, 2, reader, batches=4)
    assert len(dataset) == 4
    # One frame of nine: the recipe reads what it wants from each window's start.
    assert [len(dataset[n]) for n in range(4)] == [2, 1, 0, 0]


def test_hardware_decodes_in_processes_of_their_own_start(window: ClipWindow, reader: WindowReader) -> None:
    """A forked process cannot use the GPU that its parent uses; a spawned one gets the reader as a pickle."""
    for hardware, workers, method in ((None, 1, None), ("cuda", 0, None), ("cuda", 1, "spawn")):
        reader.hardware = hardware
        loader = EncodeDataModule([window], reader, 1, workers).predict_dataloader()
        context = loader.multiprocessing_context
        assert (context and context.get_start_method()) == method
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.hardware == "cuda"
    copy.hardware = None
    assert copy(window).frames.shape == (1, 48, 48, 3)


@pytest.mark.parametrize(("batch_size", "num_workers"), [(0, 0), (1, -1)])
def test_impossible_values_are_refused(reader: WindowReader, batch_size: int, num_workers: int) -> None:
    with pytest.raises(ValueError, match="expected batch_size >= 1 and num_workers >= 0"):
        EncodeDataModule([], reader, batch_size, num_workers)
