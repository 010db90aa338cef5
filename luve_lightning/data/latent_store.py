"""What a stored latent depends on, in full, and the address that follows from it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from luve_lightning.data.claimed_files import ClaimedFiles, StoreSize
from luve_lightning.data.safetensors_window import (
    DIGEST,
    DTYPES,
    Range,
    SafetensorsWindow,
    packed,
    tensor_digest,
)
from luve_lightning.files import text_digest

# Raise it when the same clip and the same VAE would give other latents: another decoder or colour conversion
# in data/clips.py (for clips that are converted, another `Presentation.label` is enough), another crop or
# filter in functional/resize.py, another posterior or normalisation in models/backbone.py. Every older entry is
# then simply not found.
ENCODER_VERSION = 1

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
"""Names of the dtypes an entry can have: "float16", "bfloat16", "float32"."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class LatentKey:
    """Everything that decides the numbers of one stored latent.

    Attributes:
        clip: `ClipHashes.digest` of the clip, 64 hex digits: the sha256 of its bytes, unless more is done to show it.
        vae: fingerprint of the VAE's configuration and weights.
        size: (height, width) of the encoded video, in pixels.
        frames: (start, stop) of the frames read from the clip, stop exclusive.
        variant: which pixels were encoded: "plain", or the name and parameters of a transform.
        stride: every stride-th frame of the range was read.
        resized_from: (height, width) of the pixels that `size` was downscaled from; `size` itself when left
            out. Downscaling a clip in two steps gives other pixels than in one.
        dtype: dtype on disk: "float16", "bfloat16" or "float32".
        version: `ENCODER_VERSION` of the code that encoded it.
    """

    clip: str
    vae: str
    size: tuple[int, int]
    frames: tuple[int, int]
    variant: str = "plain"
    stride: int = 1
    resized_from: tuple[int, int] | None = None
    dtype: str = "float16"
    version: int = ENCODER_VERSION

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.clip):
            raise ValueError(f"clip must be a sha256 in 64 hex digits, got {self.clip!r}")
        if not self.vae or not self.variant:
            raise ValueError(f"vae and variant must not be empty, got {self.vae!r} and {self.variant!r}")
        if self.resized_from is None:
            object.__setattr__(self, "resized_from", self.size)
        for name in ("size", "frames", "resized_from"):
            pair = getattr(self, name)
            # Exactly int: True or a numpy integer compares equal and writes other JSON.
            if len(pair) != 2 or any(type(n) is not int for n in pair):
                raise ValueError(f"{name} must be two integers, got {pair!r}")
            # Lists (from YAML) and tuples must not make two keys of one.
            object.__setattr__(self, name, tuple(pair))
        if type(self.stride) is not int or min(*self.size, *(self.resized_from or ()), self.stride) < 1:
            raise ValueError(f"sizes and stride must be integers of at least 1, got {self}")
        if not 0 <= self.frames[0] < self.frames[1]:
            raise ValueError(f"frames must be (start, stop) with 0 <= start < stop, got {self.frames}")
        if self.dtype not in DTYPE_NAMES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPE_NAMES)}, got {self.dtype!r}")

    @cached_property
    def json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, ASCII. Equal keys have equal JSON and nothing else has."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @cached_property
    def digest(self) -> str:
        """sha256 of `json`, 64 hex digits: the entry's address."""
        return text_digest(self.json)


__all__ = ["ENCODER_VERSION", "LatentKey", "LatentStore", "StoreError", "StoreSize"]

_NAME = "latents"
_SHOWN = 600  # characters of a strange key in a message


class StoreError(ValueError):
    """Latents that cannot be stored, or an entry that cannot be trusted. The message is one line."""


class LatentStore:
    """A folder of latents, safe to read and write from any number of processes.

    Args:
        root: the folder; made on the first write.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._files = ClaimedFiles(root)

    def path(self, key: LatentKey) -> Path:
        """Where the entry of `key` is, or would be."""
        return self._files.path(key.digest)

    def has(self, key: LatentKey) -> bool:
        """Whether there is an entry for `key`."""
        return self.path(key).exists()

    @contextmanager
    def claim(self, key: LatentKey, *, wait: bool = False) -> Iterator[bool]:
        """Ask to be the one that makes an entry; see `ClaimedFiles.claim`."""
        with self._files.claim(key.digest, wait=wait) as mine:
            yield mine

    def write(self, key: LatentKey, latents: Tensor) -> int:
        """Store latents, all at once, unless the entry is there already.

        Outside a `claim` of this store it claims the entry itself, waiting for whoever is making it.

        Args:
            key: the entry.
            latents: C x t x h x w, any float dtype and device; stored as `key.dtype`.

        Returns:
            Bytes written, 0 when the entry was there.

        Raises:
            StoreError: for another rank, an empty axis, a value that is not finite or does not fit the dtype.
        """
        data = packed(_NAME, _checked(key, latents), {"key": key.json})
        return self._files.write(key.digest, data)

    def shape(self, key: LatentKey) -> tuple[int, int, int, int]:
        """Shape of an entry, (C, t, h, w), from its header.

        Raises:
            StoreError: as for `read`.
        """
        with self._open(key) as file:
            channels, frames, height, width = file.shape(_NAME)
        return channels, frames, height, width

    def read(self, key: LatentKey, t: Range = None, y: Range = None, x: Range = None) -> Tensor:
        """Read an entry, or a window of it, without reading the rest.

        Args:
            key: the entry.
            t: latent frames (start, stop); all when None.
            y: latent rows (start, stop); all when None.
            x: latent columns (start, stop); all when None.

        Returns:
            C x t x h x w in the stored dtype.

        Raises:
            StoreError: when there is no entry, it is damaged, or it was made for another key. Damage to the values
                is noticed when the whole entry is read.
            ValueError: when the window is empty or outside the entry.
        """
        if (t, y, x) == (None, None, None):
            return self._whole(key)[0]
        with self._open(key) as file:
            return file.read(_NAME, (None, t, y, x))

    def check(self, key: LatentKey) -> bool:
        """Read an entry to see whether it is what was stored.

        Returns:
            True when it is; False when nothing tells, because the entry was made before there was a sha256.

        Raises:
            StoreError: as for `read`.
        """
        return self._whole(key)[1]

    def _whole(self, key: LatentKey) -> tuple[Tensor, bool]:
        """An entry, and whether its sha256 was compared."""
        with self._open(key) as file:
            try:
                latents = file.read(_NAME, (None, None, None, None))
            except ValueError as error:
                raise _damaged(str(error)) from None
            known = file.metadata.get(DIGEST)
        if known is not None and known != tensor_digest(latents):
            raise _damaged(f"{self.path(key)} holds other latents than were stored (sha256 differs)")
        return latents, known is not None

    def _open(self, key: LatentKey) -> SafetensorsWindow:
        path = self.path(key)
        try:
            file = SafetensorsWindow(path)
        except FileNotFoundError:
            raise StoreError(f"{self.root} has no latents for {key.json}") from None
        except ValueError as error:
            raise _damaged(str(error)) from None
        try:
            if file.metadata.get("key") != key.json:
                made_for = str(file.metadata.get("key"))[:_SHOWN]
                raise StoreError(f"{path} was made for {made_for}, expected {key.json}; delete it")
            file.shape_of_rank(_NAME, 4)
        except StoreError:
            file.close()
            raise
        except ValueError as error:
            file.close()
            raise _damaged(str(error)) from None
        return file

    def clean(self) -> int:
        """Remove what killed writers left behind; how many files that were."""
        return self._files.clean()

    def size(self) -> StoreSize:
        """Count entries, their bytes and unfinished files."""
        return self._files.size()


def _damaged(what: str) -> StoreError:
    return StoreError(f"damaged entry: {what}; delete it and run `luve precompute` again")


def _checked(key: LatentKey, latents: Tensor) -> Tensor:
    """The tensor to store, or StoreError."""
    dtype = DTYPE_NAMES[key.dtype]
    if latents.ndim != 4 or latents.numel() == 0 or not latents.is_floating_point():
        raise StoreError(f"latents must be floats C x t x h x w, got {latents.dtype} {tuple(latents.shape)}")
    latents = latents.detach().to("cpu")
    stored = latents.to(dtype).contiguous()
    if not torch.isfinite(stored).all():
        if torch.isfinite(latents).all():
            limit, found = torch.finfo(dtype).max, latents.abs().max().item()
            raise StoreError(
                f"latents reach {found:.4g}, {key.dtype} holds up to {limit:.4g}: store them as float32"
            )
        raise StoreError(f"latents of clip {key.clip} have values that are not finite")
    return stored
