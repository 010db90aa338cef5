"""Painted clips and stills are real files: `luve index` takes all of them, with captions, and they move."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from luve_lightning.analysis import random_models
from luve_lightning.analysis.random_models import make_material
from luve_lightning.cli.index import index
from luve_lightning.data.index_file import read_rows
from luve_lightning.data.mini_world import vocabulary
from luve_lightning.data.text_store import captions_of
from luve_lightning.data.video_files import read_video
from luve_lightning.data.video_index import CAPTIONS
from luve_lightning.files import file_digest


def test_luve_index_takes_every_clip_and_still_with_its_caption(tmp_path: Path) -> None:
    made = make_material(tmp_path / "own", size=(72, 128), clips=4, frames=9, fps=24, stills=2, seed=3)
    index([tmp_path / "own"], output=tmp_path / "own.parquet", processes=1)
    rows = {row.path.name: row for row in read_rows(tmp_path / "own.parquet")}

    assert list(rows) == [path.name for path in made]
    entries = [row.entry for row in rows.values() if row.entry is not None]
    assert {(entry.height, entry.width) for entry in entries} == {(72, 128)}
    assert [entry.total_frames for entry in entries] == [9] * 4 + [1] * 2
    assert [entry.fps for entry in entries[:4]] == [24] * 4
    assert [rows[path.name].split for path in made] == ["train", "val", "test", "train", "train", "val"]
    for entry in entries:
        assert set(" ".join(entry.captions.values()).split()) <= set(vocabulary())
    captions = captions_of(entries, ["caption", *CAPTIONS])
    assert len(captions) == 1 + 4 * 11 + 2 * 2, "eleven of a clip, two of a still, and the empty one"


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    def digests(name: str, seed: int) -> list[str]:
        made = make_material(tmp_path / name, size=(64, 96), clips=2, frames=5, fps=30000 / 1001, stills=2, seed=seed)
        return [file_digest(path) for path in made]

    first = digests("first", 0)
    assert len(set(first)) == len(first)
    assert digests("again", 0) == first
    assert not set(digests("other", 1)) & set(first)


@pytest.mark.parametrize("size", [(240, 424), (600, 320)])  # smaller than a photograph, larger than one
def test_a_clip_moves_and_compresses_like_video(tmp_path: Path, size: tuple[int, int]) -> None:
    (path,) = make_material(tmp_path, size=size, clips=1, frames=17, fps=16, stills=0, seed=0)
    frames, fps = read_video(path)
    assert frames.shape == (17, *size, 3)
    assert fps == 16
    steps = np.abs(np.diff(frames.astype(int), axis=0)).mean(axis=(1, 2, 3))
    assert (steps > 0.5).all()  # no frame stands still
    assert frames.std() > 10  # nor is it flat
    assert path.stat().st_size < 0.25 * frames.size  # noise of this contrast takes more than a byte a value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (63, 96)}, r"size: expected even sides of at least 32 pixels, got 63x96"),
        ({"frames": 0}, "frames: expected 1 or more, got 0"),
        ({"fps": 0}, r"fps: expected a number in \(0, 240\], got 0"),
        ({"stills": -1}, "stills: expected 0 or more, got -1"),
    ],
)
def test_unsuitable_arguments_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    arguments = {"size": (64, 96), "clips": 1, "frames": 5, "fps": 16, "stills": 0, "seed": 0, **change}
    with pytest.raises(ValueError, match=message):
        make_material(tmp_path, **arguments)  # type: ignore[arg-type]


def test_large_weights_are_drawn_by_all_cores_and_small_ones_as_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_models, "_PIECE", 1000)

    def drawn(threads: int, seed: int = 0) -> list[torch.Tensor]:
        monkeypatch.setattr(random_models, "cores", lambda: threads)
        with random_models._seeded(seed, torch.device("cpu")):
            small, large, even = torch.empty(20, 50), nn.Parameter(torch.empty(70, 331)), torch.empty(9999).double()
            nn.init.normal_(small, std=2)
            nn.init.normal_(large, 1, 0.02)
            nn.init.uniform_(even, -3, 5)
            nn.init.kaiming_uniform_(torch.empty(3, 7).t())  # not contiguous
            return [small, large.detach(), even]

    state = torch.get_rng_state()
    small, large, even = drawn(1)
    assert all(torch.equal(x, y) for x, y in zip(drawn(3), (small, large, even), strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(drawn(1, seed=1), (small, large, even), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(small, torch.empty(20, 50).normal_(0, 2, generator=torch.Generator().manual_seed(0)))
    assert len(large.unique()) > 0.9 * large.numel(), "every piece has numbers of its own"
    assert float(large.mean()) == pytest.approx(1, abs=0.001)
    assert float(large.std()) == pytest.approx(0.02, rel=0.03)
    assert even.min() >= -3
    assert even.max() <= 5
    assert float(even.mean()) == pytest.approx(1, abs=0.1)
