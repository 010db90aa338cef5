"""Questions to a multimodal judge: how real, how detailed and how true to its prompt a video is, from 1 to 10.

LuVe (arXiv 2602.11564) lets a multimodal model rate realism, detail and alignment from 1 to 10; its wording is not
published, so QUESTION is ours. Nothing here calls a model: questions go to a JSONL file, whoever asks the judge writes
its answers to another (see `evaluation.judge_answers`). Methods are hidden behind random ids unless that is switched
off, and the key to them is kept apart from the questions.
"""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.video_files import read_video
from luve_lightning.evaluation.video_sets import VideoSets
from luve_lightning.files import naming, replacing, write_text

AXES = {
    "realism": "whether light, textures, shapes and motion are those of a real recording, without artefacts",
    "detail": "how rich and sharp fine structures are, without noise or invented patterns",
    "alignment": "how completely the video shows what the prompt says, and nothing against it",
}
"""What is rated, and what each word means."""

LOWEST, HIGHEST = 1, 10

QUESTION = (
    "You see {frames} frames of one video in order of time, equally spaced. It was generated from this prompt:\n"
    "{prompt}\n"
    "Rate the video on each axis with a whole number from {lowest} (worst) to {highest} (best):\n"
    "{axes}\n"
    "Answer with one JSON object only: "
    '{{"id": "{id}", "realism": N, "detail": N, "alignment": N, "reason": "one sentence"}}'
)

QUESTIONS, KEY, FRAMES = "questions.jsonl", "key.json", "frames"


@dataclass(frozen=True)
class KeyEntry:
    """What a question's id stands for."""

    method: str
    video: str
    prompt: str


@dataclass(frozen=True)
class Key:
    """What must not be seen by the judge.

    Attributes:
        entries: by question id.
        unreadable: reasons by "method/video": videos that no question is about.
    """

    entries: dict[str, KeyEntry]
    unreadable: dict[str, str]


@dataclass(frozen=True)
class QuestionOptions:
    """How videos are shown.

    Attributes:
        frames: of each video, equally spaced, first and last among them; all of a shorter video.
        max_side: frames are reduced so that their longer side has at most this many pixels; None keeps them as they
            are. Reduced frames hide detail: each question names both sizes.
        embed: put the frames into the JSONL file (data URLs of PNG) instead of files beside it.
        blind: hide the method's name behind a random id and shuffle the questions.
        seed: of ids and order.
    """

    frames: int = 8
    max_side: int | None = None
    embed: bool = False
    blind: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.frames < 1 or (self.max_side is not None and self.max_side < 1):
            raise ValueError(f"expected frames >= 1 and max_side >= 1, got {self.frames} and {self.max_side}")


def assign_ids(sets: VideoSets, blind: bool, seed: int) -> dict[str, tuple[str, str]]:
    """(method, video) of each question by its id, in the order of asking; the same for the same names and seed."""
    pairs = [(method, name) for method, files in sets.methods.items() for name in sorted(files)]
    if not blind:
        return {f"{method}/{name}": (method, name) for method, name in pairs}
    rng = random.Random(seed)
    rng.shuffle(pairs)
    ids: dict[str, tuple[str, str]] = {}
    while len(ids) < len(pairs):
        ids.setdefault(f"{rng.getrandbits(48):012x}", pairs[len(ids)])
    return ids


def write_questions(
    sets: VideoSets,
    folder: Path,
    options: QuestionOptions,
    advance: Callable[[], None] = lambda: None,
) -> Key:
    """Write `questions.jsonl`, its frames and `key.json`.

    A question is one line: "id", "question" (the text to send), "prompt", "frames" (paths relative to the file, or
    data URLs), "frame_indices", "frame_size" and "video_size" (height and width).

    Args:
        sets: videos with their prompts.
        folder: where to.
        options: how they are shown.
        advance: called after each video.

    Returns:
        What `key.json` holds.

    Raises:
        ValueError: a video has no prompt, none can be read, or the folder has the questions of other videos, whose
            answers would lose their key.
    """
    ids = assign_ids(sets, options.blind, options.seed)
    lacking = sorted({name for _, name in ids.values()} - sets.prompts.keys())
    if lacking:
        raise ValueError(
            f"prompts: {len(lacking)} videos have none, so their alignment cannot be judged: {_some(lacking)}"
        )
    entries = {key: KeyEntry(method, name, sets.prompts[name]) for key, (method, name) in ids.items()}
    _check_folder(folder, entries)
    unreadable: dict[str, str] = {}

    def lines() -> Iterator[str]:
        for key, entry in entries.items():
            try:
                frames, _ = read_video(sets.methods[entry.method][entry.video])
            except ClipError as error:
                unreadable[f"{entry.method}/{entry.video}"] = " ".join(str(error).split())
            else:
                yield json.dumps(_question(key, entry, frames, folder, options), ensure_ascii=False)
            advance()

    _write_lines(folder / QUESTIONS, lines())
    hidden = {f"{e.method}/{e.video}": key for key, e in entries.items()}
    asked = {key: entry for key, entry in entries.items() if key not in {hidden[name] for name in unreadable}}
    if not asked:
        raise ValueError(f"none of the videos can be read: {next(iter(unreadable.values()))}")
    content = {"entries": {k: asdict(e) for k, e in asked.items()}, "unreadable": unreadable}
    write_text(folder / KEY, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return Key(asked, unreadable)


def read_key(folder: Path) -> Key:
    """What `write_questions` kept apart.

    Raises:
        FileNotFoundError: when it is not there.
        ValueError: when it is no such file.
    """
    path = folder / KEY
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; `luve judge --videos NAME=DIR` writes it with the questions"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = {key: KeyEntry(**entry) for key, entry in content["entries"].items()}
        return Key(entries, dict(content["unreadable"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path}: not a key that `luve judge` wrote") from None


def _question(
    key: str, entry: KeyEntry, frames: np.ndarray, folder: Path, options: QuestionOptions
) -> dict[str, Any]:
    indices = np.unique(np.linspace(0, len(frames) - 1, options.frames).round().astype(int)).tolist()
    pictures = [_picture(frames[index], options.max_side) for index in indices]
    shown = []
    for number, (picture, _) in enumerate(pictures):
        if options.embed:
            shown.append("data:image/png;base64," + base64.b64encode(picture).decode())
            continue
        # An id that names method and video becomes two folders: joined by a sign, different ones could be the same.
        path = folder / FRAMES / (f"{key}/{number}.png" if "/" in key else f"{key}-{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path):
            path.write_bytes(picture)
        shown.append(path.relative_to(folder).as_posix())
    axes = "\n".join(f"- {name}: {meaning}" for name, meaning in AXES.items())
    return {
        "id": key,
        "question": QUESTION.format(
            frames=len(shown), prompt=entry.prompt, lowest=LOWEST, highest=HIGHEST, axes=axes, id=key
        ),
        "prompt": entry.prompt,
        "frames": shown,
        "frame_indices": indices,
        "frame_size": pictures[0][1],
        "video_size": list(frames.shape[1:3]),
    }


def _picture(frame: np.ndarray, max_side: int | None) -> tuple[bytes, list[int]]:
    """A frame as PNG, reduced when it is larger, and its height and width."""
    image = Image.fromarray(frame)
    if max_side is not None and max(image.size) > max_side:
        factor = max_side / max(image.size)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, format="png")
    return data.getvalue(), [image.height, image.width]


def _check_folder(folder: Path, entries: dict[str, KeyEntry]) -> None:
    if not (folder / KEY).is_file():
        return
    # Unreadable videos may have been mended since.
    if not read_key(folder).entries.items() <= entries.items():
        raise ValueError(
            f"output: {folder} has the questions of other videos, prompts or seed; take another folder, or answers to "
            "them lose their key"
        )


def _write_lines(path: Path, lines: Iterator[str]) -> None:
    """Line by line, for embedded frames may not fit into memory; the file is whole or not there."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)
