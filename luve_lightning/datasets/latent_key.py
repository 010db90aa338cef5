"""What a stored latent depends on, in full, and the address that follows from it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property

from luve_lightning.datasets.safetensors_window import DTYPES
from luve_lightning.files import text_digest

# Raise it when the same clip and the same VAE would give other latents: another decoder or colour conversion
# in datasets/clips.py (for clips that are converted, another `Presentation.label` is enough), another crop or
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
