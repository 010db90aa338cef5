"""`luve bench --subject evaluate`: evaluating 1080p videos beside only decoding them, or how distances rank faults."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.mini_world.paint import paint_scene
from luve_lightning.data.mini_world.scene import Scene
from luve_lightning.data.mini_world.stage import draw_stage
from luve_lightning.data.video_files import find_videos, read_video, write_video
from luve_lightning.datamodules.painted_scenes import recoloured
from luve_lightning.evaluation.prepared_metrics import prepare_metrics
from luve_lightning.evaluation.result_cache import ResultCache
from luve_lightning.evaluation.runner import Runner
from luve_lightning.evaluation.video_sets import find_video_sets
from luve_lightning.functional.patches import FrechetTarget, PatchPlan
from luve_lightning.functional.takes import blurred, flickering, frozen_from, noisy, shuffled
from luve_lightning.machine import decoding_threads
from luve_lightning.metrics import FrechetClipDistance, FrechetPatchDistance
from luve_lightning.metrics.feature_moments import FeatureExtractor, FeatureMoments, FeatureStatistics
from luve_lightning.metrics.frame_networks import RecogniserClips, RecogniserPatches, VAEFeatures
from luve_lightning.models.recogniser import FRAMES as SEEN
from luve_lightning.models.recogniser import SIDE

HEIGHT, WIDTH, FRAMES, FPS = 1080, 1920, 49, 24
DISTINCT = 4  # number of encoded videos; the others are copies with one more byte, so that each is decoded
LIMIT = 4 * 2**30
SEED = 500  # of the clips with faults; rendered worlds have others

FAULTS: dict[str, tuple[float, float, float]] = {
    "blur": (0.6, 1.2, 2.5),
    "noise": (4.0, 10.0, 25.0),
    "colours": (40.0, 70.0, 110.0),
    "frozen": (1 / 3, 2 / 3, 1.0),
    "tiles": (1.0, 2.0, 4.0),
    "shuffled": (2.0, 4.0, 9.0),
    "flicker": (0.04, 0.1, 0.25),
    "photograph": (1 / 3, 2 / 3, 1.0),
    "sprite": (1 / 3, 2 / 3, 1.0),
    "motion": (1 / 3, 2 / 3, 1.0),
}
"""Faults that a person sees, with a mild, a middle and a strong amount of each, see `faulty`."""
OF_SOME = ("photograph", "sprite", "motion")
"""Faults that a clip has or has not; their amount is the share of clips."""
Seen = list[Tensor]
"""A clip's features, by each metric."""


class ChannelMeans(FeatureExtractor):
    """A network that costs nothing: what remains is decoding, cutting patches and keeping results."""

    kind = "means"
    resolution = "its own size"
    name = "means"
    dim = 3

    def forward(self, patches: Tensor) -> Tensor:
        """uint8 N x 3 x S x S to the mean of each channel over some pixels."""
        return patches[:, :, ::16, ::16].flatten(2).float().mean(2)


def measure(
    device: torch.device,
    repeats: int = 2,
    videos: int = 100,
    faults: bool = False,
    references: int = 256,
    weights: str = "data/mini/recogniser/recogniser.safetensors",
    backbone: str = "data/mini/wan",
) -> Iterator[dict[str, Any]]:
    """Time `luve evaluate` with a network that costs nothing beside only decoding the videos.

    Evaluation hashes the files, decodes them, cuts the patches of `fd_patch` from 8 frames of each video and writes
    the features to disk, all with as many threads as the plain decoding.

    Args:
        device: where the stand-in for a network runs.
        repeats: repeats of both, in turn; the fastest of each counts, because other processes only slow them.
        videos: how many of 49 frames at 1080p, or clips of a set with faults.
        faults: measure clips of the mini world with known faults instead, see `rank_faults`.
        references: clips that those are compared with.
        weights: the recogniser's file.
        backbone: the one with the VAE.
    """
    if videos < 1:
        raise ValueError(f"videos: expected at least 1, got {videos}")
    if faults:
        plan = PatchPlan(size=64, frames=2)
        metrics = [
            FrechetPatchDistance(plan, VAEFeatures(backbone)),
            FrechetPatchDistance(plan, RecogniserPatches(weights)),
        ]
        yield from rank_faults(
            [*metrics, FrechetClipDistance(RecogniserClips(weights))], device, repeats, videos, references
        )
        return
    threads = decoding_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_videos(folder / "videos", videos)
        plain, evaluated = [], []
        for repeat in range(repeats):
            plain.append(_decode(folder / "videos", threads))
            evaluated.append(_evaluate(folder / "videos", folder / f"cache-{repeat}", device, threads))
    for what, seconds in (("decode", min(plain)), ("evaluate", min(evaluated))):
        row = {"subject": "evaluate", "what": what, "videos": videos, "size": [FRAMES, HEIGHT, WIDTH]}
        row |= {"threads": threads, "seconds": round(seconds, 2), "videos_per_second": round(videos / seconds, 3)}
        yield row | {"of_decode_speed": round(min(plain) / seconds, 3)}


def _write_videos(folder: Path, videos: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(min(DISTINCT, videos)):
        frames = np.stack([*drifting_texture(rng, FRAMES, HEIGHT, WIDTH)])
        write_video(folder / f"{number:04d}.mp4", frames, FPS)
    for number in range(DISTINCT, videos):
        # A box that players skip: the same frames in a file of other contents.
        box = b"\0\0\0\x0cfree" + number.to_bytes(4, "big")
        content = (folder / f"{number % DISTINCT:04d}.mp4").read_bytes()
        (folder / f"{number:04d}.mp4").write_bytes(content + box)


def drifting_texture(rng: np.random.Generator, frames: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Frames of a moving texture with detail at every size, so that their file is as large as a camera's.

    Yields:
        uint8 height x width x 3.
    """
    margin = 2 * frames
    picture = np.zeros((height + margin, width + margin, 3))
    for cell in (2, 6, 24, 96):
        shape = (-(-picture.shape[0] // cell), -(-picture.shape[1] // cell), 3)
        coarse = rng.normal(0, cell**0.5, shape).repeat(cell, 0).repeat(cell, 1)
        picture += coarse[: picture.shape[0], : picture.shape[1]]
    pixels = (128 + picture * 4).clip(0, 255).astype(np.uint8)
    for t in range(frames):
        yield pixels[t : t + height, 2 * t : 2 * t + width]


def _decode(folder: Path, threads: int) -> float:
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for size in pool.map(lambda path: read_video(path)[0].shape, find_videos(folder)):
            assert size == (FRAMES, HEIGHT, WIDTH, 3)
    return time.perf_counter() - started


def _evaluate(folder: Path, cache: Path, device: torch.device, threads: int) -> float:
    started = time.perf_counter()
    sets, hashes = find_video_sets({"bench": folder}), ClipHashes(cache)
    plan, features = PatchPlan(), torch.rand(16, ChannelMeans.dim)
    reference = FeatureStatistics(FeatureMoments.from_features(features), plan, ChannelMeans.name, "", "", 1)
    metric = FrechetPatchDistance(extractor=ChannelMeans(), patches=plan, reference=reference)
    metrics, skipped = prepare_metrics({"fd": metric}, device, False, hashes.files, cache)
    runner = Runner(sets, metrics, skipped, ResultCache(cache), hashes, device, threads, LIMIT)
    found = runner.run(lambda total: None, lambda: None)
    if found.problems:
        raise ValueError(f"the bench's own videos cannot be measured: {found.problems[0]}")
    return time.perf_counter() - started


def rank_faults(
    metrics: list[FrechetPatchDistance], device: torch.device, sets: int, videos: int, references: int
) -> Iterator[dict[str, Any]]:
    """Measure clips with known faults, and clips without, against references that show other clips.

    All show combinations that training holds out. A row is one distance and one fault: the distance of clips without
    it, of as many other clips without any, and of the mild, the middle and the strong amount. They are ranked as a
    person ranks them when the distances rise in this order.

    Args:
        metrics: the distances; those with a reference of their own keep it.
        device: of the networks.
        sets: sets of clips, each of other scenes.
        videos: clips of a set.
        references: clips to compare the others with.
    """
    for metric in metrics:
        metric.prepare(device)
    bare = any(metric.reference is None for metric in metrics)
    painted = [paint(scene) for scene in scenes(SEED, references)] if bare else []
    targets = [_target(metric, painted) for metric in metrics]

    def look(clips: Iterable[Tensor]) -> list[Seen]:
        return [[metric.features(clip) for metric in metrics] for clip in clips]

    def distances(clips: Iterable[Seen]) -> list[float]:
        each = [FeatureMoments.from_features(torch.cat(own)) for own in zip(*clips, strict=True)]
        return [target.distance(own.mean(), own.cov()) for target, own in zip(targets, each, strict=True)]

    for number in range(1, sets + 1):
        shown = [(scene, paint(scene)) for scene in scenes(SEED + number, videos)]
        seen = look(clip for _, clip in shown)
        without, others = distances(seen), distances(look(map(paint, scenes(SEED + sets + number, videos))))
        for fault in FAULTS:
            spoilt = [distances(clips) for clips in _look_at_fault(fault, shown, seen, look)]
            for metric, *found in zip(metrics, without, others, *spoilt, strict=True):
                values = dict(zip(("without", "others", "mild", "middle", "strong"), found, strict=True))
                row: dict[str, Any] = {"subject": "evaluate", "metric": metric.name, "set": number, "fault": fault}
                yield row | {name: float(f"{value:.4g}") for name, value in values.items()} | {"ranked": ranked(found)}


def _target(metric: FrechetPatchDistance, clips: list[Tensor]) -> FrechetTarget:
    """The metric's own reference, or these clips."""
    kept = metric.reference
    if isinstance(kept, FeatureStatistics):
        moments = kept.moments
    else:
        moments = FeatureMoments.from_features(torch.cat([metric.features(clip) for clip in clips]))
    return FrechetTarget.of(moments.mean(), moments.cov())


def _look_at_fault(
    fault: str, shown: list[tuple[Scene, Tensor]], seen: list[Seen], look: Callable[[Iterable[Tensor]], list[Seen]]
) -> Iterator[list[Seen]]:
    """What is seen of clips with each amount of a fault, of which `seen` is what is seen without."""
    if fault in OF_SOME:  # a clip is spoilt or not: painted and looked at once for all amounts
        worst = look(faulty(scene, clip, fault, 1.0) for scene, clip in shown)
        for share in FAULTS[fault]:
            each = zip(shown, seen, worst, strict=True)
            yield [bad if spoils(scene, share) else good for (scene, _), good, bad in each]
    else:
        for amount in FAULTS[fault]:
            yield look(faulty(scene, clip, fault, amount) for scene, clip in shown)


def ranked(found: list[float]) -> bool:
    """Whether distances rise from clips without the fault, of both sets, over mild and middle to strong."""
    return found[0] < found[2] and all(less < more for less, more in pairwise(found[1:]))


def scenes(seed: int, count: int) -> list[Scene]:
    """Scenes of held-out combinations, of every second frame of a world's clip."""
    return list(draw_stage("combinations", seed, "test", count, 2 * SEEN - 1, SIDE, 8))


def paint(scene: Scene) -> Tensor:
    """What the recogniser sees of the first 17 frames of a world's clip, uint8 9 x H x W x 3."""
    return paint_scene(scene, SEEN)


def spoils(scene: Scene, share: float) -> bool:
    """Whether a clip is among those that have a fault of `OF_SOME`: as many of the first clips as of all."""
    return int((scene.index + 1) * share + 1e-9) > int(scene.index * share + 1e-9)


def faulty(scene: Scene, frames: Tensor, fault: str, amount: float) -> Tensor:
    """A clip of combinations with one fault.

    blur: standard deviation of a Gaussian in pixels. noise: standard deviation of normal noise, of 255. colours:
    rotation of the hue in degrees. frozen: share of the clip that stands still at its end. tiles: the first quarter of
    the frame repeated, at 1 in the opposite quarter only, otherwise that many times down and across (of the first part
    as small). shuffled: frames change places in groups of so many. flicker: standard deviation of each frame's
    brightness, as a factor. photograph: share of clips whose photograph is one of those held out whole. sprite: share
    of clips without their sprite. motion: share of clips whose camera trembles instead.

    Args:
        scene: what was painted; also decides the randomness.
        frames: the first of `paint_scene(scene)`, uint8 T x H x W x 3.
        fault: a key of `FAULTS`.
        amount: how much.

    Raises:
        KeyError: there is no such fault.
    """
    rng = np.random.default_rng([scene.seed, scene.index])
    if fault not in OF_SOME:
        return _OF_FRAMES[fault](frames, amount, rng)
    if not spoils(scene, amount):
        return frames
    if fault == "sprite":
        return paint_scene(replace(scene, sprites=()), len(frames))
    if fault == "photograph":
        form = scene.frames, scene.size, scene.fps
        other = next(draw_stage("photographs", scene.seed + scene.index, "test", 1, *form))
        return paint_scene(replace(other, sprites=scene.sprites), len(frames))
    camera = replace(scene.camera, pan="", zoom="", turn="", distance=0.0, ratio=1.0, degrees=0.0)
    steps = rng.integers(-6, 7, size=(len(frames), 2))
    still = paint_scene(replace(scene, camera=camera), len(frames))
    return torch.stack([frame.roll((int(y), int(x)), (0, 1)) for frame, (y, x) in zip(still, steps, strict=True)])


_OF_FRAMES: dict[str, Callable[[Tensor, float, np.random.Generator], Tensor]] = {
    "blur": lambda frames, sigma, _: blurred(frames, sigma),
    "noise": noisy,
    "colours": lambda frames, degrees, _: recoloured(frames, degrees),
    "frozen": lambda frames, share, _: frozen_from(frames, share),
    "tiles": lambda frames, times, _: _tiled(frames, int(times)),
    "shuffled": lambda frames, group, rng: shuffled(frames, int(group), rng),
    "flicker": flickering,
}


def _tiled(frames: Tensor, times: int) -> Tensor:
    height, width = frames.shape[1:3]
    if times == 1:
        tiled = frames.clone()
        tiled[:, height - height // 2 :, width - width // 2 :] = frames[:, : height // 2, : width // 2]
        return tiled
    part = frames[:, : -(-height // times), : -(-width // times)]
    return part.repeat(1, times, times, 1)[:, :height, :width]
