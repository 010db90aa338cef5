"""Questions about videos for a multimodal judge, and its answers."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.video_files import read_video
from luve_lightning.evaluation.bootstrap import mean_interval
from luve_lightning.evaluation.tables import Row
from luve_lightning.evaluation.video_sets import VideoSets
from luve_lightning.files import naming, replacing, write_text
from luve_lightning.reporting.page import data_uri
from luve_lightning.terminal import amount

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
    """What the judge must not see.

    Attributes:
        entries: entries by question id.
        unreadable: reasons by "method/video", for videos without a question.
    """

    entries: dict[str, KeyEntry]
    unreadable: dict[str, str]


@dataclass(frozen=True)
class QuestionOptions:
    """How videos are shown.

    Attributes:
        frames: frames per video, equally spaced, including first and last; all of a shorter video.
        max_side: greatest length of a frame's longer side, to which it is reduced; None keeps frames unchanged.
            Reduced frames hide detail: each question names both sizes.
        embed: put the frames into the JSONL file (data URLs of PNG) instead of files beside it.
        blind: hide the method's name behind a random id and shuffle the questions.
        seed: seed of ids and order.
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
    sets: VideoSets, folder: Path, options: QuestionOptions, advance: Callable[[], None] = lambda: None
) -> Key:
    """Write `questions.jsonl`, its frames and `key.json`.

    A question is one line: "id", "question" (the text to send), "prompt", "frames" (paths relative to the file, or
    data URLs), "frame_indices", "frame_size" and "video_size" (height and width).

    Args:
        sets: videos with their prompts.
        folder: where to.
        options: how to show the videos.
        advance: called after each video.

    Raises:
        ValueError: a video has no prompt, none is readable, or the folder has the questions of other videos, whose
            answers would lose their key.
    """
    ids = assign_ids(sets, options.blind, options.seed)
    lacking = sorted({name for _, name in ids.values()} - sets.prompts.keys())
    if lacking:
        some = ", ".join(lacking[:3]) + ", ..." * (len(lacking) > 3)
        without = amount(len(lacking), "video has", "videos have")
        raise ValueError(f"prompts: {without} none, so their alignment cannot be judged: {some}")
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

    # Line by line, because embedded frames may not fit into memory.
    with replacing(folder / QUESTIONS) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines())
    hidden = {f"{e.method}/{e.video}": key for key, e in entries.items()}
    asked = {key: entry for key, entry in entries.items() if key not in {hidden[name] for name in unreadable}}
    if not asked:
        raise ValueError(f"none of the videos can be read: {next(iter(unreadable.values()))}")
    content = {"entries": {k: asdict(e) for k, e in asked.items()}, "unreadable": unreadable}
    write_text(folder / KEY, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return Key(asked, unreadable)


def read_key(folder: Path) -> Key:
    """The key that `write_questions` wrote.

    Raises:
        FileNotFoundError: when it does not exist.
        ValueError: when it is not such a file.
    """
    path = folder / KEY
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `luve judge --videos NAME=DIR` writes it with the questions")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = {key: KeyEntry(**entry) for key, entry in content["entries"].items()}
        return Key(entries, dict(content["unreadable"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path}: not a key that `luve judge` wrote") from None


def _question(key: str, entry: KeyEntry, frames: np.ndarray, folder: Path, options: QuestionOptions) -> dict[str, Any]:
    indices = np.unique(np.linspace(0, len(frames) - 1, options.frames).round().astype(int)).tolist()
    pictures = [_picture(frames[index], options.max_side) for index in indices]
    shown = []
    for number, (picture, _) in enumerate(pictures):
        if options.embed:
            shown.append(data_uri(picture, "image/png"))
            continue
        # An id with method and video becomes two folders: joined by a sign, different ones could be equal.
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
    """A frame as PNG, reduced when it is too large, with its height and width."""
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
    # Unreadable videos may have been repaired since.
    if not read_key(folder).entries.items() <= entries.items():
        raise ValueError(
            f"output: {folder} has the questions of other videos, prompts or seed; take another folder, or answers to "
            "them lose their key"
        )


VIDEO_COLUMNS = ("method", "video", *AXES, "reason")
MEAN_COLUMNS = ("method", "n", *(column for axis in AXES for column in (axis, f"{axis}_low", f"{axis}_high")))


@dataclass(frozen=True)
class JudgeAnswer:
    """The judge's answer about one video.

    Attributes:
        scores: scores from 1 to 10, by axis.
        reason: reason in the judge's words; empty when it gave none.
        line: line of the file, counted from 1.
    """

    scores: dict[str, int]
    reason: str
    line: int


@dataclass(frozen=True)
class JudgeAnswers:
    """The content of a file of answers.

    Attributes:
        valid: valid answers by question id.
        problems: what was not counted, and questions without an answer, one line each.
    """

    valid: dict[str, JudgeAnswer]
    problems: list[str]


def read_answers(path: Path, key: Key) -> JudgeAnswers:
    """Read answers: one JSON object per line with "id", the three axes (integers 1 to 10), optionally "reason".

    Nothing is guessed: what does not fit is not counted and is named with its line, and reading continues. Of
    several answers to one question the first valid one counts. Other keys and empty lines are ignored.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not text, or holds no valid answer.
    """
    if not path.is_file():
        raise FileNotFoundError(f"answers: {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"answers: {path}: not UTF-8 text: {error}") from None
    valid: dict[str, JudgeAnswer] = {}
    problems = []
    # Not splitlines, which also splits at separators that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            name, answer = _parse(line, number, key)
            if name in valid:
                raise ValueError(f"{name} was answered on line {valid[name].line} already")
        except ValueError as reason:
            problems.append(f"line {number}: {reason}")
        else:
            valid[name] = answer
    if not valid:
        first = f" ({problems[0]})" if problems else ""
        raise ValueError(f"answers: {path}: not one valid answer{first}")
    problems += [
        f"no answer for {name} ({entry.method}/{entry.video})"
        for name, entry in key.entries.items()
        if name not in valid
    ]
    problems += [f"not asked: {name}: {reason}" for name, reason in key.unreadable.items()]
    return JudgeAnswers(valid, problems)


def _parse(line: str, number: int, key: Key) -> tuple[str, JudgeAnswer]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {_short(content)}")
    name = content.get("id")
    if not isinstance(name, str) or name not in key.entries:
        raise ValueError(f"unknown id {_short(name)}" if "id" in content else "no id")
    scores = {}
    for axis in AXES:
        if axis not in content:
            raise ValueError(f"{name}: no {axis}")
        scores[axis] = _score(content[axis], f"{name}: {axis}")
    reason = content.get("reason")
    return name, JudgeAnswer(scores, reason if isinstance(reason, str) else "", number)


def _score(value: Any, where: str) -> int:
    """An integer in range; 7.0 is one, "7", true and 7.5 are not."""
    whole = (isinstance(value, float) and value.is_integer()) or type(value) is int
    if not whole or not LOWEST <= value <= HIGHEST:
        raise ValueError(f"{where}: expected a whole number from {LOWEST} to {HIGHEST}, got {_short(value)}")
    return int(value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def video_rows(answers: JudgeAnswers, key: Key) -> list[Row]:
    """One row per judged video, with the keys VIDEO_COLUMNS; by method, then by name."""
    rows: list[Row] = [
        {"method": (entry := key.entries[name]).method, "video": entry.video, **answer.scores, "reason": answer.reason}
        for name, answer in answers.valid.items()
    ]
    return sorted(rows, key=lambda row: (str(row["method"]), str(row["video"])))


def mean_rows(rows: Sequence[Row], seed: int, replicates: int = 1000) -> list[Row]:
    """Mean of each method and axis with its 95 % bootstrap interval over `video_rows`, by MEAN_COLUMNS."""
    table: list[Row] = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        cells: dict[str, Any] = {"method": method, "n": len(own)}
        for axis in AXES:
            values = mean_interval([float(row[axis]) for row in own], seed, replicates)
            cells |= dict(zip((axis, f"{axis}_low", f"{axis}_high"), values, strict=True))
        table.append(cells)
    return table
