"""Clips' addresses: those of ordinary clips stay, and nothing old is found of a clip that is read otherwise now."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from av.stream import Disposition

from luve_lightning.data import hashes as clip_hashes
from luve_lightning.data import hashes as file_hashes
from luve_lightning.data.clip_container import RefusedClip
from luve_lightning.data.clip_windows import ClipWindow, WindowReader, find_pair_keys, pending_windows
from luve_lightning.data.clips import read_clip
from luve_lightning.data.hashes import ClipHashes, Reading, look, shown_digest
from luve_lightning.data.latent_store import LatentRecipe, LatentStore
from luve_lightning.data.store import StoreError
from luve_lightning.data.video_index import ClipEntry
from tests.helpers.video_files import CLOSED, H264_CLOSED, KINDS, set_matrix, write_video

RECIPE = LatentRecipe(vae="v", size=(48, 48), scales=(), frames=5)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def entry(path: Path) -> ClipEntry:
    return ClipEntry(path.stem, path, path.stem, 24, 8, 96, 96, {})


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hashes, "_SETTLED_NS", 0)  # the clips were written a moment ago


def test_ordinary_clips_keep_the_hash_of_their_bytes(tmp_path: Path) -> None:
    """Stored latents of turned, 10-bit, full-range clips and those of any codec are found as before."""
    hashes = ClipHashes(tmp_path / "store")
    paths = [write_video(tmp_path, kind, 4, name=name) for name, kind in {**CLOSED, "hevc": KINDS["hevc"]}.items()]
    paths += [write_video(tmp_path, KINDS["h264_10bit"], 4, name="deep")]
    paths += [write_video(tmp_path, count=4, name=f"turned-{turn}", rotation=turn) for turn in (90, 180, 270)]
    assert [hashes.digest(path) for path in paths] == [sha256(path) for path in paths]


def test_what_cannot_be_decoded_is_known_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "noise.mp4"
    path.write_bytes(b"noise" * 99)
    assert ClipHashes(tmp_path / "store").digest(path) == sha256(path) == shown_digest(path, sha256(path))


def test_other_clips_have_a_hash_of_their_own(tmp_path: Path) -> None:
    mirrored = set_matrix(write_video(tmp_path, count=4, name="mirrored"), -1, 0, 0, 1)
    wide = write_video(
        tmp_path, replace(H264_CLOSED, options=H264_CLOSED.options | {"x264-params": "sar=2/1"}), 4, name="wide"
    )
    hashes = ClipHashes(tmp_path / "store")
    found = {hashes.digest(path) for path in (mirrored, wide)}
    assert len(found | {sha256(mirrored), sha256(wide)}) == 4
    assert all(len(digest) == 64 for digest in found)
    assert shown_digest(wide, sha256(wide)) == hashes.digest(wide)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("matrix", [(-1, 0, 0, 1), (1, 1, -1, 1)])
def test_latents_of_the_old_reading_are_not_found(matrix: tuple[int, ...], tmp_path: Path) -> None:
    """Entries written under the bytes' hash, as every clip's were once."""
    plain = write_video(tmp_path, count=8, name="plain")
    other = set_matrix(write_video(tmp_path, count=8, name="other"), *matrix)
    store, hashes = LatentStore(tmp_path / "store"), ClipHashes(tmp_path / "store")
    for path in (plain, other):
        store.write(RECIPE.key(sha256(path), (0, 5)), torch.zeros(1, 1, 1, 1))
    read = WindowReader(RECIPE, store, hashes)
    refused = matrix == (1, 1, -1, 1)
    assert not read(ClipWindow(entry(plain), (0, 5))).missing
    item = read(ClipWindow(entry(other), (0, 5)))
    assert (item.frames is None, bool(item.error), bool(item.missing)) == (refused, refused, not refused)
    windows = [ClipWindow(entry(path), (0, 5)) for path in (plain, other)]
    assert pending_windows(windows, read) == [1]
    if refused:
        lookup = find_pair_keys(store, hashes, [entry(plain), entry(other)], RECIPE)
        assert [pair.entry.clip_id for pair in lookup.pairs] == ["plain"]
        assert [clip for clip, _ in lookup.dropped] == ["other"]
    else:
        with pytest.raises(StoreError, match=r"1 of 2 clips have no latents .*first other"):
            find_pair_keys(store, hashes, [entry(plain), entry(other)], RECIPE)


@pytest.mark.usefixtures("settled")
def test_a_file_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirrored = set_matrix(write_video(tmp_path, count=4, name="mirrored"), -1, 0, 0, 1)
    refused = set_matrix(write_video(tmp_path, count=4, name="refused"), 1, 1, -1, 1)
    first = ClipHashes(tmp_path / "store")
    assert first.known(mirrored) is None
    digest = first.digest(mirrored)
    with pytest.raises(RefusedClip):
        first.digest(refused)
    with (tmp_path / "store" / "clip_readings.jsonl").open("a") as stream:
        stream.write('{"sha256": "cut o')  # by a kill
    monkeypatch.setattr(clip_hashes, "look", None)
    again = ClipHashes(tmp_path / "store")
    assert again.known(mirrored) == again.digest(mirrored) == digest
    assert again.known(refused) is None
    with pytest.raises(RefusedClip, match="quarter turns"):
        again.digest(refused)
    monkeypatch.setattr(clip_hashes, "look", lambda path, matte: Reading())
    monkeypatch.setattr(clip_hashes, "_RULES", clip_hashes._RULES + 1)
    assert ClipHashes(tmp_path / "store").digest(mirrored) == sha256(mirrored)  # the old rules count no more


def test_a_store_that_may_not_be_written_does_not_matter(tmp_path: Path) -> None:
    path = set_matrix(write_video(tmp_path, count=4), -1, 0, 0, 1)
    with pytest.warns(UserWarning, match="kept in memory"):
        digest = ClipHashes("/proc/none").digest(path)
    assert digest == ClipHashes(tmp_path / "store").digest(path)


def test_variable_frame_rates_are_noticed(tmp_path: Path) -> None:
    fast, slow = list(range(30)), [30 + 3 * step for step in range(10)]
    uneven = write_video(tmp_path, count=40, name="uneven", pts=fast + slow)
    even = [write_video(tmp_path, KINDS[name], 12, name=name) for name in ("h264", "h264_open", "hevc", "vp9_mp4")]
    assert look(uneven).uneven
    assert not any(look(path).uneven for path in even)
    hashes = ClipHashes(tmp_path / "store")
    for path in (*even, uneven):
        hashes.digest(path)
    assert hashes.uneven([*even, uneven]) == [uneven]


def test_a_list_of_other_files_is_no_clip(tmp_path: Path) -> None:
    """FFmpeg plays it as the files it names, which can change while its own bytes stay the same."""
    write_video(tmp_path, count=3, name="one")
    path = tmp_path / "list.mp4"
    path.write_text("ffconcat version 1.0\nfile 'one.mp4'\n")
    assert look(path) == Reading(refused="is a list of other files (concat), not a video")
    with pytest.raises(RefusedClip, match="is a list of other files"):
        read_clip(path, 0, 1)


@pytest.mark.parametrize("suffix", [".mkv", ".mov"])
def test_a_video_beside_the_one_that_is_played_is_not_taken_for_it(suffix: str, tmp_path: Path) -> None:
    source = write_video(tmp_path, count=3)
    path = tmp_path / f"two{suffix}"
    with av.open(source) as reading, av.open(path, "w") as writing:
        stream = reading.streams.video[0]
        copies = [writing.add_stream_from_template(stream) for _ in range(2)]
        copies[0].disposition, copies[1].disposition = 0, Disposition.default.value  # PyAV 17 takes no flag
        for packet in [packet for packet in reading.demux(stream) if packet.size]:
            for copy in copies:
                packet.stream = copy
                writing.mux(packet)
    assert look(path).refused == (
        "has 2 video streams, and players show number 2; keep that one (ffmpeg -map 0:v:1 -c copy)"
    )
