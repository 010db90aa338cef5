"""The generators that a test may draw from without saying so: Python's, numpy's and torch's."""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


def seed_all(words: str) -> None:
    """Start every generator from a seed that these words stand for.

    numpy and torch are seeded where they have been imported: a test without them shall not wait for them. Different
    words give unrelated numbers, so the noise of a test is never the weights of a fixture.
    """
    seed = zlib.crc32(words.encode())
    random.seed(seed)
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(seed)  # noqa: NPY002 - what libraries draw from
    if "torch" in sys.modules:
        import torch

        torch.default_generator.manual_seed(seed)  # torch.manual_seed() notes the stack for a GPU: 200 times as long
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)


@contextmanager
def seeded_apart(words: str) -> Iterator[None]:
    """Inside, the generators start from `words`; afterwards they go on from where they were."""
    go_on: list[partial[Any]] = [partial(random.setstate, random.getstate())]
    if "numpy" in sys.modules:
        import numpy as np

        go_on.append(partial(np.random.set_state, np.random.get_state()))  # noqa: NPY002
    if "torch" in sys.modules:
        import torch

        go_on.append(partial(torch.default_generator.set_state, torch.default_generator.get_state()))
    seed_all(words)
    try:
        yield
    finally:
        for restore in go_on:
            restore()
