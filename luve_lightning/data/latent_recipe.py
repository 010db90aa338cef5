"""Which latents are made of a clip: the description that `luve precompute` writes and training reads by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from luve_lightning.data.latent_store import DTYPE_NAMES, LatentKey

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
        windows: how many windows of each clip, equally spaced from `start` to the end of the clip. One window
            begins at `start`.
        stride: every stride-th frame is read.
        variants: what was done to the high-resolution pixels before all else; names of `LatentKey.variant`.
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

    def __post_init__(self) -> None:
        # YAML gives lists and whole numbers; equal recipes must be equal objects.
        object.__setattr__(self, "size", tuple(self.size))
        object.__setattr__(self, "scales", tuple(float(scale) for scale in self.scales))
        object.__setattr__(self, "variants", tuple(self.variants))
        if min(self.frames, self.windows, self.stride) < 1 or self.start < 0:
            raise ValueError(
                f"expected frames, windows, stride >= 1 and start >= 0, got {self.frames}, {self.windows}, "
                f"{self.stride} and {self.start}"
            )
        _refuse_odd_scales(self.scales)
        if not self.variants or len(set(self.variants)) != len(self.variants):
            raise ValueError(f"variants must be one or more different names, got {list(self.variants)}")
        if self.dtype not in DTYPE_NAMES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPE_NAMES)}, got {self.dtype!r}")

    @property
    def count(self) -> int:
        """Latents of one window: every scale of every variant."""
        return len(self.variants) * (1 + len(self.scales))

    @property
    def span(self) -> int:
        """Frames of a clip from the first to the last that a window reads, both counted."""
        return (self.frames - 1) * self.stride + 1

    def frame_ranges(self, total_frames: int) -> list[tuple[int, int]]:
        """The windows of a clip, (start, stop) with stop exclusive; none when the clip is too short."""
        last = total_frames - self.span
        if last < self.start:
            return []
        if self.windows == 1:
            return [(self.start, self.start + self.span)]
        step = Fraction(last - self.start, self.windows - 1)
        starts = dict.fromkeys(self.start + round(i * step) for i in range(self.windows))
        return [(start, start + self.span) for start in starts]

    def too_short(self, total_frames: int) -> str:
        """Why a clip has no window."""
        return f"{total_frames} frames, expected at least {self.start + self.span}"

    def pixel_size(self, scale: float) -> tuple[int, int]:
        """(height, width) of the pixels at a scale; `check_scales` makes sure that they are whole numbers."""
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
        spatial_ratio: pixels of a latent in each direction, `LatentSpace.spatial_ratio`.

    Raises:
        ValueError: naming the nearest sizes that all scales divide; or for a scale not above 1.
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
        f"size {size[0]}x{size[1]}: scales {listed} and a VAE of {spatial_ratio} pixels a latent need "
        f"multiples of {unit}, not {wrong}"
    )
