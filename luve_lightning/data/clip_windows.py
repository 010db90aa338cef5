"""Windows of clips: planning them, reading those that lack latents, finding the latents of the others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from luve_lightning.data.clip_container import ClipError, Frames, RefusedClip
from luve_lightning.data.clips import read_clip
from luve_lightning.data.hashes import ClipHashes, stamp
from luve_lightning.data.latent_store import HIGH_RESOLUTION, LatentKey, LatentRecipe, LatentStore
from luve_lightning.data.quarantine import Quarantine
from luve_lightning.data.store import StoreError
from luve_lightning.data.video_index import ClipEntry
from luve_lightning.functional.frame_times import slower
from luve_lightning.functional.pixels import crop_frames
from luve_lightning.terminal import amount


@dataclass(frozen=True)
class ClipWindow:
    """A clip and the frames of one latent, (start, stop); at the recipe's frame rate where it has one."""

    clip: ClipEntry
    frames: tuple[int, int]


class EncodeItem:
    """A window on its way to the store.

    Not a dataclass: with `precision: bf16-true` Lightning would search it for tensors to convert, and fails at the
    frozen ones inside.

    Attributes:
        window: what it is.
        missing: keys of the latents that the store lacks, by (variant, scale).
        frames: uint8 T x H x W x C, cropped to the target aspect ratio; None when nothing is missing or reading
            failed.
        error: why the clip cannot be used; None when it can.
    """

    def __init__(
        self,
        window: ClipWindow,
        missing: dict[tuple[str, float], LatentKey] | None = None,
        frames: Tensor | None = None,
        error: str | None = None,
    ) -> None:
        self.window, self.missing, self.frames, self.error = window, missing or {}, frames, error


def plan_windows(entries: Iterable[ClipEntry], recipe: LatentRecipe) -> tuple[list[ClipWindow], list[ClipError]]:
    """All windows of all clips, from the index alone, and the clips that are too short for one, or too slow."""
    windows: list[ClipWindow] = []
    short: list[ClipError] = []
    for entry in entries:
        ranges, reason = recipe.clip_ranges(entry.total_frames, entry.fps)
        windows += [ClipWindow(entry, frames) for frames in ranges]
        if reason:
            short.append(ClipError(entry.path, reason))
    return windows, short


def repeated_clips(entries: Iterable[ClipEntry], recipe: LatentRecipe) -> list[ClipEntry]:
    """The clips that are slower than the recipe's frame rate, each once; none where it has no frame rate."""
    fps = recipe.fps
    unique = {entry.path: entry for entry in entries}.values()
    return [] if fps is None else [e for e in unique if e.total_frames > 1 and slower(e.fps, fps)]


class WindowReader:
    """Decodes a window if the store lacks latents of it.

    Args:
        recipe: which latents to make.
        store: where they go.
        hashes: hashes of the clips.
        hardware: what decodes, see `read_clip`; the frames are the same, and so are the latents' addresses.
    """

    def __init__(
        self, recipe: LatentRecipe, store: LatentStore, hashes: ClipHashes, hardware: str | None = None
    ) -> None:
        self.recipe, self.store, self.hashes, self.hardware = recipe, store, hashes, hardware

    def __call__(self, window: ClipWindow) -> EncodeItem:
        """What is missing and, if anything is, the frames.

        A bad clip gives an item with an error, not an exception, because it must cross to another process.
        """
        try:
            return self._read(window)
        except ClipError as error:
            return EncodeItem(window, error=error.reason)
        except OSError as error:
            return EncodeItem(window, error=error.strerror or str(error))

    def _read(self, window: ClipWindow) -> EncodeItem:
        path, matte = window.clip.path, window.clip.matte
        digest = self.hashes.digest(path, matte)
        keys = self.recipe.keys(digest, window.frames)
        try:
            item = EncodeItem(window, {name: key for name, key in keys.items() if not self.store.has(key)})
        except OSError as error:  # the store's fault, not the clip's
            raise StoreError(f"{error.filename}: {error.strerror}") from None
        if item.missing:
            before = stamp(path)
            recipe, count = self.recipe, self.recipe.frames
            how: dict[str, Any] = {
                "stride": recipe.stride,
                "fps": recipe.fps,
                "hardware": self.hardware,
                "matte": matte,
            }
            frames = read_clip(path, window.frames[0], count, **how)
            # The frames must be those of the hashed bytes.
            if stamp(path) != before or self.hashes.digest(path, matte) != digest:
                raise ClipError(path, "changed while it was read")
            item.frames = self._crop(path, torch.from_numpy(frames))
        return item

    def _crop(self, path: Path, frames: Tensor) -> Tensor:
        try:
            # A copy, so that the other decoded pixels are freed and do not cross to another process. A loader's worker
            # makes it in shared memory, on its way to that process.
            copied: Tensor = default_collate([crop_frames(frames, self.recipe.size)])[0]
            return copied
        except ValueError as error:
            raise ClipError(path, str(error)) from None


def read_frames(clip: ClipEntry, key: LatentKey, count: int | None = None) -> Frames:
    """The frames that a stored latent shows, or the first of them, as `read_clip` gives them."""
    return read_clip(clip.path, key.frames[0], count or key.count, stride=key.stride, fps=key.fps, matte=clip.matte)


def pending_windows(windows: Sequence[ClipWindow], read: WindowReader) -> list[int]:
    """Positions of the windows that may lack latents. Reads no clip: one of unknown hash is pending."""
    pending = []
    for position, window in enumerate(windows):
        try:
            digest = read.hashes.known(window.clip.path, window.clip.matte)
        except OSError:
            digest = None
        if digest is None or not all(map(read.store.has, read.recipe.keys(digest, window.frames).values())):
            pending.append(position)
    return pending


@dataclass(frozen=True)
class PairEntry:
    """One window of a clip at all its resolutions.

    Attributes:
        entry: the clip.
        hr_key: key of its high-resolution latents.
        lr_keys: keys of the low-resolution ones, by scale.
    """

    entry: ClipEntry
    hr_key: LatentKey
    lr_keys: dict[float, LatentKey]


@dataclass
class PairLookup:
    """The result of a lookup.

    Attributes:
        pairs: windows whose latents all exist, in the order of the index.
        dropped: (clip id, reason) of clips without expected latents: too short, shown in a way that cannot be
            reproduced, or set aside by precompute.
        uneven: clip ids of those with a variable frame rate; none where frames are timed.
        repeated: clip ids of those slower than the recipe's frame rate, so that some of their frames come twice.
    """

    pairs: list[PairEntry] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    uneven: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)


class NoUsableClips(StoreError):
    """No clip has latents, and of each it is known why."""


def find_pair_keys(
    store: LatentStore,
    hashes: ClipHashes,
    entries: Iterable[ClipEntry],
    recipe: LatentRecipe,
    variant: str = "plain",
    may_be_empty: bool = False,
) -> PairLookup:
    """Find the latents of clips, and refuse to continue when any are missing.

    Clips whose hash is not remembered are read once for it, and looked at once for how they are shown.

    Args:
        store: store that `luve precompute` filled.
        hashes: hashes of the clips; `ClipHashes(store.root)` is precompute's.
        entries: the clips.
        recipe: which latents; must agree with precompute's configuration.
        variant: one of the recipe's variants.
        may_be_empty: whether all clips may be known as bad.

    Raises:
        StoreError: in one line, when clips lack latents without being known as bad.
        NoUsableClips: all are known as bad.
    """
    if variant not in recipe.variants:
        raise ValueError(f"variant {variant!r} is not among the recipe's, {list(recipe.variants)}")
    entries = list(entries)
    windows, short = plan_windows(entries, recipe)
    # A clip replaced since it failed is no longer in the list, and must have latents.
    listed = Quarantine(quarantine_path(store, recipe), max_bad_fraction=1, total=1).bad()
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
    if lacking or not (lookup.pairs or may_be_empty):
        first = next(((e.clip_id, reasons[e.path]) for e in entries if e.path in reasons), None)
        complaint = _complaint(store, recipe, variant, list(lacking), len(entries))
        if lacking or first is None:
            raise StoreError(f"{complaint}: run `luve precompute` with these values on this index")
        raise NoUsableClips(f"{complaint}; first {first[0]}: {first[1]}")
    if recipe.fps is None:
        lookup.uneven = [path.stem for path in hashes.uneven(dict.fromkeys(p.entry.path for p in lookup.pairs))]
    lookup.repeated = [clip.clip_id for clip in repeated_clips((pair.entry for pair in lookup.pairs), recipe)]
    lookup.dropped = [(entry.clip_id, reasons[entry.path]) for entry in entries if entry.path in reasons]
    return lookup


def quarantine_path(store: LatentStore, recipe: LatentRecipe) -> Path:
    """The file in which precompute names the clips that could not be encoded.

    One list per size and choice of frames: a clip too small or short for one recipe can do for another.
    """
    height, width = recipe.size
    at = "" if recipe.fps is None else f"-at-{recipe.fps:g}"
    name = f"{height}x{width}-{recipe.frames}-from-{recipe.start}-by-{recipe.stride}{at}.jsonl"
    return store.root / "quarantine" / name


def _find(
    store: LatentStore, hashes: ClipHashes, clip: ClipEntry, frames: tuple[int, int], recipe: LatentRecipe, variant: str
) -> PairEntry | None:
    try:
        digest = hashes.digest(clip.path, clip.matte)
    except OSError:
        return None
    high = recipe.key(digest, frames, HIGH_RESOLUTION, variant)
    low = {scale: recipe.key(digest, frames, scale, variant) for scale in recipe.scales}
    return PairEntry(clip, high, low) if all(map(store.has, (high, *low.values()))) else None


def _complaint(store: LatentStore, recipe: LatentRecipe, variant: str, lacking: Sequence[str], total: int) -> str:
    scales = ", ".join(f"{scale:g}" for scale in recipe.scales) or "none"
    many = (
        f"{len(lacking)} of {amount(total, 'clip has', 'clips have')} no"
        if lacking
        else f"none of {amount(total, 'clip')} has"
    )
    which = f" (first {lacking[0]})" if lacking else ""
    at = "" if recipe.fps is None else f", {recipe.fps:g} frames a second"
    of = "" if variant == "plain" else f"variant {variant}, "
    return (
        f"{many} latents in {store.root}{which} for {of}size {recipe.size[0]}x{recipe.size[1]}, "
        f"scales {scales}, {recipe.frames} frames from {recipe.start} (windows {recipe.windows}, stride "
        f"{recipe.stride}{at}), VAE {recipe.vae[:12]}"
    )
