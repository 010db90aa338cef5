"""`luve bench`: what the models cost at real sizes, with random weights; its subjects are modules."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch

from luve_lightning.cli import Verb
from luve_lightning.machine import choose_device

VERBS = {
    "bench": Verb(
        "Measurement",
        "time the models and measure their memory",
        subjects="luve_lightning.analysis.benchmarks",
    )
}


def bench(
    subject: str, device: str = "cuda", repeats: int | None = None, output: Path | None = None, **options: Any
) -> None:
    """Measures time and peak memory, and prints one JSON line per row.

    Args:
        subject: What to measure.
        device: where to run, such as "cuda" or "cuda:1"; with "cpu", small models.
        repeats: timed runs after the warm-up; default from 20 of what takes milliseconds to 1 of what takes minutes.
        output: also append the rows to this file.
        options: the subject's own options.
    """
    if repeats is not None and repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    if device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"luve bench --device {device}: no CUDA device is visible here")
    target = choose_device(device)
    measure = importlib.import_module(f"{VERBS['bench'].subjects}.{subject.replace('-', '_')}").measure
    repeats = repeats or inspect.signature(measure).parameters["repeats"].default
    facts = {"torch": torch.__version__, "repeats": repeats}
    if target.type == "cuda":
        facts = {"gpu": torch.cuda.get_device_name(target)} | facts
    for row in measure(target, repeats, **options):
        line = json.dumps(row | facts)
        print(line, flush=True)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("a") as file:
                file.write(line + "\n")
