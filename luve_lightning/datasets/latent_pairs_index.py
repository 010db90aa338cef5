"""Which stored latents belong together: every clip's high- and low-resolution ones, found before training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from luve_lightning.datasets.clip_hashes import ClipHashes
from luve_lightning.datasets.clip_types import RefusedClip
from luve_lightning.datasets.encode_clips import plan_windows
from luve_lightning.datasets.latent_key import LatentKey
from luve_lightning.datasets.latent_recipe import HIGH_RESOLUTION, LatentRecipe
from luve_lightning.datasets.latent_store import LatentStore, StoreError
from luve_lightning.datasets.quarantine import Quarantine
from luve_lightning.datasets.video_index import ClipEntry


@dataclass(frozen=True)
class PairEntry:
    """One window of a clip at all its resolutions.

    Attributes:
        entry: the clip.
        hr_key: of its high-resolution latents.
        lr_keys: of the low-resolution ones, by scale.
    """

    entry: ClipEntry
    hr_key: LatentKey
    lr_keys: dict[float, LatentKey]


@dataclass
class PairLookup:
    """What a lookup found.

    Attributes:
        pairs: windows whose latents are all there, in the order of the index.
        dropped: (clip id, reason) of clips that no latents are expected of: too short, shown in a way that cannot
            be reproduced, or set aside by precompute.
        uneven: clip ids of those with a variable frame rate.
    """

    pairs: list[PairEntry] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    uneven: list[str] = field(default_factory=list)


def find_pair_keys(
    store: LatentStore,
    hashes: ClipHashes,
    entries: Iterable[ClipEntry],
    recipe: LatentRecipe,
    variant: str = "plain",
    quarantine: Path | None = None,
) -> PairLookup:
    """Find the latents of clips, and refuse to go on when any are missing.

    Clips whose hash is not remembered are read once for it, and looked at once for how they are shown.

    Args:
        store: where `luve precompute` put them.
        hashes: of the clips; `ClipHashes(store.root)` is precompute's.
        entries: the clips.
        recipe: which latents; it must say what precompute's configuration said.
        variant: one of the recipe's variants.
        quarantine: the list of bad clips that precompute left; `quarantine_path` when None.

    Raises:
        StoreError: in one line, when clips lack latents without being known as bad.
    """
    if variant not in recipe.variants:
        raise ValueError(f"variant {variant!r} is not among the recipe's, {list(recipe.variants)}")
    entries = list(entries)
    windows, short = plan_windows(entries, recipe)
    # A clip that was replaced since it failed is not in the list any more, and must have latents.
    listed = Quarantine(quarantine or quarantine_path(store, recipe), max_bad_fraction=1, total=1).bad()
    bad = {os.path.realpath(clip.path): clip.reason for clip in listed}
    reasons = {error.path: error.reason for error in short}
    lookup = PairLookup()
    lacking: dict[str, ClipEntry] = {}
    for window in windows:
        try:
            pair = _find(store, hashes, window.clip, window.frames, recipe, variant)
        except RefusedClip as error:
            reasons.setdefault(window.clip.path, error.reason)
            continue
        if pair is not None:
            lookup.pairs.append(pair)
        elif (real := os.path.realpath(window.clip.path)) in bad:
            reasons.setdefault(window.clip.path, bad[real])
        else:
            lacking[window.clip.clip_id] = window.clip
    if lacking or not lookup.pairs:
        raise StoreError(_complaint(store, recipe, variant, list(lacking), len(entries)))
    lookup.uneven = [path.stem for path in hashes.uneven(dict.fromkeys(p.entry.path for p in lookup.pairs))]
    lookup.dropped = [(entry.clip_id, reasons[entry.path]) for entry in entries if entry.path in reasons]
    return lookup


def quarantine_path(store: LatentStore, recipe: LatentRecipe) -> Path:
    """Where precompute names the clips that could not be encoded.

    One list for each size and choice of frames: a clip too small or short for one recipe can do for another.
    """
    height, width = recipe.size
    name = f"{height}x{width}-{recipe.frames}-from-{recipe.start}-by-{recipe.stride}.jsonl"
    return store.root / "quarantine" / name


def _find(
    store: LatentStore,
    hashes: ClipHashes,
    clip: ClipEntry,
    frames: tuple[int, int],
    recipe: LatentRecipe,
    variant: str,
) -> PairEntry | None:
    try:
        digest = hashes.digest(clip.path)
    except OSError:
        return None
    high = recipe.key(digest, frames, HIGH_RESOLUTION, variant)
    low = {scale: recipe.key(digest, frames, scale, variant) for scale in recipe.scales}
    return PairEntry(clip, high, low) if all(map(store.has, (high, *low.values()))) else None


def _complaint(
    store: LatentStore, recipe: LatentRecipe, variant: str, lacking: Sequence[str], total: int
) -> str:
    scales = ", ".join(f"{scale:g}" for scale in recipe.scales) or "none"
    many = f"{len(lacking)} of {total} clips have no" if lacking else f"none of {total} clips has"
    which = f" (first {lacking[0]})" if lacking else ""
    of = "" if variant == "plain" else f"variant {variant}, "
    return (
        f"{many} latents in {store.root}{which} for {of}size {recipe.size[0]}x{recipe.size[1]}, "
        f"scales {scales}, {recipe.frames} frames from {recipe.start} (windows {recipe.windows}, stride "
        f"{recipe.stride}), VAE {recipe.vae[:12]}: run `luve precompute` with these values on this index"
    )
