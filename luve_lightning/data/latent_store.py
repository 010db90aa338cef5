"""Latents of clips on disk: which are made from a clip, what each depends on, and their store."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luve_lightning.data.store import StoreError, TensorStore
from luve_lightning.files import text_digest
from luve_lightning.functional.frame_times import exact_rate, planned_samples, refusal
from luve_lightning.safetensors_window import DTYPE_NAMES, Range, SafetensorsWindow
from luve_lightning.terminal import amount

# Raise it when the same clip and the same VAE would give other latents: another decoder or colour conversion
# in data/clips.py (for clips that are converted, another `Presentation.label` is enough), another choice of
# frames in functional/frame_times.py, another crop or filter in functional/pixels.py, another posterior or
# normalisation in models/backbones. Every older entry is then simply not found.
ENCODER_VERSION = 1

_READ_AT_MOST = 100  # headers, to describe a store
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class LatentKey:
    """Everything that decides the numbers of one stored latent.

    Attributes:
        clip: `ClipHashes.digest` of the clip, 64 hex digits: the sha256 of its bytes, unless showing it takes
            more.
        vae: fingerprint of the VAE's configuration and weights.
        size: (height, width) of the encoded video, in pixels.
        frames: (start, stop) of the frames read from the clip, stop exclusive.
        variant: which pixels were encoded: "plain", or the name and parameters of a transform.
        stride: every stride-th frame of the range was read.
        resized_from: (height, width) of the pixels that `size` was downscaled from; default `size` itself.
            Downscaling in two steps gives other pixels than in one.
        dtype: dtype on disk: "float16", "bfloat16" or "float32".
        version: `ENCODER_VERSION` of the code that encoded it.
        fps: the clip was read as one of this many frames a second, which `frames` and `stride` count; None: as it is.
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
    fps: float | None = None

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.clip):
            raise ValueError(f"clip must be a sha256 in 64 hex digits, got {self.clip!r}")
        if not self.vae or not self.variant:
            raise ValueError(f"vae and variant must not be empty, got {self.vae!r} and {self.variant!r}")
        if self.resized_from is None:
            object.__setattr__(self, "resized_from", self.size)
        for name in ("size", "frames", "resized_from"):
            pair = getattr(self, name)
            # Exactly int: True or a numpy integer compares equal but writes other JSON.
            if len(pair) != 2 or any(type(n) is not int for n in pair):
                raise ValueError(f"{name} must be two integers, got {pair!r}")
            # Lists (from YAML) and tuples must not make two keys out of one.
            object.__setattr__(self, name, tuple(pair))
        if type(self.stride) is not int or min(*self.size, *(self.resized_from or ()), self.stride) < 1:
            raise ValueError(f"sizes and stride must be integers of at least 1, got {self}")
        if not 0 <= self.frames[0] < self.frames[1]:
            raise ValueError(f"frames must be (start, stop) with 0 <= start < stop, got {self.frames}")
        if self.dtype not in DTYPE_NAMES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPE_NAMES)}, got {self.dtype!r}")
        if self.fps is not None:
            exact_rate(self.fps)
            object.__setattr__(self, "fps", float(self.fps))  # 16 and 16.0 are equal but write other JSON

    @property
    def count(self) -> int:
        """Number of frames that were encoded."""
        return (self.frames[1] - self.frames[0] - 1) // self.stride + 1

    @cached_property
    def json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, ASCII. Two keys are equal exactly when their JSON is."""
        facts = asdict(self)
        if self.fps is None:
            del facts["fps"]  # entries made before there was such a thing
        return json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @cached_property
    def digest(self) -> str:
        """sha256 of `json`, 64 hex digits: the entry's address."""
        return text_digest(self.json)


class LatentStore(TensorStore[LatentKey]):
    """A folder of latents C x t x h x w; a window is read without the rest, and without its sha256."""

    entries, verb, damage = "latents", "precompute", "other latents than were stored"
    tensor, rank = "latents", 4

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
                is noticed only when the whole entry is read.
            ValueError: when the window is empty or outside the entry.
        """
        if (t, y, x) == (None, None, None):
            return self._whole(key)[0]
        with self._open(key) as file:
            return file.read(self.tensor, (None, t, y, x))

    def missing(self, key: LatentKey) -> str:
        """Names the key."""
        return f"{self.root} has no latents for {key.json}"

    def checked(self, key: LatentKey, tensor: Tensor) -> Tensor:
        """Floats C x t x h x w, all finite in `key.dtype`."""
        dtype = DTYPE_NAMES[key.dtype]
        if tensor.ndim != 4 or tensor.numel() == 0 or not tensor.is_floating_point():
            raise StoreError(f"latents must be floats C x t x h x w, got {tensor.dtype} {tuple(tensor.shape)}")
        latents = tensor.detach().to("cpu")
        stored = latents.to(dtype).contiguous()
        if not torch.isfinite(stored).all():
            if torch.isfinite(latents).all():
                limit, found = torch.finfo(dtype).max, latents.abs().max().item()
                raise StoreError(
                    f"latents reach {found:.4g}, {key.dtype} holds up to {limit:.4g}: store them as float32"
                )
            raise StoreError(f"latents of clip {key.clip} have values that are not finite")
        return stored


HIGH_RESOLUTION = 1.0
"""The scale of the high-resolution latents themselves."""


@dataclass(frozen=True)
class LatentRecipe:
    """The latents of a clip: a high-resolution one, and low-resolution ones downscaled from the same pixels.

    Attributes:
        vae: fingerprint of the VAE, `LatentSpace.fingerprint()`.
        size: (height, width) of the high-resolution pixels.
        scales: how many times smaller each low-resolution version is, > 1; empty for high resolution only.
        frames: frames read from the clip for one latent.
        start: first frame of the first window.
        windows: windows per clip, equally spaced from `start` to the end of the clip. A single window begins at
            `start`.
        stride: read every stride-th frame.
        fps: read clips as ones of this many frames a second, which `frames`, `start` and `stride` then count; None
            reads their frames as they are.
        variants: transforms of the high-resolution pixels, before all else; names of `LatentKey.variant`.
        dtype: dtype on disk.
    """

    vae: str
    size: tuple[int, int]
    scales: tuple[float, ...]
    frames: int
    start: int = 0
    windows: int = 1
    stride: int = 1
    variants: tuple[str, ...] = ("plain",)
    dtype: str = "float16"
    fps: float | None = None

    def __post_init__(self) -> None:
        # YAML gives lists and integers; equal recipes must be equal objects.
        object.__setattr__(self, "size", tuple(self.size))
        object.__setattr__(self, "scales", tuple(float(scale) for scale in self.scales))
        object.__setattr__(self, "variants", tuple(self.variants))
        if min(self.frames, self.windows, self.stride) < 1 or self.start < 0:
            raise ValueError(
                f"expected frames, windows, stride >= 1 and start >= 0, got {self.frames}, {self.windows}, "
                f"{self.stride} and {self.start}"
            )
        if self.fps is not None:
            exact_rate(self.fps)
        _refuse_odd_scales(self.scales)
        if not self.variants or len(set(self.variants)) != len(self.variants):
            raise ValueError(f"variants must be one or more different names, got {list(self.variants)}")
        if self.dtype not in DTYPE_NAMES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPE_NAMES)}, got {self.dtype!r}")

    @property
    def count(self) -> int:
        """Number of latents of one window: every scale of every variant."""
        return len(self.variants) * (1 + len(self.scales))

    @property
    def span(self) -> int:
        """Number of clip frames from the first to the last that a window reads, both included."""
        return (self.frames - 1) * self.stride + 1

    def clip_ranges(self, total_frames: int, clip_fps: float) -> tuple[list[tuple[int, int]], str]:
        """The windows of a clip, by its index, and why there are none; see `frame_ranges`.

        Args:
            total_frames: number of frames in the file.
            clip_fps: frames a second.
        """
        found = total_frames
        if self.fps is not None:
            if reason := refusal(total_frames, clip_fps, self.fps):
                return [], reason
            found = planned_samples(total_frames, clip_fps, self.fps)
        ranges = self.frame_ranges(found)
        return ranges, "" if ranges else self.too_short(found)

    def frame_ranges(self, total_frames: int) -> list[tuple[int, int]]:
        """The windows of a clip, (start, stop) with stop exclusive; none when the clip is too short.

        Args:
            total_frames: number of its frames, at `fps` where there is one.
        """
        last = total_frames - self.span
        if last < self.start:
            return []
        if self.windows == 1:
            return [(self.start, self.start + self.span)]
        step = Fraction(last - self.start, self.windows - 1)
        starts = dict.fromkeys(self.start + round(i * step) for i in range(self.windows))
        return [(start, start + self.span) for start in starts]

    def too_short(self, total_frames: int) -> str:
        """Why a clip of so many frames, at `fps` where there is one, has no window."""
        at = "" if self.fps is None else f" at {self.fps:g} frames a second"
        return f"{amount(total_frames, 'frame')}{at}, expected at least {self.start + self.span}"

    def pixel_size(self, scale: float) -> tuple[int, int]:
        """(height, width) of the pixels at a scale; `check_scales` ensures that they are integers."""
        exact = _exact(scale)
        return round(self.size[0] / exact), round(self.size[1] / exact)

    def key(
        self, clip: str, frames: tuple[int, int], scale: float = HIGH_RESOLUTION, variant: str = "plain"
    ) -> LatentKey:
        """The store's key of one latent.

        Args:
            clip: `ClipHashes.digest` of the clip.
            frames: one of `frame_ranges`.
            scale: one of `scales`, or HIGH_RESOLUTION.
            variant: one of `variants`.
        """
        return LatentKey(
            clip=clip,
            vae=self.vae,
            size=self.pixel_size(scale),
            frames=frames,
            variant=variant,
            stride=self.stride,
            resized_from=self.size,
            dtype=self.dtype,
            fps=self.fps,
        )

    def keys(self, clip: str, frames: tuple[int, int]) -> dict[tuple[str, float], LatentKey]:
        """All keys of one window of a clip, by (variant, scale), high resolution first."""
        return {
            (variant, scale): self.key(clip, frames, scale, variant)
            for variant in self.variants
            for scale in (HIGH_RESOLUTION, *self.scales)
        }


def _refuse_odd_scales(scales: Sequence[float]) -> None:
    if not all(1 < scale < math.inf for scale in scales) or len(set(scales)) != len(scales):
        raise ValueError(f"scales must be different numbers above 1, got {list(scales)}")


def _exact(scale: float) -> Fraction:
    """The fraction meant by a decimal such as 1.5 or 1.333333."""
    return Fraction(scale).limit_denominator(1000)


def check_scales(size: tuple[int, int], scales: Sequence[float], spatial_ratio: int) -> None:
    """Refuse a size that some scale does not divide into whole latents.

    Args:
        size: (height, width) of the high-resolution pixels.
        scales: as in `LatentRecipe`.
        spatial_ratio: pixels per latent along each axis, `LatentSpace.spatial_ratio`.

    Raises:
        ValueError: names the nearest sizes that all scales divide; or for a scale not above 1.
    """
    _refuse_odd_scales(scales)
    unit = spatial_ratio * math.lcm(1, *(_exact(scale).numerator for scale in scales))
    if all(n >= unit and n % unit == 0 for n in size):
        return
    choices = [sorted({max(unit, n // unit * unit), max(unit, -(-n // unit) * unit)}) for n in size]
    wrong = " and ".join(
        f"{name} {n} (nearest {' or '.join(map(str, near))})"
        for name, n, near in zip(("height", "width"), size, choices, strict=True)
        if n < unit or n % unit
    )
    listed = ", ".join(f"{scale:g}" for scale in scales) or "none"
    raise ValueError(
        f"size {size[0]}x{size[1]}: scales {listed} and a VAE of {spatial_ratio} pixels per latent need "
        f"multiples of {unit}, not {wrong}"
    )


def describe_store(folder: Path) -> tuple[str, dict[str, Any]]:
    """What a store holds, in a few words, and facts for people; of at most 100 entries the headers are read.

    Args:
        folder: of latents or embeddings, with at least one entry.

    Raises:
        ValueError: when an entry is no complete safetensors file with a key.
    """
    entries = list(folder.glob("[0-9a-f][0-9a-f]/*.safetensors"))
    total = sum(file.stat().st_size for file in entries)
    facts: dict[str, Any] = {"entries": f"{len(entries):,}, {total / 1e6:,.1f} MB"}
    seen = [describe_entry(file) for file in sorted(entries)[:_READ_AT_MOST]]
    if len(entries) > len(seen):
        facts["read"] = f"the first {len(seen)} headers"
    for key in dict.fromkeys(key for _, found in seen for key in found if key not in ("caption", "shape")):
        values = Counter(str(found[key]) for _, found in seen if key in found)
        shown = [f"{value} ({number})" if len(values) > 1 else value for value, number in values.most_common(5)]
        facts[key] = [*shown, f"and {len(values) - 5} more"] if len(values) > 5 else shown
    kinds = sorted({kind.removeprefix("stored ") for kind, _ in seen})
    return f"store of {' and '.join(kinds)}", facts


def describe_entry(path: Path) -> tuple[str, dict[str, Any]]:
    """What one file of a store is, in a few words, and its key for people.

    Raises:
        ValueError: when it is no complete safetensors file with a key.
    """
    with SafetensorsWindow(path) as file:
        (name,) = file.names
        shape, text = file.shape(name), file.metadata.get("key", "")
    try:
        key = json.loads(text)
        facts = {"shape": " x ".join(map(str, shape))} | {k: v for k, v in key.items() if k not in ("clip", "version")}
    except (ValueError, AttributeError):
        raise ValueError(f"{path}: its header has no key of an entry") from None
    for fact in ("size", "resized_from", "frames"):
        if isinstance(facts.get(fact), list):
            facts[fact] = (" to " if fact == "frames" else "x").join(map(str, facts[fact]))
    return f"stored {'embeddings' if name == 'embedding' else name}", facts
