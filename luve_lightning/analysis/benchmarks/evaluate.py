"""`luve bench --subject evaluate`: evaluating 1080p videos beside only decoding them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.video_files import find_videos, read_video, write_video
from luve_lightning.evaluation.prepared_metrics import prepare_metrics
from luve_lightning.evaluation.result_cache import ResultCache
from luve_lightning.evaluation.runner import Runner
from luve_lightning.evaluation.video_sets import find_video_sets
from luve_lightning.functional.patches import PatchPlan
from luve_lightning.machine import decoding_threads
from luve_lightning.metrics import FrechetPatchDistance
from luve_lightning.metrics.feature_moments import FeatureExtractor, FeatureMoments, FeatureStatistics

HEIGHT, WIDTH, FRAMES, FPS = 1080, 1920, 49, 24
DISTINCT = 4  # number of encoded videos; the others are copies with one more byte, so that each is decoded
LIMIT = 4 * 2**30


class ChannelMeans(FeatureExtractor):
    """A network that costs nothing: what remains is decoding, cutting patches and keeping results."""

    kind = "means"
    resolution = "its own size"
    name = "means"
    dim = 3

    def forward(self, patches: Tensor) -> Tensor:
        """uint8 N x 3 x S x S to the mean of each channel over some pixels."""
        return patches[:, :, ::16, ::16].flatten(2).float().mean(2)


def measure(device: torch.device, repeats: int = 2, videos: int = 100) -> Iterator[dict[str, Any]]:
    """Time `luve evaluate` with a network that costs nothing beside only decoding the videos.

    Evaluation hashes the files, decodes them, cuts the patches of `fd_patch` from 8 frames of each video and writes
    the features to disk, all with as many threads as the plain decoding.

    Args:
        device: where the stand-in for a network runs.
        repeats: repeats of both, in turn; the fastest of each counts, because other processes only slow them.
        videos: how many of 49 frames at 1080p.
    """
    if videos < 1:
        raise ValueError(f"videos: expected at least 1, got {videos}")
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
