"""`luve precompute` over several sizes and lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luve_lightning.data.latent_store import LatentStore
from tests.helpers.bucket_world import write_shapes
from tests.helpers.run_luve import Outcome, run_luve

SHAPES = [(9, 48, 96), (9, 48, 96), (9, 48, 48), (5, 64, 64), (1, 48, 48), (9, 40, 40)]


def precompute(capsys: Any, backbone: Path, folder: Path, *options: Any) -> Outcome:
    common = ["--backbone", backbone, "--index", folder / "clips.csv", "--store", folder / "store", "--scales", "[]"]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    return run_luve(capsys, "precompute", *common, *quiet, *options)


def entries(folder: Path) -> set[str]:
    return {path.name for path in LatentStore(folder / "store").root.glob("??/*.safetensors")}


@pytest.mark.slow
def test_buckets_are_those_of_one_size_each(
    capsys: pytest.CaptureFixture[str], tiny_backbone: Path, tmp_path: Path
) -> None:
    write_shapes(tmp_path, SHAPES, [])
    (tmp_path / "clips" / "04-1-48x48.mp4").write_bytes(b"no video")  # the only clip of its bucket
    size, frames = "[[32, 64], [48, 48]]", "[1, 5, 9]"
    outcome = precompute(capsys, tiny_backbone, tmp_path, "--size", size, "--frames", frames)
    assert outcome.code == 0, outcome.err
    told = " ".join(outcome.out.split())
    assert "bucket 1 of 4, 48x48x9: 1 window bucket 2 of 4, 32x64x9: 2 windows bucket 3 of 4, 48x48x5" in told
    assert "encoded 4 latents" in told
    assert f"quarantined 1, listed in {tmp_path / 'store' / 'quarantine'}" in told
    reason = "40x40 pixels, smaller than every bucket's size, such as 32x64"
    assert f"in no bucket 1, first {tmp_path / 'clips' / '05-9-40x40.mp4'}: {reason}" in told
    together = entries(tmp_path)
    again = precompute(capsys, tiny_backbone, tmp_path, "--size", size, "--frames", frames)
    assert "encoded 0 latents" in " ".join(again.out.split())
    # The same clips by themselves: a bucket's latents are those of its one size and length.
    apart = tmp_path / "apart"
    apart.mkdir()
    (apart / "clips").symlink_to(tmp_path / "clips")
    for name, one in {
        "32x64": ("[32, 64]", 9, {0, 1}),
        "48x48": ("[48, 48]", 9, {2}),
        "five": ("[48, 48]", 5, {3}),
    }.items():
        lines = (tmp_path / "clips.csv").read_text().splitlines()
        rows = [line for place, line in enumerate(lines[1:]) if place in one[2]]
        (apart / "clips.csv").write_text("\n".join([lines[0], *rows]) + "\n")
        (apart / "splits.json").write_text('{"train": ["train"], "val": [], "test": []}')
        assert precompute(capsys, tiny_backbone, apart, "--size", one[0], "--frames", one[1]).code == 0, name
    assert entries(apart) == together


@pytest.mark.slow
def test_bad_clips_of_all_buckets_count_together(
    capsys: pytest.CaptureFixture[str], tiny_backbone: Path, tmp_path: Path
) -> None:
    write_shapes(tmp_path, SHAPES, [])
    for name in ("00-9-48x96", "02-9-48x48", "03-5-64x64"):
        (tmp_path / "clips" / f"{name}.mp4").write_bytes(b"no video")
    outcome = precompute(capsys, tiny_backbone, tmp_path, "--size", "[[32, 64], [48, 48]]", "--frames", "[1, 5, 9]")
    assert outcome.code != 0
    assert "3 of 5 clips cannot be read, in several buckets" in outcome.err


def test_scales_that_do_not_divide_an_area_s_sizes_are_refused(
    capsys: pytest.CaptureFixture[str], tiny_backbone: Path, tmp_path: Path
) -> None:
    write_shapes(tmp_path, SHAPES[:1], [])
    words = ["--size", "{area: 2304, shapes: [[1, 2]]}", "--frames", 1, "--scales", "[1.5]"]
    outcome = precompute(capsys, tiny_backbone, tmp_path, *words)
    assert outcome.code == 2
    assert "need multiples of 24, not height 32" in outcome.err
    assert "size.multiple, now null, says what divides all sizes" in outcome.err
