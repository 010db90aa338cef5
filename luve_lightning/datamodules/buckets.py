"""Buckets: the sizes and lengths that clips of any shape are brought to, and the one that a clip goes to.

Data flow: a configuration's `size` and `frames` make `Buckets`. `Buckets.assign` gives each clip to one of them, by the
index alone, so that every verb agrees. A bucket's latents are those of the recipe with its size and frames
(`Bucket.recipe`), so their keys follow from `LatentRecipe` as ever. `find_bucketed_pairs` finds them again. A training
batch comes from one bucket (`luve_lightning.datamodules.sampling`). A single size and length are one bucket, to which
every clip goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.clip_windows import NoUsableClips, PairEntry, PairLookup, find_pair_keys, plan_windows
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import LatentRecipe, LatentStore, check_scales
from luve_lightning.data.video_index import ClipEntry
from luve_lightning.terminal import amount

PixelSize = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Bucket:
    """What clips are resized, cropped and cut to, so that they can share a batch.

    Attributes:
        size: height and width, pixels.
        frames: number of frames.
    """

    size: PixelSize
    frames: int

    @property
    def volume(self) -> int:
        """Pixels of all frames."""
        return self.size[0] * self.size[1] * self.frames

    def recipe(self, like: LatentRecipe) -> LatentRecipe:
        """The recipe of this bucket's latents, otherwise like another."""
        return replace(like, size=self.size, frames=self.frames)

    def __str__(self) -> str:
        return f"{self.size[0]}x{self.size[1]}x{self.frames}"


@dataclass(frozen=True)
class AreaSizes:
    """Sizes of about one area, one for each shape.

    Attributes:
        area: pixels of a frame.
        shapes: height and width of each shape in any unit, such as [9, 16].
        multiple: divides every height and width; null is the backbone's own, 16 for Wan2.1. A VLUer's scales may
            need more: 48 for 1.5, 2 and 3.
    """

    area: int
    shapes: tuple[tuple[int, int], ...] = ((9, 16), (3, 4), (1, 1), (4, 3), (16, 9))
    multiple: int | None = None

    def __post_init__(self) -> None:
        # YAML gives lists.
        object.__setattr__(self, "shapes", tuple((height, width) for height, width in self.shapes))
        if not self.shapes or min(map(min, self.shapes)) < 1:
            raise ValueError(f"size.shapes: expected pairs of height and width, each >= 1, got {list(self.shapes)}")
        if self.area < 1 or (self.multiple is not None and self.multiple < 1):
            raise ValueError(f"size: expected area and multiple >= 1, got {self.area} and {self.multiple}")

    def sizes(self, multiple: int) -> list[PixelSize]:
        """The sizes, in the order of the shapes; equal ones once.

        Args:
            multiple: divides every height and width.
        """
        return list(dict.fromkeys(self._size(height, width, multiple) for height, width in self.shapes))

    def _size(self, height: int, width: int, multiple: int) -> PixelSize:
        """The size nearest to the area and the shape together, in log space; of equals, the nearest to the shape."""
        low = [
            max(1, math.isqrt(self.area * one // (other * multiple**2)))
            for one, other in ((height, width), (width, height))
        ]

        def distance(size: PixelSize) -> tuple[Fraction, Fraction, PixelSize]:
            # Exact: every machine makes the same sizes.
            area, shape = Fraction(size[0] * size[1], self.area), Fraction(size[0] * width, size[1] * height)
            shape = max(shape, 1 / shape)
            return max(area, 1 / area) * shape, shape, size

        near = [(h * multiple, w * multiple) for h in (low[0], low[0] + 1) for w in (low[1], low[1] + 1)]
        return min(near, key=distance)


SizeChoice = PixelSize | list[PixelSize] | AreaSizes
"""What `size` may be: one size, several, or those of an area."""

LengthChoice = int | list[int]
"""What `frames` may be: one length, or several."""


class Buckets:
    """Every size with every length, largest first.

    Args:
        sizes: heights and widths in pixels, all different.
        lengths: numbers of frames, all different.

    Raises:
        ValueError: there is none, or one is given twice.
    """

    def __init__(self, sizes: Sequence[PixelSize], lengths: Sequence[int]) -> None:
        self.sizes, self.lengths = [(size[0], size[1]) for size in sizes], sorted(lengths, reverse=True)
        for name, values in (("size", self.sizes), ("frames", self.lengths)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: expected one or more, all different, got {[*values]}")
        # Sorting is stable: among equal volumes the configuration's order decides.
        every = [Bucket(size, frames) for frames in self.lengths for size in self.sizes]
        self._buckets = sorted(every, key=lambda bucket: -bucket.volume)

    @classmethod
    def chosen(cls, size: SizeChoice, frames: LengthChoice, multiple: Callable[[], int]) -> Buckets:
        """The buckets of a configuration.

        Args:
            size: height and width, several of them, or an area.
            frames: one or several numbers of frames.
            multiple: gives what divides the backbone's heights and widths; called for an area without `multiple`.
        """
        lengths = [frames] if isinstance(frames, int) else list(frames)
        if isinstance(size, AreaSizes):
            return cls(size.sizes(size.multiple or multiple()), lengths)
        several = [tuple(one) for one in size if isinstance(one, list | tuple)]
        return cls(several or ([tuple(size)] if size else []), lengths)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Bucket]:
        return iter(self._buckets)

    def __len__(self) -> int:
        return len(self._buckets)

    def check_scales(self, scales: Sequence[float], spatial_ratio: int, choice: SizeChoice | None = None) -> None:
        """Refuse sizes that some scale does not divide into whole latents; see `check_scales`."""
        for size in self.sizes:
            try:
                check_scales(size, scales, spatial_ratio)
            except ValueError as error:
                if not isinstance(choice, AreaSizes):
                    raise
                now = choice.multiple or "null"
                raise ValueError(f"{error}: size.multiple, now {now}, says what divides all sizes") from None

    def size_for(self, height: int, width: int) -> PixelSize | None:
        """The size with the nearest aspect ratio in log space, of those that a picture covers; None if it covers none.

        The larger of two equally near ones. With a single size there is no choice: whoever reads a clip says that it is
        too small.
        """
        if len(self.sizes) == 1:
            return self.sizes[0]
        covered = [size for size in self.sizes if size[0] <= height and size[1] <= width]

        def distance(size: PixelSize) -> tuple[Fraction, int]:
            # Exact: the same clip goes to the same bucket on every machine.
            stretch = Fraction(height * size[1], width * size[0])
            return max(stretch, 1 / stretch), -size[0] * size[1]

        return min(covered, key=distance, default=None)

    def assign(
        self, entries: Iterable[ClipEntry], recipe: LatentRecipe
    ) -> tuple[dict[Bucket, list[ClipEntry]], list[ClipError]]:
        """Every clip's bucket: the size of the nearest shape, and the longest length that the clip fills.

        Args:
            entries: the clips.
            recipe: says which frames of a clip a window takes; its size and frames do not matter.

        Returns:
            The clips of each bucket that has any, largest bucket first, clips in the given order; and what no bucket
            takes, with the reason.
        """
        found: dict[Bucket, list[ClipEntry]] = {bucket: [] for bucket in self}
        left: list[ClipError] = []
        recipes = [replace(recipe, frames=frames) for frames in self.lengths]
        for entry in entries:
            size = self.size_for(entry.height, entry.width)
            if size is None:
                least = min(self.sizes, key=math.prod)
                reason = f"{entry.height}x{entry.width} pixels, smaller than every bucket's size, such as {_by(least)}"
                left.append(ClipError(entry.path, reason))
                continue
            for one in recipes:
                windows, short = plan_windows([entry], one)
                if windows:
                    found[Bucket(size, one.frames)].append(entry)
                    break
            else:
                left.append(ClipError(entry.path, self._too_short(entry, short[0])))
        return {bucket: clips for bucket, clips in found.items() if clips}, left

    def _too_short(self, entry: ClipEntry, error: ClipError) -> str:
        if entry.still and self.lengths[-1] > 1:
            return f"a picture, and no length in frames: {self.lengths[::-1]} is 1"
        return error.reason


@dataclass
class BucketedPairs:
    """The latents of clips in all buckets.

    Attributes:
        pairs: windows whose latents all exist, in the order of the index.
        buckets: the bucket of each.
        lookup: the same pairs, what was left out and why, and clips with a variable frame rate.
    """

    pairs: list[PairEntry] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    lookup: PairLookup = field(default_factory=PairLookup)


def find_bucketed_pairs(
    store: LatentStore,
    hashes: ClipHashes,
    entries: Sequence[ClipEntry],
    recipe: LatentRecipe,
    buckets: Buckets,
    variant: str = "plain",
) -> BucketedPairs:
    """Find the latents of clips, each in its bucket; see `find_pair_keys`.

    Raises:
        StoreError: clips lack latents without being known as bad.
        NoUsableClips: no clip has any.
    """
    if len(buckets) == 1:
        [bucket] = buckets
        lookup = find_pair_keys(store, hashes, entries, bucket.recipe(recipe), variant)
        return BucketedPairs(lookup.pairs, [bucket] * len(lookup.pairs), lookup)
    assigned, left = buckets.assign(entries, recipe)
    reasons = {error.path: error.reason for error in left}
    lookup = PairLookup(dropped=[(e.clip_id, reasons[e.path]) for e in entries if e.path in reasons])
    places = {entry.clip_id: place for place, entry in enumerate(entries)}
    found: list[tuple[PairEntry, Bucket]] = []
    for bucket, clips in assigned.items():
        here = find_pair_keys(store, hashes, clips, bucket.recipe(recipe), variant, may_be_empty=True)
        found += [(pair, bucket) for pair in here.pairs]
        lookup.dropped += here.dropped
        lookup.uneven += here.uneven
    if not found:
        why = f", first {lookup.dropped[0][0]}: {lookup.dropped[0][1]}" if lookup.dropped else ""
        raise NoUsableClips(
            f"none of {amount(len(entries), 'clip')} has latents in {store.root} in any of {len(buckets)} buckets{why}"
        )
    found.sort(key=lambda pair: places[pair[0].entry.clip_id])  # windows keep their order: sorting is stable
    lookup.pairs = [pair for pair, _ in found]
    return BucketedPairs(lookup.pairs, [bucket for _, bucket in found], lookup)


def tell_lookup(split: str, lookup: PairLookup) -> None:
    """Say, on the first process, which clips have no latents, and which have a varying frame rate."""
    if lookup.dropped:
        clip, reason = lookup.dropped[0]
        lacking = amount(len(lookup.dropped), "clip has", "clips have")
        rank_zero_info(f"{split}: {lacking} no latents, first {clip}: {reason}")
    if lookup.uneven:
        varying = amount(len(lookup.uneven), "clip has", "clips have")
        rank_zero_info(
            f"{split}: {varying} a variable frame rate, first {lookup.uneven[0]}: frames are counted, not timed"
        )
    if lookup.repeated:
        slow = amount(len(lookup.repeated), "clip is", "clips are")
        rank_zero_info(
            f"{split}: {slow} slower than the frame rate that is read, first {lookup.repeated[0]}: some of their "
            "frames come twice"
        )


def _by(size: PixelSize) -> str:
    return f"{size[0]}x{size[1]}"
