"""Small inputs of a report, as the real commands write them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from luve_lightning.ablations.results import COLUMNS
from luve_lightning.data.video_files import write_video
from luve_lightning.evaluation.tables import table_csv

WORLD = "mini world: a test's few numbers, not the paper's"


def write_results(folder: Path, world: str | None = WORLD) -> Path:
    """A table of three rows and two metrics, one of which the paper has too; a row's title has HTML in it."""
    rows = []
    for metric, paper in (("fd_patch", True), ("flicker", False)):
        for number, (row, theirs, direction) in enumerate(
            (("bare", 47.8, "same"), ("a<b>", 51.75, "none"), ("full", 41.03, ""))
        ):
            reference = row == "full"
            apart = 9.0 * (number - 2)
            values = [
                "experts", row, f"{row} & title", metric, "dB", "lower", 3, 10.5 + 9 * number, 10.0 + 9 * number,
                11.5 + 9 * number, theirs if paper else None, "FID_patch" if paper else None,
                apart, apart - 0.5 * (not reference), apart + 0.75 * (not reference), theirs - 41.03 if paper else None,
                direction if paper else "", 1.5 * (not reference),
            ]  # fmt: skip
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "experts.csv"
    path.write_text(table_csv(COLUMNS, rows))
    if world is not None:
        content = {"table": "experts", "world": world, "seeds": [0, 1, 2], "command": "luve ablate experts",
                   "revision": "f00d", "device": "a test", "title": "The experts", "notes": {"bare": "a note on bare"},
                   "missing": {"fid": "no network here"}, "failed": {"odd": {"1": "out of memory"}},
                   "settings": {"steps": 20}, "packages": {"torch": "2.12.1"}, "date": "2026-11-22",
                   "stages": [{"name": "lfe", "hash": "c0ffee" * 10, "seconds": 1.5, "row": "without_selection",
                               "seed": 0}]}  # fmt: skip
        path.with_suffix(".json").write_text(json.dumps(content))
    return path


def write_run(folder: Path, steps: int = 700) -> Path:
    """A run folder whose loss falls: resumed once, at step 500, after the first part had got to 520."""
    for version, (begin, end) in enumerate(((0, 521), (500, steps))):
        file = folder / "logs" / f"version_{version}" / "metrics.csv"
        file.parent.mkdir(parents=True)
        with file.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["epoch", "step", "train/loss", "val/psnr"])
            for step in range(begin, end):
                writer.writerow([0, step, version + 1 / (1 + step), ""])
            writer.writerow([0, end - 1, "", 20 + version])
    facts = {"verb": "fit", "command": "luve fit", "started": "2026-11-22", "device": "cpu",
             "git": {"revision": "beef", "dirty": False}, "packages": {"torch": "2.12.1"}}  # fmt: skip
    (folder / "provenance.json").write_text(json.dumps(facts))
    return folder


def write_spectra(folder: Path) -> Path:
    """A measurement of four steps and two bands."""
    folder.mkdir(parents=True)
    lines = ["step,sigma,timestep,band,resolved,power"]
    for step, sigma in enumerate((1.0, 0.9, 0.6, 0.1)):
        lines += [f"{step},{sigma},{1000 * sigma:.0f},{band},{step / 3:.3f},{4 - step}" for band in ("0-0.5", "0.5-1")]
    (folder / "spectra.csv").write_text("\n".join(lines) + "\n")
    settings = {"backbone": "data/mini/wan", "prompts": ["a", "b"], "height": 96, "steps": 4}
    (folder / "switch.json").write_text(json.dumps({"sigma": 0.75, "settings": settings}))
    return folder


def write_videos(folder: Path) -> tuple[Path, Path]:
    """A dark and a light video of 24 frames, the second four times the size of the first; the first lossless."""
    rng = np.random.default_rng(0)
    paths = []
    for name, base, size in (("dark", 30, 16), ("light", 200, 32)):
        frames = (base + rng.integers(0, 25, (24, size, size, 3))).astype(np.uint8)
        paths.append(folder / name / "clip.mp4")
        write_video(paths[-1], frames, 8, lossless=name == "dark")
        paths[-1].with_suffix(".json").write_text(json.dumps({"prompt": f"a {name} <room>"}))
    return paths[0], paths[1]
