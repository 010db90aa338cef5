"""Statistics of folders against the metric on the same frames."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from luve_lightning.data.hashes import FileHashes
from luve_lightning.data.still_files import ORIENTATION
from luve_lightning.data.stills import read_still
from luve_lightning.data.video_files import read_video, write_video
from luve_lightning.evaluation import prepared_metrics as reference_statistics
from luve_lightning.evaluation.prepared_metrics import (
    folder_statistics,
    prepare_metrics,
    prepare_reference,
    read_frames,
    source_hash,
)
from luve_lightning.files import file_digest, listing_digest
from luve_lightning.metrics.feature_moments import FeatureMoments
from luve_lightning.metrics.frechet_patch import DataCopying, FrechetPatchDistance
from tests.helpers.patch_features import PLAN, StubFeatures, stub_metric, stub_video
from tests.helpers.unwritable import forbid_writing
from tests.metrics.test_frechet_patch_clips import Means


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures and a video, and what is none of them."""
    folder = tmp_path / "reference"
    (folder / "below").mkdir(parents=True)
    for number, name in enumerate(("b.png", "below/a.PNG")):
        Image.fromarray(stub_video(number)[0].numpy()).save(folder / name)
    write_video(folder / "c.mp4", stub_video(2, height=50, width=78).numpy(), fps=8, lossless=True)
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("text")
    return folder


def test_statistics_are_those_of_all_files(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    statistics = folder_statistics(folder, PLAN, StubFeatures(), "cpu", lambda *call: calls.append(call))
    metric = FrechetPatchDistance(PLAN, StubFeatures())
    metric.prepare("cpu")
    metric.update(stub_video(0)[:1], "b.png")
    metric.update(stub_video(1)[:1], "below/a.PNG")
    metric.update(stub_video(2, height=50, width=78), "c.mp4")
    want = metric.moments
    assert statistics.moments.count == want.count == 2 * (6 + 3) + 4 * (6 + 3)
    torch.testing.assert_close(statistics.moments.sum, want.sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(statistics.moments.outer, want.outer, rtol=1e-12, atol=0)
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert (statistics.files, statistics.extractor, statistics.plan) == (3, "stub-1", PLAN)
    assert statistics.source == str(folder)


def test_grey_and_transparent_pictures_are_rgb(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P"):
        path = tmp_path / f"{mode}.png"
        Image.fromarray(stub_video(0)[0].numpy()).convert(mode).save(path)
        frames = read_frames(path)
        assert frames.shape == (1, 50, 77, 3)
        assert frames.dtype == torch.uint8


def test_an_image_is_read_as_it_is_shown_and_hashed_as_it_is_read(tmp_path: Path) -> None:
    """A turned or converted image has a hash of its own: statistics made of its stored pixels are not found again."""
    folder = tmp_path / "images"
    folder.mkdir()
    picture = Image.fromarray(stub_video(0)[0].numpy())
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    wide = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    picture.save(folder / "plain.jpg", quality=95)
    picture.save(folder / "plain.bmp")
    picture.save(folder / "turned.jpg", quality=95, exif=turned)
    picture.convert("LAB").save(folder / "lab.tif", icc_profile=wide)
    for name in ("turned.jpg", "lab.tif", "plain.jpg"):
        assert np.array_equal(read_frames(folder / name), read_still(folder / name))
    assert read_frames(folder / "turned.jpg").shape == (1, 77, 50, 3)
    assert (read_frames(folder / "lab.tif")[0].int() - stub_video(0)[0].int()).abs().float().mean() < 8
    with Image.open(folder / "plain.jpg") as image:
        assert np.array_equal(read_frames(folder / "plain.jpg")[0], np.asarray(image.convert("RGB")))

    def as_stored(*names: str) -> bool:
        files = [folder / name for name in names]
        return source_hash(folder, files) == listing_digest((file.name, file_digest(file)) for file in files)

    assert as_stored("plain.jpg", "plain.bmp")
    assert not as_stored("turned.jpg")
    assert not as_stored("lab.tif")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    with pytest.raises(ValueError, match=r"^reference image .*cmyk\.jpg.*CMYK without an ICC profile"):
        read_frames(folder / "cmyk.jpg")
    with pytest.raises(ValueError, match=r"^reference image .*cmyk\.jpg.*CMYK without an ICC profile"):
        source_hash(folder, [folder / "cmyk.jpg"])


def test_files_that_cannot_be_used_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing: no such folder"):
        folder_statistics(tmp_path / "nothing", PLAN, StubFeatures(), "cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: holds neither images nor videos"):
        folder_statistics(tmp_path / "empty", PLAN, StubFeatures(), "cpu")
    with pytest.raises(ValueError, match=r"b.png: frames are 50x77, smaller than a patch of 60 \(patches.size\)$"):
        folder_statistics(folder, replace(PLAN, size=60), StubFeatures(), "cpu")
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"b.png: cannot be read"):
        folder_statistics(folder, PLAN, StubFeatures(), "cpu")


@pytest.mark.slow
def test_a_cache_is_used_until_the_folder_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = stub_metric()
    metric.update(stub_video(7))
    cache = tmp_path / "cache"
    made = prepare_reference(metric, folder, "cpu", cache)
    first = metric.compute().item()

    def not_again(*args: object) -> None:
        raise AssertionError("statistics were made again")

    with monkeypatch.context() as patch:
        patch.setattr(reference_statistics, "folder_statistics", not_again)
        again = stub_metric()
        again.update(stub_video(7))
        kept = prepare_reference(again, folder, "cpu", cache)
        assert kept.source_hash == made.source_hash
        assert again.compute().item() == first
        (folder / "b.png").rename(folder / "d.png")
        with pytest.raises(AssertionError, match="made again"):
            prepare_reference(again, folder, "cpu", cache)
        with pytest.raises(AssertionError, match="made again"):
            prepare_reference(FrechetPatchDistance(replace(PLAN, seed=6), StubFeatures()), folder, "cpu", cache)
    assert prepare_reference(stub_metric(), folder, "cpu", cache).source_hash != made.source_hash
    assert len(list(cache.iterdir())) == 2


def test_a_file_is_a_reference_when_it_fits(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    folder_statistics(folder, PLAN, StubFeatures(), "cpu").save(path)
    metric = FrechetPatchDistance(PLAN, StubFeatures())
    prepare_reference(metric, path, "cpu")
    metric.update(stub_video(7))
    assert metric.compute() > 0
    with pytest.raises(ValueError, match=r"patches.frames 4 there and 2 here"):
        prepare_reference(FrechetPatchDistance(replace(PLAN, frames=2), StubFeatures()), path, "cpu")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        prepare_reference(metric, tmp_path / "gone", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"cut", b"json"])
def test_damaged_statistics_in_the_cache_are_made_again_with_a_word(
    folder: Path, tmp_path: Path, content: bytes
) -> None:
    cache = tmp_path / "cache"
    made = prepare_reference(stub_metric(), folder, "cpu", cache)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    if content == b"json":
        deep = json.dumps({"luve_feature_statistics": "[" * 100_000})
        header = f'{{"__metadata__": {deep}}}'.encode()
        content = len(header).to_bytes(8, "little") + header
    kept.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{kept.name}: cannot be read .*; they are made again"):
        again = prepare_reference(stub_metric(), folder, "cpu", cache)
    assert torch.equal(again.moments.sum, made.moments.sum)
    assert kept.read_bytes() == whole


def test_a_cache_that_may_not_be_written_is_no_hindrance(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    forbid_writing(monkeypatch, tmp_path / "cache", errno.EROFS)
    with pytest.warns(UserWarning, match="cache: cannot be written"):
        assert prepare_reference(stub_metric(), folder, "cpu", tmp_path / "cache").files == 3


def test_features_are_kept_beside_the_moments_where_a_kernel_needs_them(folder: Path, tmp_path: Path) -> None:
    """In a file of their own, so that statistics without features are never taken for them."""
    plain, kernel = FrechetPatchDistance(PLAN, StubFeatures()), FrechetPatchDistance(PLAN, StubFeatures(), kernel=True)
    for metric in (plain, kernel):
        prepare_reference(metric, folder, "cpu", tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    again = FrechetPatchDistance(PLAN, StubFeatures(), kernel=True)
    found = prepare_reference(again, folder, "cpu", tmp_path / "cache")
    assert found.lengths == (9, 9, 36)
    assert found.rows is not None
    assert found.rows.shape == (54, 6)
    assert torch.equal(found.moments.sum, FeatureMoments.from_features(found.rows).sum)
    assert again.moments.count == 0


def test_sets_of_clips_may_be_folders(tmp_path: Path) -> None:
    for which, seeds in (("training", range(3)), ("unseen", range(3, 6))):
        for seed in seeds:
            write_video(tmp_path / which / f"{seed}.mp4", stub_video(seed, 17, 50, 78).numpy(), fps=8, lossless=True)
    metric = DataCopying(Means(), tmp_path / "training", tmp_path / "unseen")
    ready, skipped = prepare_metrics(
        {"copying": metric}, torch.device("cpu"), False, FileHashes(tmp_path / "hashes"), tmp_path / "cache"
    )
    assert not skipped
    assert ready[0].name == "data_copying"
    assert metric.score(torch.from_numpy(read_video(tmp_path / "training" / "1.mp4")[0])) == 1
    other = DataCopying(Means(), tmp_path / "unseen", tmp_path / "training")
    again, _ = prepare_metrics(
        {"copying": other}, torch.device("cpu"), False, FileHashes(tmp_path / "hashes"), tmp_path / "cache"
    )
    assert again[0].identity != ready[0].identity
