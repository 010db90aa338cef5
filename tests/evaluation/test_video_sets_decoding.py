"""Decoding ahead: in order, within memory, and no exception for a bad file."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from luve_lightning.data.hashes import Stamp, stamp
from luve_lightning.data.video_files import write_video
from luve_lightning.evaluation import video_sets as module
from luve_lightning.evaluation.video_sets import Decoded, MemoryGate, decode_ahead

COUNT = 12
BYTES = 4 * 16 * 16 * 3


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Each of the colour of its number."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(COUNT):
        write_video(folder / f"{number:02d}.mp4", np.full((4, 16, 16, 3), number, np.uint8), 8, lossless=True)
    return sorted(folder.iterdir())


def run(
    paths: list[Path], threads: int = 2, limit: int = 10**9, kept: tuple[int, ...] = (), seen: object = stamp
) -> list[Decoded[Path]]:
    keep = {paths[number] for number in kept}
    return list(decode_ahead(paths, lambda p: p, seen, lambda p: p in keep, threads, limit))  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("limit", [1, BYTES, 3 * BYTES, 10**9])
def test_every_video_in_order_whatever_the_limit(videos: list[Path], threads: int, limit: int) -> None:
    found = run(videos, threads, limit, kept=(0, 5))
    assert [item.job for item in found] == videos
    assert [int(item.frames.mean()) for item in found if item.frames is not None] == list(range(COUNT))
    assert {item.fps for item in found} == {8.0}


@pytest.mark.parametrize(("kept", "at_once"), [((), 3), ((0, 6), 3)])
def test_no_more_is_decoded_than_fits(
    videos: list[Path], monkeypatch: pytest.MonkeyPatch, kept: tuple[int, ...], at_once: int
) -> None:
    alive, most, lock = set[Path](), [0], threading.Lock()
    read = module.read_video

    def counted(path: Path) -> object:
        with lock:
            alive.add(path)
            most[0] = max(most[0], len(alive))
        time.sleep(0.01)  # the others have time to come too
        return read(path)

    monkeypatch.setattr(module, "read_video", counted)
    keep = {videos[number] for number in kept}
    held: Path | None = None
    for item in decode_ahead(videos, lambda p: p, stamp, lambda p: p in keep, 6, at_once * BYTES):
        time.sleep(0.02)
        if item.job in keep:
            if held is not None:
                alive.discard(held)
            held = item.job
        else:
            with lock:
                alive.discard(item.job)
    assert 2 <= most[0] <= at_once + 1  # the one that is waited for always gets in


def test_bad_files_are_results_with_a_reason(videos: list[Path], tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(videos[0].read_bytes()[:-200])
    paths = [videos[0], text, tmp_path / "gone.mp4", cut, videos[1]]
    found = decode_ahead(paths, lambda p: p, lambda p: stamp(p), lambda p: False, 2, BYTES)
    results = list(found)
    assert [item.frames is None for item in results] == [False, True, True, True, False]
    assert all(item.reason for item in results[1:4])
    assert results[2].reason == "is missing"


def test_a_file_that_changed_since_it_was_hashed_is_not_measured(videos: list[Path]) -> None:
    def seen(path: Path) -> Stamp:
        return stamp(path) if path != videos[3] else (0, 0, 0)

    found = run(videos, seen=seen)
    assert [item.job for item in found if item.reason] == [videos[3]]
    assert found[3].reason == "changed while it was read"


def test_whoever_stops_early_leaves_no_thread_behind(videos: list[Path]) -> None:
    before = threading.active_count()
    stream = decode_ahead(videos, lambda p: p, stamp, lambda p: False, 4, BYTES)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_tickets_enter_in_turn() -> None:
    gate, entered = MemoryGate(10), []

    def enter(ticket: int) -> None:
        gate.enter(ticket, 6)
        entered.append(ticket)

    threads = [threading.Thread(target=enter, args=(ticket,), daemon=True) for ticket in (2, 1, 0)]
    for thread in threads:
        thread.start()
    threads[2].join(60)  # the one with ticket 0
    time.sleep(0.05)  # the others could come too
    assert entered == [0], "two do not fit"
    gate.await_ticket(1)
    threads[1].join(60)
    assert entered == [0, 1], "the one that is waited for gets in"
    for _ in range(2):
        gate.leave(6)
    threads[0].join(60)
    assert entered == [0, 1, 2]
