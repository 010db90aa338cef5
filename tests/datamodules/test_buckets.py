"""Buckets: the sizes of an area, and the bucket of each clip."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.clip_windows import WindowReader, quarantine_path
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import LatentRecipe, LatentStore
from luve_lightning.data.quarantine import Quarantine
from luve_lightning.data.store import StoreError
from luve_lightning.data.video_index import ClipEntry, VideoIndex
from luve_lightning.datamodules.buckets import AreaSizes, Bucket, Buckets, find_bucketed_pairs
from tests.helpers.bucket_world import LENGTHS, SIZES, write_shapes

RECIPE = LatentRecipe(vae="v", size=(8, 8), scales=(), frames=1)
SIDES = st.integers(1, 40)


def clip(frames: int, height: int, width: int, **changes: Any) -> ClipEntry:
    return ClipEntry(
        f"{frames}-{height}x{width}",
        Path(f"{frames}-{height}-{width}.mp4"),
        "u",
        16.0,
        frames,
        width,
        height,
        {},
        **changes,
    )


@given(
    area=st.integers(16 * 16, 4000 * 4000),
    shapes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=6),
    multiple=st.sampled_from([8, 16, 48]),
)
def test_sizes_of_an_area_are_multiples_of_about_that_area_and_shape(
    area: int, shapes: list[tuple[int, int]], multiple: int
) -> None:
    sizes = AreaSizes(area, tuple(shapes)).sizes(multiple)
    assert 1 <= len(sizes) == len(set(sizes)) <= len(shapes)
    assert all(n >= multiple and n % multiple == 0 for size in sizes for n in size)
    # Plain reference: the best of all multiples around, by the sum of both errors in log space.
    for height, width in shapes:
        exact = math.sqrt(area * height / width), math.sqrt(area * width / height)
        around = [sorted({max(1, int(n / multiple)) * multiple, (int(n / multiple) + 1) * multiple}) for n in exact]
        best = min(
            abs(math.log(h * w / area)) + abs(math.log(h * width / (w * height))) for h in around[0] for w in around[1]
        )
        assert any(
            abs(abs(math.log(h * w / area)) + abs(math.log(h * width / (w * height))) - best) < 1e-9 for h, w in sizes
        )


def test_the_paper_s_2k_in_five_shapes() -> None:
    assert AreaSizes(1472 * 2560).sizes(16) == [(1456, 2592), (1680, 2240), (1936, 1936), (2240, 1680), (2592, 1456)]
    assert AreaSizes(1536 * 2688).sizes(48) == [(1536, 2688), (1776, 2352), (2016, 2016), (2352, 1776), (2688, 1536)]


@given(
    shapes=st.lists(st.tuples(st.integers(1, 30), SIDES, SIDES), max_size=12),
    sizes=st.lists(st.tuples(SIDES, SIDES), min_size=2, max_size=5, unique=True),
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=4, unique=True),
    start=st.integers(0, 3),
    stride=st.integers(1, 3),
)
def test_a_clip_goes_to_the_nearest_shape_that_it_covers_and_the_longest_length_that_it_fills(
    shapes: list[tuple[int, int, int]], sizes: list[tuple[int, int]], lengths: list[int], start: int, stride: int
) -> None:
    buckets = Buckets(sizes, lengths)
    recipe = LatentRecipe("v", (1, 1), (), 1, start=start, stride=stride)
    clips = [clip(*shape) for shape in shapes]
    assigned, left = buckets.assign(clips, recipe)
    assert list(assigned) == [bucket for bucket in buckets if bucket in assigned]
    volumes = [bucket.volume for bucket in buckets]
    assert volumes == sorted(volumes, reverse=True)
    placed = [(bucket, id(one)) for bucket, some in assigned.items() for one in some]
    assert len(placed) + len(left) == len(clips)
    bucket_of = {key: bucket for bucket, key in placed}
    for one in clips:
        fits = [n for n in lengths if start + (n - 1) * stride + 1 <= one.total_frames]
        covered = [size for size in sizes if size[0] <= one.height and size[1] <= one.width]
        bucket = bucket_of.get(id(one))
        if not fits or not covered:
            assert bucket is None
            continue
        assert bucket is not None
        assert bucket.frames == max(fits)

        def distance(size: tuple[int, int], entry: ClipEntry = one) -> float:
            return abs(math.log(entry.height / entry.width) - math.log(size[0] / size[1]))

        assert bucket.size in covered
        assert distance(bucket.size) <= min(map(distance, covered)) + 1e-9


def test_what_no_bucket_takes_is_named_with_its_reason() -> None:
    buckets = Buckets([(48, 64), (64, 48)], [5, 9])
    clips = [clip(9, 40, 200), clip(4, 64, 64), clip(1, 64, 64, still=True), clip(9, 64, 64)]
    assigned, left = buckets.assign(clips, RECIPE)
    assert [error.reason for error in left] == [
        "40x200 pixels, smaller than every bucket's size, such as 48x64",
        "4 frames, expected at least 5",
        "a picture, and no length in frames: [5, 9] is 1",
    ]
    assert [*assigned.values()] == [clips[3:]]


def test_a_single_size_takes_every_clip_as_ever() -> None:
    """Whoever reads it says that it is too small: an index may be wrong."""
    small = clip(9, 4, 4)
    assigned, left = Buckets([(48, 48)], [9]).assign([small, clip(3, 48, 48)], RECIPE)
    assert assigned == {Bucket((48, 48), 9): [small]}
    assert [error.reason for error in left] == ["3 frames, expected at least 9"]


def test_equal_shapes_go_to_the_larger_size() -> None:
    buckets = Buckets([(24, 48), (36, 72), (48, 48)], [1])
    assert buckets.size_for(50, 100) == (36, 72)
    assert buckets.size_for(30, 60) == (24, 48)


@pytest.mark.parametrize(
    ("size", "frames", "message"),
    [
        ([(8, 8), (8, 8)], 1, r"^size: expected one or more, all different, got \[\(8, 8\), \(8, 8\)\]"),
        ([], 1, r"^size: expected one or more, all different, got \[\]"),
        ((8, 8), [1, 1], r"^frames: expected one or more, all different, got \[1, 1\]"),
        ((8, 8), [], r"^frames: expected one or more"),
    ],
)
def test_impossible_choices(size: Any, frames: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Buckets.chosen(size, frames, lambda: 16)


@pytest.mark.parametrize("values", [{"area": 0}, {"area": 9, "multiple": 0}])
def test_impossible_areas(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^size: expected area and multiple >= 1, got"):
        AreaSizes(**values)
    with pytest.raises(ValueError, match=r"^size.shapes: expected pairs"):
        AreaSizes(9, ((0, 1),))


def test_scales_that_do_not_divide_an_area_s_sizes_name_the_option() -> None:
    area = AreaSizes(100_000)
    buckets = Buckets.chosen(area, 1, lambda: 16)
    with pytest.raises(ValueError, match=r"need multiples of 24, not .*: size\.multiple, now null, says what divides"):
        buckets.check_scales([1.5], 8, area)


def test_latents_of_all_buckets_are_found_in_the_index_s_order(tmp_path: Path) -> None:
    entries = VideoIndex.from_csv(write_shapes(tmp_path / "world")).split("train")
    buckets = Buckets([(h, w) for h, w in SIZES], LENGTHS)
    store = LatentStore(tmp_path / "store")
    hashes = ClipHashes(store.root)
    assigned, _ = buckets.assign(entries, RECIPE)
    assert {str(bucket): len(some) for bucket, some in assigned.items()} == {
        "48x48x9": 5, "32x64x9": 3, "64x32x5": 2, "48x48x1": 3, "32x64x1": 1,
    }  # fmt: skip
    with pytest.raises(StoreError, match="run `luve precompute`"):
        find_bucketed_pairs(store, hashes, entries, RECIPE, buckets)
    bad = assigned[Bucket((32, 64), 1)][0]  # a bucket of which every clip is known as bad
    for bucket, some in assigned.items():
        read = WindowReader(bucket.recipe(RECIPE), store, hashes)
        for entry in some:
            if entry is bad:
                Quarantine(quarantine_path(store, read.recipe), 1, 1).add(ClipError(entry.path, "broken"))
                continue
            [frames] = read.recipe.frame_ranges(entry.total_frames)
            store.write(read.recipe.key(hashes.digest(entry.path), frames), random_latents(bucket))
    found = find_bucketed_pairs(store, hashes, entries, RECIPE, buckets)
    assert [pair.entry for pair in found.pairs] == [entry for entry in entries if entry is not bad]
    for pair, bucket in zip(found.pairs, found.buckets, strict=True):
        assert pair.entry in assigned[bucket]
        assert pair.hr_key.size == bucket.size
    assert found.lookup.dropped == [(bad.clip_id, "broken")]


def random_latents(bucket: Bucket) -> Any:
    import torch

    return torch.randn(2, (bucket.frames - 1) // 4 + 1, bucket.size[0] // 8, bucket.size[1] // 8)
