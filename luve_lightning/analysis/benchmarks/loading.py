"""`luve bench --subject loading`: what training waits for its latents, and what reading clips for precompute takes."""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from luve_lightning.analysis.benchmarks.evaluate import drifting_texture
from luve_lightning.data.clip_scan import scan
from luve_lightning.data.clip_windows import PairEntry, WindowReader, plan_windows
from luve_lightning.data.clips import load_decord, read_clip, require_hardware
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import HIGH_RESOLUTION, LatentRecipe, LatentStore
from luve_lightning.data.text_store import StoredEmbeddings, TextSource, TextStore
from luve_lightning.data.video_index import ClipEntry
from luve_lightning.datamodules.base import ResumableDataModule
from luve_lightning.datamodules.caption_latents import CaptionLatents
from luve_lightning.datamodules.clips import ClipsToEncode, EncodeDataModule
from luve_lightning.datamodules.latent_crops import CropRule, LatentPairCrops
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.pixels import fit_frames

CHANNELS, TEXT_DIM, PIXELS = 16, 4096, 8  # of Wan2.1: a latent's values, a token's, and a latent's side in pixels
FPS = 24
# Options of FFmpeg's encoders: as files of cameras have them, with several references and B-frames.
ENCODERS = {
    "h264": ("libx264", {"preset": "veryfast", "crf": "20"}),
    "hevc": ("libx265", {"preset": "superfast", "crf": "20", "x265-params": "log-level=none:pools=1:bframes=3"}),
}
GRAIN = 6  # levels of noise: without it an encoder finds every frame in the one before


def measure(
    device: torch.device,
    repeats: int = 2,
    workers: int = 2,
    steps: int = 20,
    step_seconds: float = 1.0,
    latents: Size3d = (13, 184, 320),
    pairs: Size3d = (13, 192, 336),
    samples: int = 8,
    tokens: int = 512,
    codecs: Sequence[str] = ("h264", "hevc"),
    heights: Sequence[int] = (1440, 2160),
    frames: int = 49,
    cores: int = 8,
    gpu_seconds: float = 4.25,
    hardware: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Time the loaders of training behind a step of a given length, and the reading of clips before encoding.

    Latents, embeddings and clips are made in a temporary folder and read from the page cache: a disk must bring
    `mib_per_batch` in one step. A step is a pause, as long as a GPU is busy. Reading clips is given in seconds of one
    core, which other programs on the machine hardly change.

    Args:
        device: where batches go.
        repeats: passes over each clip; the fastest counts, because other processes only slow them.
        workers: loader processes of training.
        steps: steps after the first batch.
        step_seconds: length of a step; at 2K those of the experts take 6.5 s on one H100.
        latents: frames, height and width of an expert's latents; those of 49 x 1472 x 2560 pixels.
        pairs: likewise the VLUer's high-resolution ones, multiples of 2; those of 49 x 1536 x 2688 pixels.
        samples: stored latents of each kind, read again and again.
        tokens: length of the captions' embeddings.
        codecs: how clips are coded, some of h264 and hevc.
        heights: heights of the clips in pixels, of shape 16:9.
        frames: frames of a clip and of a window.
        cores: cores that read for one GPU.
        gpu_seconds: seconds in which a GPU encodes a window, as `luve bench --subject precompute` measures them.
        hardware: also decode by it, such as cuda; the other rows decode in software.

    Returns:
        Rows of training with `waited_ms` a step and the `waiting` share of all time; rows of reading with
        `frames_per_core_second`; and for each kind of clip the seconds a window for `cores` beside the GPU's.
    """
    unknown = set(codecs) - ENCODERS.keys()
    if unknown or min(workers, cores) < 1 or min(steps, samples, frames) < 1:
        raise ValueError(
            f"expected codecs of {', '.join(ENCODERS)}, and workers, cores, steps, samples and frames of at least 1, "
            f"got {', '.join(codecs)}, {workers}, {cores}, {steps}, {samples} and {frames}"
        )
    if hardware is not None:
        require_hardware(hardware)
    with TemporaryDirectory() as name:
        for what, dataset in _datasets(Path(name), latents, pairs, samples, tokens):
            yield _training(what, dataset, device, workers, steps, step_seconds)
    for codec in codecs:
        for height in heights:
            with TemporaryDirectory() as name:
                clip = _write_clip(Path(name) / "clip.mp4", codec, height, frames)
                yield from _reading(clip, codec, repeats, cores, gpu_seconds, hardware)


def _datasets(
    folder: Path, latents: Size3d, pairs: Size3d, samples: int, tokens: int
) -> Iterator[tuple[str, Dataset[Any]]]:
    """The training datasets of the experts and of the VLUer over stored random values."""
    draw = torch.Generator().manual_seed(0)
    source = TextSource("0" * 64, tokens)
    texts, store = TextStore(folder / "texts"), LatentStore(folder / "latents")
    entries = [_entry(Path(f"{n:02d}.mp4"), 0, 0, 0, f"caption {n}") for n in range(samples)]
    for caption in ("", *(entry.captions["caption"] for entry in entries)):
        texts.write(source.key(caption), torch.randn(tokens, TEXT_DIM, generator=draw))

    def stored(recipe: LatentRecipe, size: Size3d) -> list[PairEntry]:
        found = []
        for number, entry in enumerate(entries):
            keys = recipe.keys(f"{number:064x}", (0, recipe.span))
            for (_, scale), key in keys.items():
                shape = (size[0], *(round(side / scale) for side in size[1:]))
                store.write(key, torch.randn(CHANNELS, *shape, generator=draw))
            low = {scale: keys["plain", scale] for scale in recipe.scales}
            found.append(PairEntry(entry, keys["plain", HIGH_RESOLUTION], low))
        return found

    whole = [(pair.entry, pair.hr_key) for pair in stored(_recipe(latents, ()), latents)]
    yield "experts", CaptionLatents(store, whole, ["caption"], 0.1, StoredEmbeddings(texts, source))
    crop = CropRule((min(11, pairs[0]), min(64, pairs[1] // 2), min(64, pairs[2] // 2)), "low", "random")
    yield "vluer", LatentPairCrops(store, stored(_recipe(pairs, (2.0,)), pairs), [2.0], crop)


def _recipe(size: Size3d, scales: tuple[float, ...]) -> LatentRecipe:
    return LatentRecipe("0" * 64, (size[1] * PIXELS, size[2] * PIXELS), scales, 4 * (size[0] - 1) + 1)


def _entry(path: Path, frames: int, width: int, height: int, caption: str = "") -> ClipEntry:
    return ClipEntry(path.stem, path, path.stem, FPS, frames, width, height, {"caption": caption})


def _training(
    what: str, dataset: Any, device: torch.device, workers: int, steps: int, step_seconds: float
) -> dict[str, Any]:
    """What a step waits for its batch of one sample, behind steps of a given length and behind none."""
    module = ResumableDataModule(batch_size=1, num_workers=workers, seed=0)

    def loader() -> DataLoader[Any]:
        return module.training_loader(dataset, len(dataset), passes=-(-(steps + 1) // len(dataset)))

    first, waited, batch = _waits(loader(), device, steps, step_seconds)
    _, free, _ = _waits(loader(), device, steps, 0.0)
    size = sum(value.nbytes for value in batch.values() if isinstance(value, Tensor))
    return {
        "subject": "loading",
        "what": what,
        "latents": list(batch["hr" if "hr" in batch else "latents"].shape[2:]),
        "mib_per_batch": round(size / 2**20, 1),
        "workers": workers,
        "step_seconds": step_seconds,
        "seconds_to_first": round(first, 3),
        "waited_ms": round(1e3 * waited, 2),
        "waiting": round(waited / (waited + step_seconds), 5),
        "batches_per_second": round(1 / free, 2),
    }


def _waits(
    loader: DataLoader[Any], device: torch.device, steps: int, step_seconds: float
) -> tuple[float, float, dict[str, Any]]:
    """Seconds until the first batch is on the device, those that each later step waited, and the last batch."""
    started, waited = time.perf_counter(), 0.0
    batches = iter(loader)
    batch = _next(batches, device)
    first = time.perf_counter() - started
    for _ in range(steps):
        time.sleep(step_seconds)
        started = time.perf_counter()
        batch = _next(batches, device)
        waited += time.perf_counter() - started
    del batches
    gc.collect()  # ends the workers
    return first, waited / steps, batch


def _next(batches: Iterator[Any], device: torch.device) -> dict[str, Any]:
    """The next batch, on its way to the device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in next(batches).items()
    }


def _write_clip(path: Path, codec: str, height: int, frames: int) -> ClipEntry:
    """A clip of shape 16:9, as grainy as a camera's."""
    import av

    encoder, options = ENCODERS[codec]
    try:
        av.codec.Codec(encoder, "w")
    except av.codec.codec.UnknownCodecError:
        raise ValueError(f"codecs: this build of PyAV has no {encoder}, which {codec} needs") from None
    width = round(height * 16 / 9 / 2) * 2
    rng = np.random.default_rng(0)
    grain = rng.integers(-GRAIN, GRAIN, (height, width, 1), dtype=np.int16)
    with av.open(path, "w") as container:
        stream: Any = container.add_stream(encoder, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for number, picture in enumerate(drifting_texture(rng, frames, height, width)):
            noisy = picture + np.roll(grain, rng.integers(1, height, 2), (0, 1))
            frame = av.VideoFrame.from_ndarray(noisy.clip(0, 255).astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return _entry(path, frames, width, height)


def _reading(
    clip: ClipEntry, codec: str, repeats: int, cores: int, gpu_seconds: float, hardware: str | None
) -> Iterator[dict[str, Any]]:
    """A clip decoded, fitted to a smaller size, and read as `luve precompute` does in a process of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Both sides smaller and another shape, as UltraVideo's clips are cropped.
        size = (clip.height * 2 // 3 // 16 * 16, clip.width * 2 // 3 // 16 * 16 - 16)
        bits = clip.path.stat().st_size * 8 * FPS / clip.total_frames
        row: dict[str, Any] = {
            "subject": "loading",
            "codec": codec,
            "size": [clip.total_frames, clip.height, clip.width],
        }
        row |= {"megabit_per_s": round(bits / 1e6, 1)}
        decode = partial(read_clip, clip.path, 0, clip.total_frames)
        decord = scan(clip.path).info.trusted_by_decord and load_decord() is not None
        seconds, decoded = _core_seconds(decode)
        for _ in range(repeats - 1):
            seconds = min(seconds, _core_seconds(decode)[0])
        yield row | {"what": "decode", "reader": "decord" if decord else "pyav"} | _rate(clip, seconds)
        if hardware is not None:
            by_hardware = partial(read_clip, clip.path, 0, clip.total_frames, hardware=hardware)
            took = min(_core_seconds(by_hardware)[0] for _ in range(repeats))
            yield row | {"what": "decode", "reader": hardware} | _rate(clip, took)
        fit = partial(fit_frames, torch.from_numpy(decoded), size)
        fitting = min(_core_seconds(fit)[0] for _ in range(repeats))
        yield row | {"what": "decode, crop and resize", "to": list(size)} | _rate(clip, seconds + fitting)
        del decoded, fit
        seconds = min(_precompute_seconds(clip, size) for _ in range(repeats))
    finally:
        torch.set_num_threads(threads)
    yield row | {"what": "precompute", "to": list(size)} | _rate(clip, seconds) | bound(seconds, cores, gpu_seconds)


def bound(core_seconds: float, cores: int, gpu_seconds: float) -> dict[str, Any]:
    """What `luve precompute` waits for: reading a window on so many cores, or encoding it on the GPU."""
    seconds = core_seconds / cores
    return {
        "cores": cores,
        "seconds_a_window": round(seconds, 3),
        "gpu_seconds": gpu_seconds,
        "of_gpu_time": round(seconds / gpu_seconds, 3),
        "bound": "gpu" if seconds < gpu_seconds else "reading",
    }


def _rate(clip: ClipEntry, seconds: float) -> dict[str, Any]:
    rate = clip.total_frames / seconds if seconds else None
    return {"core_seconds": round(seconds, 3), "frames_per_core_second": rate and round(rate, 1)}


def _core_seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of processor time in this process, and the result."""
    started = time.process_time()
    result = run()
    return time.process_time() - started, result


def _precompute_seconds(clip: ClipEntry, size: tuple[int, int]) -> float:
    """Seconds of processor time for a window: hash, scan, frames, crop, and the way to the process that encodes."""
    # A new time of change: nothing is remembered of the file.
    os.utime(clip.path)
    with TemporaryDirectory() as name:
        store = LatentStore(Path(name))
        read = WindowReader(LatentRecipe("0" * 64, size, (), clip.total_frames), store, ClipHashes(store.root))
        windows, _ = plan_windows([clip], read.recipe)
        module = EncodeDataModule(windows, read, 1, 1)
        module.shard, module.batches = windows, len(windows)
        before = _all_seconds()
        batches = iter(module.predict_dataloader())
        (item,) = next(batches)
        assert item.frames is not None, item.error
        del batches, item
        gc.collect()  # ends the worker, whose time then counts
        with_start = _all_seconds() - before
        # Starting a process is no part of it.
        before = _all_seconds()
        empty = iter(DataLoader(ClipsToEncode([], 1, read, 1), batch_size=None, num_workers=1))
        next(empty)
        del empty
        gc.collect()
        return max(0.0, with_start - (_all_seconds() - before))


def _all_seconds() -> float:
    """Seconds of processor time of this process and of all its ended children."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
