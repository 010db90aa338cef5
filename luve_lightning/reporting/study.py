"""A study's design, its key, and the folder for raters.

The paper shows 60 videos to 20 raters in 2x2 grids of four methods and reports how often its own was preferred overall,
in details, in temporal quality and in following the text (LuVe, arXiv 2602.11564). How positions were drawn and whether
items were repeated is not known; both are choices here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.video_files import read_video, write_video
from luve_lightning.evaluation.video_sets import VideoSets
from luve_lightning.files import file_digest, write_text
from luve_lightning.reporting.page import render_document
from luve_lightning.terminal import amount

AXES = {
    "overall": "Which video do you like best overall?",
    "details": "Which has the richest and cleanest fine detail?",
    "temporal": "Which moves most naturally, without flicker or jumps?",
    "text": "Which follows the text best?",
}
"""What is asked of each grid. The names are the paper's, the words ours."""

POSITIONS = "ABCDEFGHI"
PAGE, VIDEOS = "index.html", "videos"
FORMAT = 1
_GAP = 4  # trials between an item and its repetition, where the study is long enough


@dataclass(frozen=True)
class Trial:
    """One grid of videos that a rater sees.

    Attributes:
        item: number of the item.
        order: numbers of the methods, position by position.
        first: number of the earlier trial with the same item; None unless it is a repetition.
    """

    item: int
    order: tuple[int, ...]
    first: int | None = None


def plan_rater(items: int, methods: int, repeats: int, rng: np.random.Generator) -> list[Trial]:
    """The trials of one rater.

    Every item comes once, in random order. Over these, each method is at each position equally often, to within
    one. Some items come again later, with every method at another position.

    Args:
        items: at least 1.
        methods: at least 2.
        repeats: number of items that come again; at most `items`.
        rng: draws everything.
    """
    sequence = rng.permutation(items).tolist()
    orders = dict(zip(sequence, _balanced_orders(items, methods, rng), strict=True))
    # Repeat items of the first half first: they leave room for others between.
    early = rng.permutation(sequence[: max(1, items // 2)]).tolist()
    late = rng.permutation(sequence[max(1, items // 2) :]).tolist()
    for item in (early + late)[:repeats]:
        earliest = min(sequence.index(item) + 1 + _GAP, len(sequence))
        sequence.insert(int(rng.integers(earliest, len(sequence) + 1)), item)
    trials: list[Trial] = []
    for item in sequence:
        before = next((number for number, trial in enumerate(trials) if trial.item == item), None)
        order = orders[item] if before is None else _moved(trials[before].order, rng)
        trials.append(Trial(item, order, before))
    return trials


def _balanced_orders(items: int, methods: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Blocks of random Latin squares: in each, every method is once at every position."""
    found: list[tuple[int, ...]] = []
    cyclic = (np.arange(methods)[:, None] + np.arange(methods)) % methods
    for _ in range(math.ceil(items / methods)):
        symbols = rng.permutation(methods)
        square = symbols[cyclic[rng.permutation(methods)][:, rng.permutation(methods)]]
        found += [tuple(int(method) for method in row) for row in square]
    return found[:items]


def _moved(order: Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
    """The same methods, each at another position."""
    while True:
        again = rng.permutation(order)
        if (again != np.asarray(order)).all():
            return tuple(int(method) for method in again)


@dataclass(frozen=True)
class StudyKey:
    """What turns answers into preferences.

    Attributes:
        study: random id, also part of the answers.
        methods: names of the methods.
        axes: names of the questions.
        items: name of each item (of its videos' files).
        files: random file name for each item and method.
        plans: trials of each rater; rater 1 is the first.
        seed: seed of everything drawn.
    """

    study: str
    methods: tuple[str, ...]
    axes: tuple[str, ...]
    items: tuple[str, ...]
    files: tuple[tuple[str, ...], ...]
    plans: tuple[tuple[Trial, ...], ...]
    seed: int


def write_key(key: StudyKey, path: Path) -> None:
    """Write a key as JSON, in words that a person can follow."""
    positions = [
        [
            {
                "item": key.items[trial.item],
                "methods": [key.methods[method] for method in trial.order],
                "files": [key.files[trial.item][method] for method in trial.order],
                **({} if trial.first is None else {"repeats_trial": trial.first + 1}),
            }
            for trial in plan
        ]
        for plan in key.plans
    ]
    content = {
        "what": "Key of a human study: which video is which method. Keep it from the raters.",
        "format": FORMAT,
        "study": key.study,
        "seed": key.seed,
        "methods": key.methods,
        "axes": key.axes,
        "items": key.items,
        "files": {
            item: dict(zip(key.methods, files, strict=True)) for item, files in zip(key.items, key.files, strict=True)
        },
        "raters": {str(number): plan for number, plan in enumerate(positions, 1)},
    }
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_key(path: Path) -> StudyKey:
    """Read a key.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"key: {path}: no such file; `luve study build` writes it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"key: {path}: not JSON: {error}") from None
    try:
        return _key(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"key: {path}: not a key of `luve study build`: {type(error).__name__} {error}") from None


def _key(content: dict[str, Any]) -> StudyKey:
    if content["format"] != FORMAT:
        raise ValueError(f"of format {content['format']}, expected {FORMAT}")
    methods, items = tuple(content["methods"]), tuple(content["items"])
    numbers = {method: number for number, method in enumerate(methods)}
    plans = []
    for rater in range(1, len(content["raters"]) + 1):
        trials = []
        for trial in content["raters"][str(rater)]:
            first = trial.get("repeats_trial")
            order = tuple(numbers[method] for method in trial["methods"])
            trials.append(Trial(items.index(trial["item"]), order, None if first is None else first - 1))
        plans.append(tuple(trials))
    files = tuple(tuple(content["files"][item][method] for method in methods) for item in items)
    axes, seed = tuple(content["axes"]), content["seed"]
    return StudyKey(content["study"], methods, axes, items, files, tuple(plans), seed)


@dataclass(frozen=True)
class StudyOptions:
    """How a study is set up.

    Attributes:
        raters: number of raters, at least 1; each has a plan of their own.
        repeats: share of the items shown twice, from 0 to 1.
        items: number of videos to show, drawn at random; None shows all.
        axes: questions to ask, from AXES.
        seed: seed of everything drawn.
        title: title of the page; must not name a method.
    """

    raters: int = 20
    repeats: float = 0.1
    items: int | None = None
    axes: tuple[str, ...] = tuple(AXES)
    seed: int = 0
    title: str = "Which video is best?"

    def __post_init__(self) -> None:
        if self.raters < 1:
            raise ValueError(f"raters: expected at least 1, got {self.raters}")
        if not 0 <= self.repeats <= 1:
            raise ValueError(f"repeats: expected a share of the items from 0 to 1, got {self.repeats}")
        if self.items is not None and self.items < 1:
            raise ValueError(f"items: expected at least 1, got {self.items}")
        if not self.axes or not set(self.axes) <= set(AXES) or len(set(self.axes)) < len(self.axes):
            raise ValueError(f"axes: expected some of {', '.join(AXES)}, got {', '.join(self.axes) or 'none'}")
        if self.seed < 0:
            raise ValueError(f"seed: expected a whole number >= 0, got {self.seed}")


@dataclass(frozen=True)
class BuiltStudy:
    """The key, videos left out because some method lacks them, and the number of videos encoded now."""

    key: StudyKey
    left_out: dict[str, str]
    written: int


def build_study(
    sets: VideoSets,
    folder: Path,
    key_file: Path,
    options: StudyOptions,
    begin: Callable[[int], None] = lambda total: None,
    advance: Callable[[], None] = lambda: None,
) -> BuiltStudy:
    """Write the videos under random names, the page, and the key.

    Videos are re-encoded alike (H.264, visually lossless), so that neither a file's name, its metadata nor its
    encoder reveals its method. An interrupted build continues with the missing videos.

    Args:
        sets: videos of each method, 2 to 9 of them, and prompts.
        folder: folder for raters; new, empty, or of the same study.
        key_file: file outside the folder.
        options: how.
        begin: called with the number of videos.
        advance: called after each.

    Raises:
        ValueError: a key inside the folder, a folder of something else, no video that every method has, a text for
            raters that names a method, or an unreadable video.
    """
    methods = tuple(sets.methods)
    if not 2 <= len(methods) <= len(POSITIONS):
        raise ValueError(f"videos: expected 2 to {len(POSITIONS)} methods, got {len(methods)}: {', '.join(methods)}")
    if key_file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"key: {key_file} is inside {folder}, which raters see; put it elsewhere")
    left_out = _not_everywhere(sets)
    names = [name for name in sorted(set().union(*sets.methods.values())) if name not in left_out]
    if not names:
        raise ValueError("videos: no file name is in the folder of every method")
    if options.items is not None and options.items > len(names):
        raise ValueError(f"items: {options.items}, but every method has only {amount(len(names), 'video')}")
    digests = {name: [file_digest(sets.methods[method][name]) for method in methods] for name in names}
    key = _draw(methods, names, digests, options)
    prompts = {item: sets.prompts.get(item, "") for item in key.items}
    lacking = [item for item in key.items if not prompts[item]]
    if lacking and "text" in options.axes:
        without = amount(len(lacking), "video has", "videos have")
        raise ValueError(f"prompts: {without} none ({lacking[0]}); give --prompts, or --axes without text")
    _check_texts(methods, [options.title, *prompts.values()])
    _check_folder(folder, key)
    begin(len(key.items) * len(methods))
    written = _write_videos(sets, key, folder / VIDEOS, advance)
    write_key(key, key_file)
    write_text(folder / PAGE, _page(key, prompts, options.title))  # last: a folder with a page is complete
    return BuiltStudy(key, left_out, written)


def _not_everywhere(sets: VideoSets) -> dict[str, str]:
    missing = sets.missing()
    lacking = {name: [m for m in missing if name in missing[m]] for name in sorted(set().union(*missing.values()))}
    return {name: f"not of {', '.join(who)}" for name, who in lacking.items()}


def _draw(
    methods: tuple[str, ...], names: list[str], digests: Mapping[str, list[str]], options: StudyOptions
) -> StudyKey:
    """Everything random, from the seed and from the videos' content."""
    drawn = (options.seed, options.raters, options.repeats, options.items, options.axes)
    recipe = [FORMAT, *drawn, methods, sorted(digests.items())]
    digest = hashlib.sha256(json.dumps(recipe).encode()).digest()
    rng = np.random.default_rng(list(digest))
    chosen = names
    if options.items is not None:
        chosen = [names[i] for i in sorted(rng.permutation(len(names))[: options.items])]
    # At least one, unless none are wanted: without any, nothing is known about a rater's attention.
    repeats = max(round(options.repeats * len(chosen)), int(options.repeats > 0))
    plans = tuple(tuple(plan_rater(len(chosen), len(methods), repeats, rng)) for _ in range(options.raters))
    files = tuple(tuple(rng.bytes(8).hex() + ".mp4" for _ in methods) for _ in chosen)
    return StudyKey(rng.bytes(6).hex(), methods, options.axes, tuple(chosen), files, plans, options.seed)


def _check_texts(methods: tuple[str, ...], texts: list[str]) -> None:
    for method in methods:
        word = re.compile(rf"(?<!\w){re.escape(method)}(?!\w)", re.IGNORECASE)
        told = next((text for text in texts if word.search(text)), None)
        if told is not None:
            raise ValueError(f"the method {method} is named in a text that raters see: {told!r}; rename the method")


def _check_folder(folder: Path, key: StudyKey) -> None:
    """Continue a folder of the same study; anything else in it would be shown, or give methods away."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {folder} is a file, expected a folder")
    known = {folder / VIDEOS / name for files in key.files for name in files} | {folder / PAGE}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path not in known)
    strange = [path for path in files if not path.name.endswith(".tmp")]
    if strange:
        raise ValueError(f"output: {folder} has files of something else ({strange[0].name}); give an empty folder")


def _write_videos(sets: VideoSets, key: StudyKey, folder: Path, advance: Callable[[], None]) -> int:
    jobs = [
        (folder / file, sets.methods[method][item])
        for item, files in zip(key.items, key.files, strict=True)
        for method, file in zip(key.methods, files, strict=True)
    ]
    written = 0
    for target, source in sorted(jobs):  # by random name: times of writing reveal nothing either
        if not target.is_file():
            _encode(source, target)
            written += 1
        advance()
    for unfinished in folder.glob(".*.tmp"):  # from a build that was killed
        unfinished.unlink()
    return written


def _encode(source: Path, target: Path) -> None:
    try:
        frames, fps = read_video(source)
    except ClipError as error:
        raise ValueError(f"videos: {error}") from error
    if fps <= 0:
        raise ValueError(f"videos: {source}: it does not say its frames per second")
    odd = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
    write_video(target, np.pad(frames, odd, mode="edge"), fps)


def _page(key: StudyKey, prompts: Mapping[str, str], title: str) -> str:
    """The page; its plans hold only numbers of files, sorted by their random names."""
    order = [[files.index(name) for name in sorted(files)] for files in key.files]
    study: dict[str, Any] = {
        "format": FORMAT,
        "study": key.study,
        "axes": list(key.axes),
        "items": [
            {"prompt": prompts[item], "files": sorted(files)} for item, files in zip(key.items, key.files, strict=True)
        ],
        "plans": [
            [[trial.item, [order[trial.item].index(method) for method in trial.order]] for trial in plan]
            for plan in key.plans
        ],
    }
    # "<" in a prompt must not end the element that holds the data.
    data = json.dumps(study, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    context = {
        "title": title,
        "raters": len(key.plans),
        "trials": len(key.plans[0]),
        "axes": {name: AXES[name] for name in key.axes},
        "positions": POSITIONS[: len(key.methods)],
        "columns": 3 if len(key.methods) in (3, 5, 6, 9) else 2,
        "data": data,
    }
    styles, scripts = ("base.css", "study.css"), ("study.js",)
    return render_document("study.html", styles, scripts, context, media="'self' file:")
