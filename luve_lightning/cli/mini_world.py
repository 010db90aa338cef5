"""`luve mini-world`: renders the mini world."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from luve_lightning.cli import Verb
from luve_lightning.data.mini_world import render_mini_world

VERBS = {"mini-world": Verb("Data", "render the mini world's clips and their CSV", goes_on=True)}


def mini_world(
    output: Path = Path("data/mini/world"),
    seed: int = 0,
    train: int = 200,
    val: int = 24,
    test: int = 24,
    frames: int = 33,
    size: int = 192,
    fps: int = 16,
    processes: int | None = None,
) -> None:
    """Renders the mini world: real photographs filmed by a moving camera, as clips with UltraVideo's CSV.

    A complete world is left alone, an interrupted one is completed. Whole photographs are held out for validation
    and test.

    Args:
        output: Folder to fill with clips/, clips.csv, splits.json and MANIFEST.json.
        seed: Seed of everything random; the same seed gives the same bytes.
        train: Number of training clips.
        val: Number of validation clips.
        test: Number of test clips.
        frames: Frames per clip, 4k+1 and at least 5.
        size: Side of the square frames in pixels, a multiple of 16.
        fps: Frames per second.
        processes: Worker processes; default one per CPU.
    """
    console = Console(emoji=False)
    started = time.perf_counter()
    report = render_mini_world(output, seed, train, val, test, frames, size, fps, processes)
    seconds = time.perf_counter() - started
    if report.rendered:
        kept = f" ({report.kept} were there already)" if report.kept else ""
        console.print(f"Rendered {len(report.rendered)} clips into {output} in {seconds:.0f} s{kept}.")
    else:
        console.print(f"{output} is complete: {report.kept} clips, nothing to render.")
