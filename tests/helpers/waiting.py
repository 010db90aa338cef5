"""Waiting for what another process, thread or page does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_for(condition: Callable[[], Any], seconds: float = 150.0, every: float = 0.01) -> bool:
    """Whether a condition comes to hold in time; the usual time is a busy machine's."""
    until = time.monotonic() + seconds
    while not (holds := bool(condition())) and time.monotonic() < until:
        time.sleep(every)
    return holds
