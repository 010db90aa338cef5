"""Models of libraries' classes from a user's sizes, checked as the libraries do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import nn

from luve_lightning.machine import check_memory

Built = TypeVar("Built")
MOST = 65_536  # for anything counted: layers, heads, channels


def build(name: str, make: Callable[..., Built], sizes: Mapping[str, Any], **fixed: Any) -> Built:
    """The result of `make` for a user's sizes.

    Args:
        name: option that holds the sizes, for messages.
        make: class of a model or a configuration.
        sizes: arguments of `make`: integers must be in [1, 65536], others finite.
        fixed: further arguments of `make`, not the user's.

    Raises:
        ValueError: a size is out of range, unknown or inconsistent, or the model exceeds memory.
    """
    for key, value in sizes.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int) and not isinstance(number, bool) and not 1 <= number <= MOST:
                raise ValueError(f"{name}.{key}: expected 1 to {MOST}, got {number}")
            if isinstance(number, float) and not isfinite(number):
                raise ValueError(f"{name}.{key}: expected a finite number, got {number}")
    try:
        with torch.device("meta"):  # costs no memory; inconsistent sizes show already here
            draft = make(**sizes, **fixed)
    # Anything at all: libraries divide by sizes and unpack them unchecked.
    except Exception as error:
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from error
    if isinstance(draft, nn.Module):
        count = sum(parameter.numel() for parameter in draft.parameters())
        check_memory(f"{name}: its {count:.3g} float32 weights", 4 * count)
        return make(**sizes, **fixed)
    return draft
