"""The work of `luve precompute`: windows of clips, decoded unless all their latents are in the store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from luve_lightning.data.clip_hashes import ClipHashes
from luve_lightning.data.clips import ClipError, read_clip
from luve_lightning.data.fingerprints import stamp
from luve_lightning.data.latent_recipe import LatentRecipe
from luve_lightning.data.latent_store import LatentKey, LatentStore
from luve_lightning.data.store import StoreError
from luve_lightning.data.video_index import ClipEntry
from luve_lightning.functional.resize import crop_frames


class PixelTransform(nn.Module):
    """What a variant does to high-resolution pixels before they are downscaled and encoded.

    `forward` takes and returns B x C x T x H x W in [-1, 1].
    """

    def label(self) -> str:
        """Every parameter that decides the result, in words: part of the store's key. Empty for none."""
        raise NotImplementedError(f"{type(self).__name__} must say what its results depend on")

    def forward(self, video: Tensor) -> Tensor:
        """Transform a batch of videos."""
        raise NotImplementedError(f"{type(self).__name__} transforms nothing")


class Unchanged(PixelTransform):
    """The pixels as they are: the variant "plain"."""

    def label(self) -> str:
        """Nothing to say."""
        return ""

    def forward(self, video: Tensor) -> Tensor:
        """The same tensor."""
        return video


class InTurn(PixelTransform):
    """Several transforms, one after the other.

    Args:
        transforms: in their order, at least one.
    """

    def __init__(self, transforms: list[PixelTransform]) -> None:
        super().__init__()
        if not transforms:
            raise ValueError("transforms: expected at least one")
        self.transforms = nn.ModuleList(transforms)

    def label(self) -> str:
        """The labels in their order."""
        return ", then ".join(step.label() for step in self.transforms if step.label())  # type: ignore[operator]

    def forward(self, video: Tensor) -> Tensor:
        """B x C x T x H x W through each."""
        for step in self.transforms:
            video = step(video)
        return video


def variant_name(name: str, transform: PixelTransform) -> str:
    """`LatentKey.variant` of a named transform, such as "sharpened (radius 2, amount 0.5)"."""
    label = transform.label()
    return f"{name} ({label})" if label else name


@dataclass(frozen=True)
class ClipWindow:
    """A clip and the frames of one latent, (start, stop)."""

    clip: ClipEntry
    frames: tuple[int, int]


class EncodeItem:
    """A window on its way to the store.

    Not a dataclass: Lightning would look into it for tensors to convert (`precision: bf16-true`) and fails at the
    frozen ones inside.

    Attributes:
        window: what it is.
        missing: keys of the latents that the store lacks, by (variant, scale).
        frames: uint8 T x H x W x C, cropped to the aspect ratio wanted; None when nothing is missing or it
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


def plan_windows(
    entries: Iterable[ClipEntry], recipe: LatentRecipe
) -> tuple[list[ClipWindow], list[ClipError]]:
    """All windows of all clips by the index alone, and the clips that are too short for one."""
    windows: list[ClipWindow] = []
    short: list[ClipError] = []
    for entry in entries:
        ranges = recipe.frame_ranges(entry.total_frames)
        windows += [ClipWindow(entry, frames) for frames in ranges]
        if not ranges:
            short.append(ClipError(entry.path, recipe.too_short(entry.total_frames)))
    return windows, short


class WindowReader:
    """Decode a window if the store lacks latents of it.

    Args:
        recipe: which latents are wanted.
        store: where they go.
        hashes: of the clips.
    """

    def __init__(self, recipe: LatentRecipe, store: LatentStore, hashes: ClipHashes) -> None:
        self.recipe, self.store, self.hashes = recipe, store, hashes

    def __call__(self, window: ClipWindow) -> EncodeItem:
        """What is missing and, if anything is, the frames.

        A bad clip is an item with an error, not an exception: it must cross to another process.
        """
        try:
            return self._read(window)
        except ClipError as error:
            return EncodeItem(window, error=error.reason)
        except OSError as error:
            return EncodeItem(window, error=error.strerror or str(error))

    def _read(self, window: ClipWindow) -> EncodeItem:
        path = window.clip.path
        digest = self.hashes.digest(path)
        keys = self.recipe.keys(digest, window.frames)
        try:
            item = EncodeItem(window, {name: key for name, key in keys.items() if not self.store.has(key)})
        except OSError as error:  # the store's fault, not the clip's
            raise StoreError(f"{error.filename}: {error.strerror}") from None
        if item.missing:
            before = stamp(path)
            frames = read_clip(path, window.frames[0], self.recipe.frames, stride=self.recipe.stride)
            # The frames must be those of the bytes that were hashed.
            if stamp(path) != before or self.hashes.digest(path) != digest:
                raise ClipError(path, "changed while it was read")
            item.frames = self._crop(path, torch.from_numpy(frames))
        return item

    def _crop(self, path: Path, frames: Tensor) -> Tensor:
        try:
            # A copy, so that the rest of the decoded frames is freed and does not cross to another process.
            return crop_frames(frames, self.recipe.size).clone(memory_format=torch.contiguous_format)
        except ValueError as error:
            raise ClipError(path, str(error)) from None


class ClipsToEncode(Dataset[list[EncodeItem]]):
    """Batches of windows, decoded.

    Args:
        windows: what to encode, in order.
        batch_size: windows a batch.
        read: decodes a window.
        batches: length of the dataset; empty batches make up what the windows do not fill.
    """

    def __init__(
        self, windows: Sequence[ClipWindow], batch_size: int, read: WindowReader, batches: int
    ) -> None:
        self.windows, self.batch_size, self.read, self.batches = list(windows), batch_size, read, batches

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> list[EncodeItem]:
        if not 0 <= index < self.batches:
            raise IndexError(f"batch {index} of {self.batches}")
        start = index * self.batch_size
        return [self.read(window) for window in self.windows[start : start + self.batch_size]]


def pending_windows(windows: Sequence[ClipWindow], read: WindowReader) -> list[int]:
    """Positions of the windows that may lack latents. Reads no clip: one of unknown hash is pending."""
    pending = []
    for position, window in enumerate(windows):
        try:
            digest = read.hashes.known(window.clip.path)
        except OSError:
            digest = None
        if digest is None or not all(map(read.store.has, read.recipe.keys(digest, window.frames).values())):
            pending.append(position)
    return pending
