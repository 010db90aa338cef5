"""The mini world: real photographs filmed by a moving camera, as mp4 clips with UltraVideo's CSV."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import torch
from rich import progress

from luve_lightning.data.mini_world.paint import draw_scene, paint_take
from luve_lightning.data.mini_world.scene import (
    DIRECTIONS,
    PHOTOGRAPHS,
    RENDERER,
    SHAPES,
    SPEEDS,
    SPLITS,
    SPRITE_SIZES,
    ColoredSprite,
    Scene,
    Sprite,
    motion_per_frame,
    photograph_named,
    source_pixels,
)
from luve_lightning.data.mini_world.stage import SPRITES, STAGE_RENDERER, StagedScene, WorldKind, draw_stage
from luve_lightning.data.video_files import encode_h264
from luve_lightning.data.video_index import COLUMNS, PARTS
from luve_lightning.files import file_digest, remove_unfinished, text_digest, write_text
from luve_lightning.machine import check_video, cores, end_with_parent, keep_freed_memory

__all__ = ["OtherWorldError", "RenderReport", "render_mini_world", "vocabulary"]

# Constant rate factor: visually lossless for these small frames, and the default world stays near 30 MB.
CRF = 14

_ACTIONS = {
    "circles": "moves in a circle",
    "sways": "sways left and right",
    "grows": "grows",
    "shrinks": "shrinks",
    "waits": "stands still",
}
_LIGHTS = ("the light is dim .", "the light is bright .", "the light is natural .")
_SHOTS = ("a close shot .", "a medium shot .", "a wide shot .")
_MOODS = ("calm", "lively", "fast")
_STYLE = "a photograph in color ."
_GREY_STYLE = "a photograph in black and white ."


def captions(scene: Scene) -> dict[str, str]:
    """The text of each caption column; directions are the camera's, so the picture moves the other way."""
    shown, camera, brightness = photograph_named(scene.url), scene.camera, scene.grade.brightness
    background = f"a photograph of {shown.subject} ."
    works = {"pans": camera.pan, "zooms": camera.zoom, "turns": camera.turn}
    work = " and ".join(f"{does} {way}" for does, way in works.items() if way) or "stands still"
    movement = f"the camera {work} {camera.speed} ." if camera.speed else f"the camera {work} ."
    sprites = [_sprite(sprite) for sprite in scene.sprites] or ["nothing moves in front ."]
    summary = " ".join([background, movement, *sprites])
    shot = _SHOTS[(camera.window > 215) + (camera.window > 290)]
    light = _LIGHTS[0 if brightness < 0.93 else 1 if brightness > 1.07 else 2]
    style = _STYLE if shown.color else _GREY_STYLE
    moving = sum(sprite.action != "waits" for sprite in scene.sprites) + (camera.speed == "quickly")
    return {
        "Brief Description": f"{background} {movement}",
        "Detailed Description": f"{summary} {shot} {light} {style}",
        "Background": background,
        "Theme Description": shown.subject,
        "Style": style,
        "Shot Type": shot,
        "Camera Movement": movement,
        "Lighting": light,
        "Video Atmosphere": _MOODS[min(moving, 2)],
        "Summarized Description": summary,
    }


def vocabulary() -> tuple[str, ...]:
    """Returns every word that a caption of a varied world can hold, including the full stop, sorted."""
    phrases = [*(f"{p.subject} {p.texture}" for p in PHOTOGRAPHS), *DIRECTIONS, *SHAPES, *SPEEDS, *SPRITE_SIZES]
    phrases += [*_ACTIONS.values(), *_LIGHTS, *_SHOTS, *_MOODS, _STYLE, _GREY_STYLE]
    phrases += [
        "a photograph of .",
        "the camera stands still",
        "pans zooms in out and turns clockwise counterclockwise",
    ]
    phrases += ["moves and spins", "nothing moves in front"]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


def _sprite(sprite: Sprite) -> str:
    if isinstance(sprite, ColoredSprite):
        noun = f"{SPRITES[sprite.shape][0]} {sprite.shape}"
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun} is in front ."
    words = [sprite.size, photograph_named(sprite.texture).texture, sprite.shape]
    does = f"moves {sprite.direction}" if sprite.action == "moves" else _ACTIONS[sprite.action]
    spins = " and spins" if sprite.spin else ""
    noun = " ".join(word for word in words if word)
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun} {does}{spins} ."


def catalog_csv(scenes: Sequence[Scene]) -> str:
    """Returns the CSV of all clips.

    A photograph stands for a source video, and its clips follow one another in it (`start_frame` up to, not
    including, `end_frame`); so does a combination where there are some, and then columns of each clip's parts follow
    UltraVideo's, and one of its flaw where there are flawed takes. Scores, which know no flaws: `vtss_score` is
    photograph pixels per clip pixel (1 or more is sharp), `motion_score` is the background's motion in pixels per
    frame, `video_clip_score` is 1, since captions are exact.
    """
    text = io.StringIO()
    told = {part for scene in scenes if isinstance(scene, StagedScene) for part in scene.described}
    parts = [part for part in PARTS if part in told]
    writer = csv.DictWriter(text, (*COLUMNS, *parts), lineterminator="\n")
    writer.writeheader()
    shown: dict[str, int] = {}
    for scene in scenes:
        start = shown.get(scene.source, 0)
        shown[scene.source] = start + scene.frames
        writer.writerow(_row(scene, start))
    return text.getvalue()


def splits_json(scenes: Sequence[Scene]) -> str:
    """Returns the sources (`url`) of each split's clips."""
    splits = {split: sorted({scene.source for scene in scenes if scene.split == split}) for split in SPLITS}
    return json.dumps(splits, indent=2) + "\n"


def prompts_jsonl(scenes: Sequence[Scene], split: str) -> str:
    """Returns a prompt file of a split's captions, each under its clip's name."""
    lines = [
        {"name": scene.clip_id, "prompt": captions(scene)["Summarized Description"]}
        for scene in scenes
        if scene.split == split
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def _row(scene: Scene, start: int) -> dict[str, object]:
    stop = start + scene.frames
    return {
        "clip_id": scene.clip_id,
        "url": scene.source,
        "frame_width": scene.size,
        "frame_height": scene.size,
        "fps": scene.fps,
        "start_frame": start,
        "end_frame": stop,
        "total_frames": scene.frames,
        "start_time": round(start / scene.fps, 4),
        "end_time": round(stop / scene.fps, 4),
        "duration": round(scene.frames / scene.fps, 4),
        "vtss_score": round(source_pixels(scene), 4),
        "motion_score": round(motion_per_frame(scene), 4),
        "video_clip_score": 1.0,
        **captions(scene),
        **(scene.described if isinstance(scene, StagedScene) else {}),
    }


MANIFEST = "MANIFEST.json"
# Holds the arguments until the manifest does; a folder with it alone was interrupted and can be resumed.
UNFINISHED = "UNFINISHED.json"


class OtherWorldError(ValueError):
    """Raised for a folder with something other than the requested world."""


def _claim(output: Path, arguments: dict[str, float | str]) -> dict[str, str]:
    """Claims a folder for a world, or recognises the world in it.

    Returns:
        SHA-256 by file name from the manifest; empty when the world is not complete yet.

    Raises:
        OtherWorldError: The folder holds a world of other arguments, or something else.
    """
    if output.exists() and not output.is_dir():
        raise OtherWorldError(f"{output}: expected a folder, found a file")
    for name in (MANIFEST, UNFINISHED):
        record = _read_record(output / name)
        if record is not None:
            _check_same(output, record["arguments"], arguments)
            return dict(record.get("sha256", {}))
    if output.is_dir() and any(not path.name.startswith(".") for path in output.iterdir()):
        raise OtherWorldError(f"{output}: is not empty and holds no mini world; choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / UNFINISHED, json.dumps({"arguments": arguments}, indent=2) + "\n")
    return {}


def _matches(path: Path, expected: str | None) -> bool:
    return path.is_file() and file_digest(path) == expected


def _check_same(output: Path, held: dict[str, float | str], asked: dict[str, float | str]) -> None:
    # Manifests are as old as the first worlds, which had neither.
    held, asked = ({"kind": "varied", "flaws": 0.0, **arguments} for arguments in (held, asked))
    other = [f"{key}={held.get(key)} (asked {value})" for key, value in asked.items() if held.get(key) != value]
    if other:
        raise OtherWorldError(
            f"{output}: holds a mini world with {', '.join(other)}; choose another folder or remove this one"
        )


def _read_record(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OtherWorldError(f"{path}: is not JSON ({error}); remove the folder, render again") from error
    facts = record if isinstance(record, dict) else {}
    if not (isinstance(facts.get("arguments"), dict) and isinstance(facts.get("sha256", {}), dict)):
        raise OtherWorldError(f"{path}: is not a mini world's manifest; choose another folder")
    return facts


@dataclass(frozen=True)
class RenderReport:
    """The outcome of `render_mini_world`: ids of clips rendered now, and how many existed already."""

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
    kind: WorldKind = "varied",
    flaws: float = 0.0,
) -> RenderReport:
    """Renders the mini world into a folder; the same arguments give the same bytes.

    Writes `clips/<clip_id>.mp4`, `clips.csv` (UltraVideo's columns), `splits.json` and finally `MANIFEST.json`
    with the arguments and the SHA-256 of each file; with combinations, the captions of held-out clips as prompt files
    `prompts-val.jsonl` and `prompts-test.jsonl`, too. An interrupted world continues where it stopped; a complete
    one is checked against its manifest, and only missing or changed files are made again.

    Args:
        output: Folder to fill; created when missing.
        seed: Seed of everything random, >= 0.
        train: Number of training clips.
        val: Number of validation clips.
        test: Number of test clips. With combinations one or two of the three may be 0.
        frames: Length of a clip, 4k+1 as the VAE requires, at least 5.
        size: Side of the square frame in pixels, a multiple of 16.
        fps: Frames per second.
        processes: Worker processes, default one per CPU; the result does not depend on it.
        kind: "varied": cameras and sprites of all kinds, photographs held out whole. "combinations": held out are
            combinations of parts that training shows (`Combination`). "photographs": such clips, but photographs held
            out whole.
        flaws: Share of the training clips that are badly taken (`FLAWS`), from 0 to less than 1; 0 if varied.

    Returns:
        Which clips were rendered, and how many existed already.

    Raises:
        ValueError: An argument is out of its range.
        OtherWorldError: The folder holds a world of other arguments, or something else.
        FileNotFoundError: A photograph is not where it should be.
    """
    counts = {"train": train, "val": val, "test": test}
    form = {"frames": frames, "size": size, "fps": fps}
    _check_arguments({"seed": seed, **counts, **form}, processes, kind)
    arguments: dict[str, float | str] = {"seed": seed, **counts, **form, "renderer": RENDERER}
    if kind != "varied":
        arguments |= {"renderer": STAGE_RENDERER, "kind": kind} | ({"flaws": flaws} if flaws else {})
    elif flaws:
        raise ValueError("flaws: a varied world has none; choose --kind combinations or photographs")
    scenes = _draw(kind, seed, counts, frames, size, fps, flaws)
    hashes = _claim(output, arguments)
    folder = output / "clips"
    folder.mkdir(exist_ok=True)
    texts = {"clips.csv": catalog_csv(scenes), "splits.json": splits_json(scenes)}
    if kind != "varied":
        texts |= {f"prompts-{split}.jsonl": prompts_jsonl(scenes, split) for split in ("val", "test") if counts[split]}
    todo = [scene for scene in scenes if not _is_there(folder / f"{scene.clip_id}.mp4", hashes, frames)]
    stale = [name for name, text in texts.items() if not _matches(output / name, text_digest(text))]
    if todo or stale or not hashes:
        _render_all(todo, folder, processes or cores())
        for name, text in texts.items():
            write_text(output / name, text)
        remove_unfinished(folder)
        names = [*texts, *(f"clips/{scene.clip_id}.mp4" for scene in scenes)]
        record = {"arguments": arguments, "sha256": {name: file_digest(output / name) for name in names}}
        write_text(output / MANIFEST, json.dumps(record, indent=2) + "\n")
        (output / UNFINISHED).unlink(missing_ok=True)
    return RenderReport(tuple(scene.clip_id for scene in todo), len(scenes) - len(todo))


def _draw(
    kind: WorldKind, seed: int, counts: dict[str, int], frames: int, size: int, fps: int, flaws: float
) -> list[Scene]:
    if kind == "varied":
        return [draw_scene(seed, split, i, frames, size, fps) for split in SPLITS for i in range(counts[split])]
    drawn = {name: list(draw_stage(kind, seed, name, counts[name], frames, size, fps, flaws)) for name in SPLITS}
    shown = {part for scene in drawn["train"] for part in scene.parts}
    unseen = {part for split in ("val", "test") for scene in drawn[split] for part in scene.parts} - shown
    if kind == "combinations" and shown and unseen:
        raise ValueError(
            f"train: {counts['train']} is too few: validation and test also show {', '.join(sorted(unseen))}"
        )
    return [scene for split in SPLITS for scene in drawn[split]]


def _check_arguments(values: dict[str, int], processes: int | None, kind: WorldKind) -> None:
    if values["seed"] < 0:
        raise ValueError(f"seed: expected 0 or more, got {values['seed']}")
    for name in ("train", "val", "test", "fps"):
        least = int(kind == "varied" or name == "fps")
        if values[name] < least:
            raise ValueError(f"{name}: expected {least} or more, got {values[name]}")
    if not values["train"] + values["val"] + values["test"]:
        raise ValueError("train, val and test: expected a clip in one of them, got none")
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
        return _matches(path, hashes.get(f"clips/{path.name}"))
    # Not complete yet, so no hash is known; files are put in place whole, so counting frames is enough.
    return path.is_file() and _count_frames(path) == frames


def _count_frames(path: Path) -> int:
    try:
        with av.open(str(path)) as container:
            return sum(1 for _ in container.decode(video=0))
    except (av.FFmpegError, IndexError):
        return 0


def _render_all(scenes: Sequence[Scene], folder: Path, processes: int) -> None:
    shown, left = progress.MofNCompleteColumn(), progress.TimeRemainingColumn()
    elapsed = progress.TimeElapsedColumn()
    with progress.Progress("mini world", progress.BarColumn(), shown, elapsed, left) as bar:
        task = bar.add_task("clips", total=len(scenes))
        for _ in _rendered(scenes, folder, min(processes, len(scenes))):
            bar.advance(task)


def _rendered(scenes: Sequence[Scene], folder: Path, processes: int) -> Iterator[None]:
    if processes <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the workers: sums split over threads may round differently
        try:
            for scene in scenes:
                _render_one(scene, folder)
                yield
        finally:
            torch.set_num_threads(threads)
        return
    # Spawned, not forked: torch and libav hold threads and locks that a fork would copy in any state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_begin_process) as pool:
        futures = [pool.submit(_render_one, scene, folder) for scene in scenes]
        try:
            for future in as_completed(futures):
                future.result()
                yield
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_process() -> None:
    end_with_parent()
    keep_freed_memory()
    torch.set_num_threads(1)


def _render_one(scene: Scene, folder: Path) -> None:
    encode_h264(folder / f"{scene.clip_id}.mp4", paint_take(scene).numpy(), scene.fps, CRF)
