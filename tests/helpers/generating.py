"""`luve generate` on the tiny cascade, with few steps and small frames."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.run_luve import Outcome, run_luve

Luve = Callable[..., Outcome]
PROMPT = "a red boat sails slowly"
SIZES = {"height": 64, "width": 96, "motion_height": 32, "motion_width": 48, "num_frames": 5}


def generating(capsys: pytest.CaptureFixture[str], cascade: Path, output: Path, **own: Any) -> Luve:
    """Runs the verb with the words given; keyword arguments replace options, or remove them when None.

    Args:
        capsys: takes what is printed.
        cascade: folder with `wan/` and `vluer/`.
        output: default of the option.
        own: further options of every call.
    """

    def run(*words: object, **options: Any) -> Outcome:
        given: dict[str, Any] = {
            "backbone": cascade / "wan",
            "vluer": cascade / "vluer",
            "output": output,
            "steps": 3,
            "skip_steps": 1,
            "device": "cpu",
            **SIZES,
            **own,
            **options,
        }
        return run_luve(capsys, "generate", *words, *(f"--{k}={v}" for k, v in given.items() if v is not None))

    return run
