"""The scorers of clips (their interface, a local one, and HPS v3), and scoring a process's share of the clips."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import metadata
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luve_lightning.data.clip_container import ClipError, Frames
from luve_lightning.data.clip_scores import (
    FrameChoice,
    ScoreRow,
    ScoresError,
    ScoreSettings,
    Shard,
    common_settings,
    read_rows,
    write_rows,
)
from luve_lightning.data.clips import read_clip
from luve_lightning.data.hashes import ClipHashes, Stamp, stamp
from luve_lightning.data.quarantine import Quarantine
from luve_lightning.data.video_index import ClipEntry
from luve_lightning.files import hub_digest, text_digest
from luve_lightning.locks import Busy, locked
from luve_lightning.machine import UnitTimes


class Scorer(ABC):
    """Rates pictures, one number each; higher is better.

    Scores by different scorers, or by versions of one, are never mixed or compared. Constructing one is cheap: a
    model is loaded when the first picture is scored.
    """

    name: str
    """Which measure it is."""

    of_clips = False
    """Whether it rates the frames of one clip together, which must follow one another; each has the clip's number."""

    least = (1, 1)
    """The fewest frames of a clip that it can rate, and the least height and width."""

    @property
    @abstractmethod
    def version(self) -> str:
        """Everything besides pictures and captions that decides the scores, such as a digest of the weights."""

    @abstractmethod
    def score(self, frames: Frames, captions: Sequence[str]) -> list[float]:
        """Rate frames against captions.

        Args:
            frames: uint8 N x H x W x 3, red first.
            captions: N texts, one for each frame.

        Returns:
            N finite numbers.
        """


_MARGIN = 0.02  # luminance this near to black or white shows nothing: five of 256 levels


class SharpnessExposure(Scorer):
    """Sharpness times exposure, in [0, 1]. It ignores captions, and is no substitute for HPS v3.

    Sharpness is 1 - `skimage.measure.blur_effect` (Crete et al. 2007: how little a blur changes the frame);
    exposure is the share of pixels that are neither black nor white.
    """

    name = "sharpness-exposure"

    @property
    def version(self) -> str:
        """The version of the formula above; the photographs' library is pinned by minor version."""
        return "1"

    def score(self, frames: Frames, captions: Sequence[str]) -> list[float]:
        """N x H x W x 3 uint8 to N numbers in [0, 1]; frames are at least 2 pixels high and wide."""
        from skimage.color import rgb2gray

        return [_sharpness(gray) * _exposure(gray) for gray in map(rgb2gray, frames)]


def _sharpness(gray: NDArray[np.float64]) -> float:
    from skimage.measure import blur_effect

    if gray.std() < 1e-6:  # nothing to see; blur_effect would divide zero by zero
        return 0.0
    return float(np.clip(1 - blur_effect(gray), 0, 1))


def _exposure(gray: NDArray[np.float64]) -> float:
    return float(np.mean((gray > _MARGIN) & (gray < 1 - _MARGIN)))


class TakeQuality(Scorer):
    """How well a clip was taken, in [0, 1]: `take_quality`. Choose frames that follow one another, three or more.

    It ignores captions, and is no substitute for HPS v3.
    """

    name = "take-quality"
    of_clips, least = True, (3, 32)

    @property
    def version(self) -> str:
        """The version of the measures and their limits."""
        return "1"

    def score(self, frames: Frames, captions: Sequence[str]) -> list[float]:
        """N x H x W x 3 uint8 of one clip to its number, N times."""
        import torch

        from luve_lightning.functional.takes import take_quality

        return [take_quality(torch.from_numpy(frames))] * len(frames)


_REPOSITORY, _FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"  # where the package itself looks


class HPSv3Scorer(Scorer):
    """Human preference for a picture given its caption, by a vision-language model of 7 B parameters.

    Args:
        checkpoint: local file of the weights; default the published ones from the Hugging Face hub (17 GB, and the
            Qwen2-VL-7B that they are built on).
        device: device of the model. "cuda" under torchrun is the process's GPU.
        batch_size: pictures per forward pass.
    """

    name = "hpsv3"

    def __init__(self, checkpoint: Path | None = None, device: str = "cuda", batch_size: int = 8) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        try:
            self._package = metadata.version("hpsv3")
        except metadata.PackageNotFoundError:
            raise ValueError(
                "hpsv3 is not installed in this environment; run `make setup-hpsv3`, then use .venv-hpsv3/bin/luve"
            ) from None
        if checkpoint is not None and not checkpoint.is_file():
            raise FileNotFoundError(f"checkpoint: no such file: {checkpoint}")
        self.checkpoint, self.batch_size = checkpoint, batch_size
        self.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device

    @cached_property
    def _weights(self) -> Path:
        if self.checkpoint is not None:
            return self.checkpoint
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(_REPOSITORY, _FILE))
        except OSError as error:
            raise FileNotFoundError(
                f"checkpoint: {_FILE} of {_REPOSITORY} is not in the Hugging Face cache and cannot be downloaded "
                f"({type(error).__name__}); download it, or give a local file"
            ) from error

    @cached_property
    def version(self) -> str:
        """The package's version and the first digits of the weights' sha256."""
        return f"{self._package}, weights {hub_digest(self._weights)[:12]}"

    @cached_property
    def _model(self) -> Any:
        from hpsv3 import HPSv3RewardInferencer

        return HPSv3RewardInferencer(checkpoint_path=str(self._weights), device=self.device)

    def score(self, frames: Frames, captions: Sequence[str]) -> list[float]:
        """N x H x W x 3 uint8 and N captions to N scores; the paper's threshold is 6.5."""
        import torch
        from PIL import Image

        scores: list[float] = []
        for start in range(0, len(frames), self.batch_size):
            part = slice(start, start + self.batch_size)
            # The package takes pictures where it says paths, and keeps gradients unless told otherwise.
            pictures = [Image.fromarray(frame) for frame in frames[part]]
            with torch.inference_mode():
                rewards = self._model.reward(pictures, list(captions[part]))
            scores += rewards[:, 0].float().tolist()  # column 1 is the score's uncertainty
        return scores


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

    def __init__(self, choice: FrameChoice, least: tuple[int, int] = Scorer.least) -> None:
        self.choice, self.least = choice, least

    def __call__(self, job: ClipJob) -> ReadClip:
        """The frames of a clip, or why there are none."""
        if job.row.error is not None:
            return ReadClip(job, reason=job.row.error)
        path, indices = job.entry.path, self.choice.of(job.entry.total_frames)
        try:
            runs = np.split(np.array(indices), np.flatnonzero(np.diff(indices) != 1) + 1)
            frames = np.concatenate([read_clip(path, int(run[0]), len(run), matte=job.entry.matte) for run in runs])
            if stamp(path) != job.seen:
                return ReadClip(job, reason="changed while it was read")
        except ClipError as error:
            return ReadClip(job, reason=error.reason)
        except OSError as error:
            return ReadClip(job, reason=error.strerror or str(error))
        (count, side), (length, height, width, _) = self.least, frames.shape
        if length < count or min(height, width) < side:
            few = f"{length} frames of {width}x{height}, expected {count} or more of at least {side}x{side}"
            return ReadClip(job, reason=few)
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
        rows = {row.clip_id: row for row in (read_rows(part) if part.exists() else [])}
        there, share = _finished(folder, settings), entries[shard.index :: shard.count]
        jobs = _jobs(share, settings, ClipHashes(folder), there, totals, advance)
        clips = read_ahead(FrameReader(choice, scorer.least), jobs, num_workers, batch_size)
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
    """A row for each clip; clips of one size are scored together unless the scorer rates clips."""
    rows = [replace(item.job.row, error=item.reason) for item in batch if item.frames is None]
    readable = [item for item in batch if item.frames is not None]

    def size(item: ReadClip) -> tuple[int, ...]:
        return () if item.frames is None else item.frames.shape[1:]

    groups = [list(group) for _, group in groupby(sorted(readable, key=size), key=size)]
    for clips in [[item] for item in readable] if scorer.of_clips else groups:
        captions = [one.job.entry.captions[one.job.row.settings.caption_column] for one in clips for _ in one.indices]
        scores = scorer.score(np.concatenate([item.frames for item in clips if item.frames is not None]), captions)
        if len(scores) != len(captions) or not all(map(math.isfinite, scores)):
            raise ScoresError(f"{scorer.name} gave {scores} for {len(captions)} frames of {clips[0].job.entry.path}")
        given = iter(scores)
        for item in clips:
            own = tuple(float(next(given)) for _ in item.indices)
            mean = math.fsum(own) / len(own)
            rows.append(replace(item.job.row, frame_indices=item.indices, frame_scores=own, score=mean))
    return rows
