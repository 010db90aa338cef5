"""Scoring clips: a process's share, reading their frames, and the rows of scores."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path

import numpy as np

from luve_lightning.data.clip_container import ClipError, Frames
from luve_lightning.data.clip_scores import ScoreRow, ScoresError, ScoreSettings, common_settings, read_rows, write_rows
from luve_lightning.data.clips import read_clip
from luve_lightning.data.hashes import ClipHashes, Stamp, stamp
from luve_lightning.data.quarantine import Quarantine
from luve_lightning.data.scorers import Scorer
from luve_lightning.data.video_index import ClipEntry
from luve_lightning.files import text_digest
from luve_lightning.locks import Busy, locked
from luve_lightning.machine import UnitTimes


@dataclass(frozen=True)
class Shard:
    """One of `count` processes that share the clips, `index` counted from 0."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard: expected i/n with 0 <= i < n, got {self}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def file_name(self) -> str:
        """The file of its part of the scores."""
        return f"part-{self.index:05d}-of-{self.count:05d}.parquet"


def parse_shard(text: str | None, environment: Mapping[str, str]) -> Shard:
    """The shard named by an option or torchrun's environment; everything when neither does.

    Args:
        text: "i/n", or None.
        environment: may hold RANK and WORLD_SIZE.

    Raises:
        ValueError: no such share, or both name one.
    """
    processes = int(environment.get("WORLD_SIZE", "1"))
    if text is None:
        return Shard(int(environment.get("RANK", "0")), processes) if processes > 1 else Shard()
    if processes > 1:
        raise ValueError(f"shard: torchrun's {processes} processes share the clips by themselves; leave out {text!r}")
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal()):
        raise ValueError(f"shard: expected i/n such as 0/4, got {text!r}")
    return Shard(int(first), int(second))


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a clip are scored.

    Attributes:
        count: number of frames, the middles of equal parts of the clip. A shorter clip gives all its frames.
        indices: these instead, counted from 0.
    """

    count: int = 4
    indices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"frames: expected at least 1, got {self.count}")
        if self.indices is not None and (not self.indices or min(self.indices) < 0):
            raise ValueError(f"indices: expected one or more frame numbers >= 0, got {list(self.indices)}")

    def __str__(self) -> str:
        if self.indices is None:
            return f"{self.count} frames equally spaced"
        return f"frames {', '.join(map(str, self.indices))}"

    def of(self, total_frames: int) -> tuple[int, ...]:
        """The frame numbers for a clip of this length."""
        if self.indices is not None:
            return self.indices
        return tuple(dict.fromkeys((2 * i + 1) * total_frames // (2 * self.count) for i in range(self.count)))


@dataclass(frozen=True)
class ClipJob:
    """A clip to score: its row so far, and the stamp of its file when it was hashed."""

    entry: ClipEntry
    row: ScoreRow
    seen: Stamp | None = None


@dataclass(frozen=True)
class ReadClip:
    """A clip on its way to the scorer; `reason` says why it has no frames."""

    job: ClipJob
    indices: tuple[int, ...] = ()
    frames: Frames | None = None
    reason: str | None = None


class FrameReader:
    """Reads the chosen frames of a clip; a bad clip is a result, not an exception."""

    def __init__(self, choice: FrameChoice) -> None:
        self.choice = choice

    def __call__(self, job: ClipJob) -> ReadClip:
        """The frames of a clip, or why there are none."""
        if job.row.error is not None:
            return ReadClip(job, reason=job.row.error)
        path, indices = job.entry.path, self.choice.of(job.entry.total_frames)
        try:
            frames = np.concatenate([read_clip(path, index, 1, matte=job.entry.matte) for index in indices])
            if stamp(path) != job.seen:
                return ReadClip(job, reason="changed while it was read")
        except ClipError as error:
            return ReadClip(job, reason=error.reason)
        except OSError as error:
            return ReadClip(job, reason=error.strerror or str(error))
        return ReadClip(job, indices, frames)


def read_ahead(read: FrameReader, jobs: Iterator[ClipJob], threads: int, batch_size: int) -> Iterator[ReadClip]:
    """Read clips in order, in threads, at most two batches ahead of the consumer."""
    if threads == 0:
        yield from map(read, jobs)
        return
    waiting: deque[Future[ReadClip]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for job in jobs:
            waiting.append(pool.submit(read, job))
            if len(waiting) >= 2 * batch_size:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass
class ScoreTotals:
    """The counts of a run: clips scored, clips scored earlier, and (clip_id, reason) of unreadable ones."""

    scored: int = 0
    there: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def score_clips(
    entries: Sequence[ClipEntry],
    scorer: Scorer,
    folder: Path,
    caption: str,
    choice: FrameChoice,
    shard: Shard,
    batch_size: int,
    num_workers: int,
    quarantine: Quarantine,
    advance: Callable[[int], None] = lambda clips: None,
    times: UnitTimes | None = None,
) -> ScoreTotals:
    """Score one shard's clips that have no score yet, and write each batch before the next is scored.

    Args:
        entries: the clips of all shards.
        scorer: rates frames against captions.
        folder: folder of the scores; runs with other shards may write to it at the same time.
        caption: column of the captions.
        choice: frames to score.
        shard: our share of the clips: every `shard.count`-th.
        batch_size: clips scored at once, the most that a kill can lose.
        num_workers: threads that decode ahead; 0 decodes between the batches.
        quarantine: names unreadable clips.
        advance: called with the number of clips finished since the last call.
        times: counts those that are scored.

    Raises:
        ScoresError: the folder holds scores of other settings, or another process is scoring this shard.
        TooManyBadClips: from `quarantine`.
    """
    settings = ScoreSettings(scorer.name, scorer.version, caption, str(choice))
    part, totals = folder / shard.file_name, ScoreTotals()
    with _alone(part, shard):
        there = _finished(folder, settings)
        rows = {row.clip_id: row for row in (read_rows(part) if part.exists() else [])}
        share = entries[shard.index :: shard.count]
        jobs = _jobs(share, settings, ClipHashes(folder), there, totals, advance)
        clips = read_ahead(FrameReader(choice), jobs, num_workers, batch_size)
        times = times or UnitTimes("clip")
        times.begin()
        while batch := list(islice(clips, batch_size)):
            scored = _score(scorer, batch)
            rows |= {row.clip_id: row for row in scored}
            write_rows(part, rows.values())
            totals.scored += sum(row.score is not None for row in scored)
            bad = [(item.job.entry, item.reason) for item in batch if item.reason is not None]
            totals.unreadable += [(entry.clip_id, reason) for entry, reason in bad]
            for entry, reason in bad:
                quarantine.add(ClipError(entry.path, reason))
            times.advance(len(batch))
            advance(len(batch))
    return totals


@contextmanager
def _alone(part: Path, shard: Shard) -> Iterator[None]:
    """Lock a shard; the kernel releases it however the process ends."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(part.with_name(f".{part.stem}.lock"), what=f"shard {shard}"))
        except Busy as busy:
            raise ScoresError(f"{part.parent}: another process is scoring shard {shard}: {busy.owner}") from None
        yield


def _finished(folder: Path, settings: ScoreSettings) -> set[tuple[str, str, str]]:
    """What has a score, in any part; unreadable clips are tried again."""
    rows = read_rows(folder)
    found = common_settings(folder, rows)
    if found not in (None, settings):
        raise ScoresError(f"{folder}: holds scores by {found}, not by {settings}; use another folder, or delete it")
    return {row.key for row in rows if row.score is not None}


def _jobs(
    entries: Iterable[ClipEntry],
    settings: ScoreSettings,
    hashes: ClipHashes,
    finished: set[tuple[str, str, str]],
    totals: ScoreTotals,
    advance: Callable[[int], None],
) -> Iterator[ClipJob]:
    """The clips without a score."""
    for entry in entries:
        caption, digest, seen, error = text_digest(entry.captions[settings.caption_column]), "", None, None
        try:
            seen = stamp(entry.path)
            digest = hashes.digest(entry.path, entry.matte)
        except OSError as problem:
            error = problem.strerror or str(problem)
        except ClipError as problem:
            error = problem.reason
        row = ScoreRow(entry.clip_id, digest, caption, settings, error=error)
        if row.key in finished:
            totals.there += 1
            advance(1)
        else:
            yield ClipJob(entry, row, seen)


def _score(scorer: Scorer, batch: Sequence[ReadClip]) -> list[ScoreRow]:
    """A row for each clip; clips of one size are scored together."""
    rows = [replace(item.job.row, error=item.reason) for item in batch if item.frames is None]
    readable = [item for item in batch if item.frames is not None]

    def size(item: ReadClip) -> tuple[int, ...]:
        return () if item.frames is None else item.frames.shape[1:]

    for _, group in groupby(sorted(readable, key=size), key=size):
        clips = list(group)
        column = clips[0].job.row.settings.caption_column
        captions = [item.job.entry.captions[column] for item in clips for _ in item.indices]
        scores = scorer.score(np.concatenate([item.frames for item in clips if item.frames is not None]), captions)
        if len(scores) != len(captions) or not all(map(math.isfinite, scores)):
            path = clips[0].job.entry.path
            raise ScoresError(f"{scorer.name} gave {scores} for {len(captions)} frames of {path}")
        given = iter(scores)
        for item in clips:
            own = tuple(float(next(given)) for _ in item.indices)
            mean = math.fsum(own) / len(own)
            rows.append(replace(item.job.row, frame_indices=item.indices, frame_scores=own, score=mean))
    return rows
