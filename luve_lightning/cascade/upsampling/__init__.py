"""The cascade's second stage: how latents become those of a larger video.

Each file of this folder is a way to do it. It offers its methods by name in `METHODS`; that name is what `luve generate
--upsampling`, `luve upsample --baselines` and the comparison of upsamplers call it. There is no other list.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from luve_lightning.cascade.upsampling.base import (
    LatentUpsampler,
    LooseModels,
    UpsamplingMethod,
    UpsamplingModels,
)

__all__ = [
    "LatentUpsampler",
    "LooseModels",
    "UpsamplingMethod",
    "UpsamplingModels",
    "baselines",
    "upsampling_method",
    "upsampling_methods",
]


@cache
def upsampling_methods() -> dict[str, UpsamplingMethod]:
    """Every method by name."""
    found: dict[str, UpsamplingMethod] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{module.name}"), "METHODS", {})
    return found


def upsampling_method(name: str) -> UpsamplingMethod:
    """The method of that name.

    Raises:
        ValueError: there is none.
    """
    known = upsampling_methods()
    if name not in known:
        raise ValueError(f"upsampling: expected one of {', '.join(known)}, got {name!r}")
    return known[name]


def baselines() -> dict[str, UpsamplingMethod]:
    """The methods without a VLUer, each once under its first name, in the order of the tables."""
    found: dict[UpsamplingMethod, str] = {}
    for name, method in upsampling_methods().items():
        if method.model != "vluer":
            found.setdefault(method, name)
    return {name: method for method, name in found.items()}
