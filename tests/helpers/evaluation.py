"""Folders of small videos, and reading the tables made of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from luve_lightning.data.video_files import write_video

FRAMES, SIZE = 3, 32


def video(seed: int, noise: float = 0.0, frames: int = FRAMES) -> np.ndarray:
    """A texture of the seed that moves, with noise over it; frames x 32 x 32 x 3."""
    rng = np.random.default_rng(seed)
    texture = rng.integers(60, 200, (SIZE // 4, SIZE // 4 + frames, 3)).repeat(4, 0).repeat(4, 1)
    clean = np.stack([texture[:, t : t + SIZE] for t in range(frames)])
    return np.clip(clean + noise * rng.normal(size=clean.shape), 0, 255).round().astype(np.uint8)


def write_methods(folder: Path, count: int, noises: dict[str, float]) -> dict[str, Path]:
    """Folders of `count` lossless videos, `video-0` and so on, each method with its noise; with prompts beside."""
    for method, noise in noises.items():
        for seed in range(count):
            path = folder / method / f"video-{seed}.mp4"
            write_video(path, video(seed, noise), 8, lossless=True)
            path.with_suffix(".json").write_text(json.dumps({"prompt": f"texture {seed}"}))
    return {method: folder / method for method in noises}


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def read_json(path: Path) -> Any:
    """Strict JSON: no NaN."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
