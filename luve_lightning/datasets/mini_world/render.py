"""Rendering the whole mini world: clips, CSV, splits and, last of all, the manifest."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from luve_lightning.datasets.mini_world.catalog import catalog_csv, splits_json
from luve_lightning.datasets.mini_world.drawing import draw_scene
from luve_lightning.datasets.mini_world.encode import write_clip
from luve_lightning.datasets.mini_world.manifest import claim, matches, write_manifest
from luve_lightning.datasets.mini_world.paint import paint_scene
from luve_lightning.datasets.mini_world.photographs import SPLITS
from luve_lightning.datasets.mini_world.scene import RENDERER, Scene
from luve_lightning.files import text_digest, write_text
from luve_lightning.machine import check_video, cores


@dataclass(frozen=True)
class RenderReport:
    """What a call of `render_mini_world` did: ids of clips rendered now, and how many were there already."""

    rendered: tuple[str, ...]
    kept: int


def render_mini_world(
    output: Path,
    seed: int = 0,
    train: int = 200,
    val: int = 24,
    test: int = 24,
    frames: int = 33,
    size: int = 192,
    fps: int = 16,
    processes: int | None = None,
) -> RenderReport:
    """Renders the mini world into a folder; the same arguments give the same bytes.

    Writes `clips/<clip_id>.mp4`, `clips.csv` (UltraVideo's columns), `splits.json` and at the end
    `MANIFEST.json` with the arguments and the SHA-256 of each file. An interrupted world goes on where it
    stopped, a complete one is checked against its manifest, and only missing or changed files are made again.

    Args:
        output: Folder to fill; made when missing.
        seed: Seed of everything random, >= 0.
        train: Number of training clips.
        val: Number of validation clips.
        test: Number of test clips.
        frames: Length of a clip, 4k+1 as the VAE asks, at least 5.
        size: Side of the square frame in pixels, a multiple of 16.
        fps: Frames per second.
        processes: Worker processes, default one per CPU; the result does not depend on it.

    Returns:
        Which clips were rendered and how many were there already.

    Raises:
        ValueError: An argument is out of its range.
        OtherWorldError: The folder holds a world of other arguments, or something else.
        FileNotFoundError: A photograph is missing from scikit-image.
    """
    counts = {"train": train, "val": val, "test": test}
    form = {"frames": frames, "size": size, "fps": fps}
    _check_arguments({"seed": seed, **counts, **form}, processes)
    arguments = {"seed": seed, **counts, **form, "renderer": RENDERER}
    hashes = claim(output, arguments)
    folder = output / "clips"
    folder.mkdir(exist_ok=True)
    scenes = [draw_scene(seed, split, i, frames, size, fps) for split in SPLITS for i in range(counts[split])]
    texts = {"clips.csv": catalog_csv(scenes), "splits.json": splits_json(scenes)}
    todo = [scene for scene in scenes if not _is_there(folder / f"{scene.clip_id}.mp4", hashes, frames)]
    stale = [name for name, text in texts.items() if not matches(output / name, text_digest(text))]
    if todo or stale or not hashes:
        _render_all(todo, folder, processes or cores())
        for name, text in texts.items():
            write_text(output / name, text)
        _sweep(folder)
        write_manifest(output, arguments, [*texts, *(f"clips/{scene.clip_id}.mp4" for scene in scenes)])
    return RenderReport(tuple(scene.clip_id for scene in todo), len(scenes) - len(todo))


def _check_arguments(values: dict[str, int], processes: int | None) -> None:
    if values["seed"] < 0:
        raise ValueError(f"seed: expected 0 or more, got {values['seed']}")
    for name in ("train", "val", "test", "fps"):
        if values[name] < 1:
            raise ValueError(f"{name}: expected 1 or more, got {values[name]}")
    frames, size = values["frames"], values["size"]
    if frames < 5 or frames % 4 != 1:
        below = max(5, (frames - 1) // 4 * 4 + 1)
        raise ValueError(f"frames: expected 4k+1, at least 5 (such as {below} or {below + 4}), got {frames}")
    if size < 16 or size % 16:
        below = max(16, size // 16 * 16)
        raise ValueError(f"size: expected a multiple of 16 (such as {below} or {below + 16}), got {size}")
    check_video(frames, size, size)
    if processes is not None and processes < 1:
        raise ValueError(f"processes: expected 1 or more, got {processes}")


def _is_there(path: Path, hashes: dict[str, str], frames: int) -> bool:
    if hashes:
        return matches(path, hashes.get(f"clips/{path.name}"))
    # Not complete yet, so no hash is known; files are put in place whole, so counting frames is enough.
    return path.is_file() and _count_frames(path) == frames


def _count_frames(path: Path) -> int:
    try:
        with av.open(str(path)) as container:
            return sum(1 for _ in container.decode(video=0))
    except (av.FFmpegError, IndexError):
        return 0


def _render_all(scenes: Sequence[Scene], folder: Path, processes: int) -> None:
    columns = (
        TextColumn("mini world"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("clips", total=len(scenes))
        for _ in _rendered(scenes, folder, min(processes, len(scenes))):
            bar.advance(task)


def _rendered(scenes: Sequence[Scene], folder: Path, processes: int) -> Iterator[None]:
    if processes <= 1:
        with _one_thread():
            for scene in scenes:
                _render_one(scene, folder)
                yield
        return
    # Spawned, not forked: torch and libav hold threads and locks that a fork would copy in any state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(_render_one, scene, folder) for scene in scenes]
        try:
            for future in as_completed(futures):
                future.result()
                yield
        finally:
            pool.shutdown(cancel_futures=True)


def _render_one(scene: Scene, folder: Path) -> None:
    write_clip(folder / f"{scene.clip_id}.mp4", paint_scene(scene).numpy(), scene.fps)


@contextmanager
def _one_thread() -> Iterator[None]:
    # As in the workers: sums split over threads may round differently.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _sweep(folder: Path) -> None:
    # Left by a run that was killed; a file written to within the last minute may be another run's.
    for path in folder.glob(".*.tmp"):
        if time.time() - path.stat().st_mtime > 60:
            path.unlink(missing_ok=True)
