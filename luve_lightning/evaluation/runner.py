"""Measures videos: each is decoded once for all metrics, and only if a result is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.hashes import ClipHashes, Stamp, stamp
from luve_lightning.data.video_files import read_video
from luve_lightning.evaluation.prepared_metrics import ReadyMetric, Skipped
from luve_lightning.evaluation.result_cache import ResultCache, Score, result_key
from luve_lightning.evaluation.video_sets import VideoSets, decode_ahead
from luve_lightning.metrics.base import Unavailable, VideoMetric

ORIGINALS = "reference"  # the reports' word for the originals; a method may have this name, too
_PACKAGES = ("luve-lightning", "torch", "torchvision", "torchmetrics", "numpy", "av", "clean-fid", "pyiqa", "timm")


@dataclass(frozen=True)
class Problem:
    """A result that is missing.

    Attributes:
        method: method of the video; None for an original.
        video: its name.
        reason: why; kept without the metric's name in front.
        metric: its metric, or several with commas between; None when the video is unreadable.
    """

    method: str | None
    video: str
    reason: str
    metric: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", self.reason.removeprefix(f"{self.metric}: "))


@dataclass
class Measurements:
    """The results for every video.

    Attributes:
        metrics: that ran.
        skipped: metrics that could not run.
        scores: scores by metric, method and video.
        features: keys into the cache by metric, method (None: the originals) and video.
        digests: SHA-256 of the files by method (None: the originals) and video.
        problems: what is missing, and why.
        versions: versions of the packages in use.
        decoded: number of videos that had to be decoded.
        there: number of videos with all results known.
    """

    metrics: list[ReadyMetric]
    skipped: list[Skipped]
    scores: dict[str, dict[str, dict[str, Score]]] = field(default_factory=dict)
    features: dict[str, dict[str | None, dict[str, str]]] = field(default_factory=dict)
    digests: dict[str | None, dict[str, str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    decoded: int = 0
    there: int = 0


@dataclass(frozen=True)
class _Job:
    """A video to decode, and the metrics that need it."""

    method: str | None
    video: str
    path: Path
    seen: Stamp
    todo: tuple[ReadyMetric, ...]


class Runner:
    """Measures the videos of an evaluation.

    Args:
        sets: the videos.
        metrics: prepared metrics.
        skipped: metrics that could not be prepared.
        cache: stored results.
        hashes: hashes of files.
        device: device of the frames.
        threads: decoding threads.
        limit: bytes of decoded frames at any time, except for a single larger video.
    """

    def __init__(
        self,
        sets: VideoSets,
        metrics: Sequence[ReadyMetric],
        skipped: Sequence[Skipped],
        cache: ResultCache,
        hashes: ClipHashes,
        device: torch.device,
        threads: int,
        limit: int,
    ) -> None:
        self.sets, self.cache, self.hashes, self.device = sets, cache, hashes, device
        self.threads, self.limit = threads, limit
        versions = {name: version for name in _PACKAGES if (version := _version(name))}
        self.found = Measurements(list(metrics), list(skipped), versions=versions)
        self._stamps: dict[tuple[str | None, str], Stamp] = {}
        self._motions: dict[tuple[str, str], str] = {}  # digests
        self._last_motion: tuple[tuple[str, str], Tensor] = ("", ""), torch.empty(0)

    def run(self, begin: Callable[[int], None], advance: Callable[[], None]) -> Measurements:
        """Measure everything that is not known yet.

        Args:
            begin: called with the number of videos to decode.
            advance: called for every finished one.
        """
        self._hash()
        jobs = [job for name in self.sets.names for job in self._jobs(name)]
        begin(len(jobs))
        original: Tensor | None = None
        original_of = ""
        keep = lambda job: job.method is None  # noqa: E731
        for item in decode_ahead(jobs, lambda j: j.path, lambda j: j.seen, keep, self.threads, self.limit):
            job = item.job
            frames = None if item.frames is None else torch.from_numpy(item.frames).to(self.device)
            if frames is None:
                self.found.problems.append(Problem(job.method, job.video, item.reason or ""))
            if job.method is None:
                original, original_of = frames, job.video
            if frames is not None:
                self._measure(job, frames, original if original_of == job.video else None)
            del item, frames  # the next one may need the room
            advance()
        self.found.decoded = len(jobs)
        self._complain_about_missing_originals()
        self._complain_about_missing_prompts()
        self._complain_about_missing_motions()
        return self.found

    def _hash(self) -> None:
        """Digests of all files; unreadable ones are problems."""
        everything: list[tuple[str | None, str, Path]] = []
        everything += [(None, name, path) for name, path in self.sets.originals.items()]
        everything += [(m, name, path) for m, files in self.sets.methods.items() for name, path in files.items()]

        def look(item: tuple[str | None, str, Path]) -> tuple[Stamp, str] | str:
            try:
                return stamp(item[2]), self.hashes.digest(item[2])
            except OSError as error:
                return error.strerror or str(error)
            except ClipError as error:
                return error.reason

        with ThreadPoolExecutor(self.threads) as pool:
            for (method, name, _), seen in zip(everything, pool.map(look, everything), strict=True):
                if isinstance(seen, str):
                    self.found.problems.append(Problem(method, name, seen))
                else:
                    self._stamps[method, name], digest = seen
                    self.found.digests.setdefault(method, {})[name] = digest
            if any(metric.with_motion for metric in self.found.metrics):
                motions = [(m, name, path) for m, files in self.sets.motions.items() for name, path in files.items()]
                for (method, name, _), seen in zip(motions, pool.map(look, motions), strict=True):
                    if isinstance(seen, str):
                        self._problem_with_motion(method, name, seen)
                    else:
                        self._motions[method, name] = seen[1]

    def _jobs(self, name: str) -> Iterator[_Job]:
        """The videos to decode for one name, the original first."""
        todo: dict[str | None, list[ReadyMetric]] = {}
        for method in (None, *self.sets.methods):
            if name in self.found.digests.get(method, {}):
                todo[method] = [m for m in self.found.metrics if not self._known(m, method, name)]
        compared = any(m.full_reference for method, wanted in todo.items() if method for m in wanted)
        for method, wanted in todo.items():
            if wanted or (method is None and compared):
                files = self.sets.originals if method is None else self.sets.methods[method]
                yield _Job(method, name, files[name], self._stamps[method, name], tuple(wanted))
            elif method is not None:
                self.found.there += 1

    def _key(self, metric: ReadyMetric, method: str | None, name: str) -> str | None:
        """The name of a result; None when there is nothing to measure."""
        video = self.found.digests[method][name]
        if metric.frechet is not None:
            wanted = method is not None or metric.needs_originals_features
            return result_key(metric.identity, video, None, metric.seed(name)) if wanted else None
        if method is None:
            return None
        original = self.found.digests.get(None, {}).get(name) if metric.full_reference else None
        if metric.full_reference and original is None:
            return None
        if metric.with_motion and (original := self._motions.get((method, name))) is None:
            return None
        prompt = self.sets.prompts.get(name) if metric.prompted else None
        if metric.prompted and prompt is None:
            return None
        return result_key(metric.identity, video, original, prompt)

    def _known(self, metric: ReadyMetric, method: str | None, name: str) -> bool:
        """Whether nothing needs measuring; adds known values to the results."""
        key = self._key(metric, method, name)
        if key is None:
            return True
        if metric.frechet is not None:
            known = self.cache.features(key) is not None
            if known:
                self.found.features.setdefault(metric.name, {}).setdefault(method, {})[name] = key
            return known
        score = self.cache.score(key)
        if score is not None:
            self._take(metric, method, name, score)
        return score is not None

    def _take(self, metric: ReadyMetric, method: str | None, name: str, score: Score) -> None:
        assert method is not None
        self.found.scores.setdefault(metric.name, {}).setdefault(method, {})[name] = score

    def _measure(self, job: _Job, frames: Tensor, original: Tensor | None) -> None:
        for metric in job.todo:
            if metric not in self.found.metrics:  # found unavailable meanwhile
                continue
            try:
                self._measure_one(metric, job, frames, original)
            except Unavailable as reason:
                self.found.metrics.remove(metric)
                self.found.skipped.append(Skipped(metric.name, " ".join(str(reason).split())))
            except (ValueError, torch.OutOfMemoryError) as error:
                reason_line = " ".join(str(error).split())[:300]
                self.found.problems.append(Problem(job.method, job.video, reason_line, metric.name))

    def _measure_one(self, metric: ReadyMetric, job: _Job, frames: Tensor, original: Tensor | None) -> None:
        key = self._key(metric, job.method, job.video)
        assert key is not None
        known = metric.torch_metric
        if isinstance(known, VideoMetric):
            if metric.full_reference and original is None:
                raise ValueError("its original cannot be read")
            beside = self._motion(job) if metric.with_motion else original
            value = known.score(frames, beside, self.sets.prompts.get(job.video))
            score = Score(value, known.weight(frames), self.found.versions)
            about = {"metric": metric.name, "video": str(job.path)}
            self.cache.put_score(key, score, about)
            self._take(metric, job.method, job.video, score)
        elif known is not None:
            self.cache.put_features(key, known.features(frames, job.video))
            self.found.features.setdefault(metric.name, {}).setdefault(job.method, {})[job.video] = key

    def _motion(self, job: _Job) -> Tensor:
        """The frames of a video's motion video: a fraction of its own, so they are decoded when they are needed."""
        assert job.method is not None
        if self._last_motion[0] != (job.method, job.video):
            try:
                frames = read_video(self.sets.motions[job.method][job.video])[0]
            except ClipError as error:
                raise ValueError(f"its motion video cannot be read: {error.reason or error}") from error
            self._last_motion = (job.method, job.video), torch.from_numpy(frames).to(self.device)
        return self._last_motion[1]

    def _problem_with_motion(self, method: str, name: str, reason: str) -> None:
        compared = ", ".join(metric.name for metric in self.found.metrics if metric.with_motion)
        self.found.problems.append(Problem(method, name, reason, compared))

    def _complain_about_missing_motions(self) -> None:
        for method, files in self.sets.methods.items() if any(m.with_motion for m in self.found.metrics) else ():
            for name in files:
                if name not in self.sets.motions.get(method, {}):
                    self._problem_with_motion(method, name, "no motion video")

    def _complain_about_missing_originals(self) -> None:
        compared = [metric.name for metric in self.found.metrics if metric.full_reference]
        for method, files in self.sets.methods.items() if compared else ():
            self.found.problems += [
                Problem(method, name, "no original of that name", ", ".join(compared))
                for name in files
                if name not in self.sets.originals
            ]

    def _complain_about_missing_prompts(self) -> None:
        prompted = [metric.name for metric in self.found.metrics if metric.prompted]
        for method, files in self.sets.methods.items() if prompted else ():
            self.found.problems += [
                Problem(method, name, "no prompt", ", ".join(prompted))
                for name in files
                if name not in self.sets.prompts
            ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
