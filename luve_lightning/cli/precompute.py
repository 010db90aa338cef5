"""`luve mini-world`, `luve precompute`, `luve embed`: clips rendered, and encoded; captions encoded."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from rich.console import Console

from luve_lightning.callbacks.progress import TrainingProgress
from luve_lightning.callbacks.repeatable import CPUThreads, cpu_threads
from luve_lightning.callbacks.step_times import ClipTimes
from luve_lightning.callbacks.stops import StopPredictionOnSigterm
from luve_lightning.cli import Verb
from luve_lightning.cli.indexed_clips import (
    check_folder,
    check_stored,
    entries_of,
    open_index,
    print_summary,
    uneven_line,
)
from luve_lightning.cli.keys import check_trainer
from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.clip_windows import quarantine_path, repeated_clips
from luve_lightning.data.clips import require_hardware
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import LatentKey, LatentRecipe, LatentStore
from luve_lightning.data.mini_world import render_mini_world
from luve_lightning.data.mini_world.stage import WorldKind
from luve_lightning.data.quarantine import Quarantine, TooManyBadClips
from luve_lightning.data.text_store import TextSource, TextStore, captions_of, embed_captions
from luve_lightning.data.variants import PixelTransform, Unchanged, variant_name
from luve_lightning.data.video_index import Limits, Split
from luve_lightning.datamodules.buckets import Buckets, LengthChoice, SizeChoice
from luve_lightning.datamodules.clips import EncodeDataModule, EncodeShare
from luve_lightning.machine import UnitTimes, choose_device, decoding_threads
from luve_lightning.models.backbones import LatentSpace, load_backbone
from luve_lightning.tasks.encode import EncodeTask, EncodeTotals, predict_latents
from luve_lightning.terminal import Steps, amount, say

VERBS = {
    "mini-world": Verb("Data", "render the mini world's clips and their CSV", goes_on=True),
    "precompute": Verb(
        "Data",
        "encode clips into the latent store, once per size",
        examples=("experiments/precompute/mini.yaml",),
        goes_on=True,
    ),
    "embed": Verb(
        "Data", "embed captions into the text store, once", examples=("experiments/embed/mini.yaml",), goes_on=True
    ),
}


def mini_world(
    output: Path = Path("data/mini/world"),
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
) -> None:
    """Renders the mini world: real photographs filmed by a moving camera, as clips with UltraVideo's CSV.

    A complete world is left alone, an interrupted one is completed.

    Args:
        output: Folder to fill with clips/, clips.csv, splits.json and MANIFEST.json.
        seed: Seed of everything random; the same seed gives the same bytes.
        train: Number of training clips.
        val: Number of validation clips.
        test: Number of test clips.
        frames: Frames per clip, 4k+1 and at least 5.
        size: Side of the square frames in pixels, a multiple of 16.
        fps: Frames per second.
        processes: Worker processes; default one per CPU.
        kind: What is held out. varied: photographs, in front of which cameras and sprites of all kinds move.
            combinations: combinations of a photograph, a motion and a sprite that training shows one by one; some of
            the numbers of clips may be 0. photographs: photographs, in clips like those.
        flaws: Share of the training clips that are badly taken (blurred, noisy, blocky, dark, blown, shaky, frozen or
            stuttering), as collected clips are: from 0 to less than 1. Not for varied worlds.
    """
    console = Console(emoji=False)
    started = time.perf_counter()
    report = render_mini_world(output, seed, train, val, test, frames, size, fps, processes, kind, flaws)
    seconds = time.perf_counter() - started
    if report.rendered:
        kept = f" ({report.kept} were there already)" if report.kept else ""
        console.print(f"Rendered {amount(len(report.rendered), 'clip')} into {output} in {seconds:.0f} s{kept}.")
    else:
        console.print(f"{output} is complete: {amount(report.kept, 'clip')}, nothing to render.")


def precompute(
    backbone: str,
    index: Path,
    store: Path,
    size: SizeChoice,
    scales: list[float],
    frames: LengthChoice,
    splits: list[Split] | None = None,
    clips: Path | None = None,
    keep: Limits = Limits(),  # noqa: B008  # frozen
    start: int = 0,
    windows: int = 1,
    stride: int = 1,
    fps: float | None = None,
    variants: dict[str, PixelTransform] | None = None,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    batch_size: int = 4,
    num_workers: int = 0,
    hardware: str | None = None,
    threads: int = 2,
    max_bad_fraction: float = 0.05,
    trainer: dict[str, Any] | None = None,
    check: bool = False,
    measured: Path | None = None,
) -> None:
    """Encodes clips at high resolution and at each lower one, and stores the latents.

    What is stored already is skipped before its clip is decoded, so an interrupted run continues. Several runs may
    share a store. Unreadable clips are listed under quarantine/ in the store and left out; clips that are too
    short are left out without being listed.

    Args:
        backbone: Folder or hub id of the diffusers pipeline with the VAE.
        index: UltraVideo's CSV, or an index that luve index made.
        store: Folder of the latent store.
        size: Height and width of the high-resolution pixels; larger clips are cropped to this aspect ratio around
            their centre and downscaled. Several such sizes, or an area, make buckets: each clip goes to the size of the
            nearest aspect ratio.
        scales: How many times smaller each low-resolution version is, e.g. [1.5, 2, 3].
        frames: Frames per window, 4k+1. Of several such lengths, each clip takes the longest that it fills.
        splits: Splits to encode, of train, val and test; default all clips.
        clips: Folder of the clips; default clips/ beside a CSV, else the index's own folder.
        keep: Which clips of the index to take.
        start: First frame of the first window.
        windows: Windows per clip, equally spaced from start to its end.
        stride: Read every stride-th frame.
        fps: Read every clip as one of this many frames a second, by the times of its frames; start, frames and stride
            then count these. Slower clips repeat frames and are counted; below half of it they are left out. Default:
            the frames as they are.
        variants: Transforms of the pixels, by name; default {plain: unchanged}.
        dtype: Dtype on disk.
        batch_size: Windows encoded at once.
        num_workers: Processes that decode ahead; 0 decodes between the encodes.
        hardware: What decodes the codecs that it knows, such as cuda; default software. Each clip's first frame must
            equal software's, or the clip is set aside.
        threads: CPU threads for encoding. Fixed, because the last digit of latents depends on it, and a training
            on them then differs visibly.
        max_bad_fraction: Share of clips that may be unreadable before the run stops; two always may, unless it is
            0.
        trainer: Lightning Trainer options, e.g. {accelerator: gpu, devices: 8, strategy: ddp}.
        check: Encode nothing; read every stored latent of this configuration and name the damaged ones. The exit
            code is 2 when there are any.
        measured: Also write what it took to this file, FILE.json: seconds in all, of the first clip and of each later
            one, and GPU memory.
    """
    started = time.perf_counter()
    check_trainer(trainer or {})
    check_folder("store", store)
    if hardware is not None:
        require_hardware(hardware)
    clip_times = ClipTimes(UnitTimes("clip"))
    runner = _trainer(trainer, threads, clip_times)
    console = Console(emoji=False, quiet=not runner.is_global_zero)
    codec = load_backbone(backbone).latent_space()
    buckets = Buckets.chosen(size, frames, lambda: load_backbone(backbone).size_rules().step)
    buckets.check_scales(scales, codec.spatial_ratio, size)
    for bucket in buckets:
        codec.latent_size(bucket.frames, *bucket.size)
    transforms = variants or {"plain": Unchanged()}
    names = tuple(variant_name(name, transform) for name, transform in transforms.items())
    first, lower, vae = next(iter(buckets)), tuple(scales), codec.fingerprint()
    recipe = LatentRecipe(vae, first.size, lower, first.frames, start, windows, stride, names, dtype, fps)
    latents = LatentStore(store)
    hashes = ClipHashes(latents.root)
    entries = entries_of(open_index(console, index, clips, keep), splits)
    assigned, left = buckets.assign(entries, recipe)
    several = len(buckets) > 1
    if not assigned:
        why = "fit no bucket" if several else "are too short" if fps is None else "are too short or too slow"
        raise ValueError(f"{index}: all of {amount(len(entries), 'clip')} {why}, first {left[0]}")
    shares = [EncodeShare.of(bucket, some, recipe, latents, hashes, hardware) for bucket, some in assigned.items()]
    count = sum(len(share.planned) for share in shares)
    if check:
        _check(Console(emoji=False), shares, count * recipe.count, max(1, num_workers), started)
        return
    console.print(
        f"{amount(len(entries), 'clip')}, {amount(count, 'window')} of {recipe.count} latents, VAE {recipe.vae[:12]}"
    )
    if runner.is_global_zero:
        latents.clean()
    done = _Encoded(shares, several)
    done.encode(console, runner, codec, transforms, max_bad_fraction, batch_size, num_workers)
    there = (count - done.totals.bad) * recipe.count - done.totals.encoded
    uneven = uneven_line(hashes, entries) if fps is None and runner.is_global_zero else ""
    print_summary(console, store, done.lines(recipe, there, left, uneven), started)
    if runner.is_global_zero:
        made = {"made": done.totals.encoded, "bytes": done.totals.bytes, **clip_times.found}
        total = count * recipe.count
        clip_times.times.write(measured, processes=runner.world_size, units=count, total=total, there=there, **made)


@dataclass
class _Encoded:
    """What a run encodes, bucket by bucket, and what came of it: latents, and clips listed as unreadable."""

    shares: Sequence[EncodeShare]
    several: bool  # buckets, of which some may have no clip
    totals: EncodeTotals = field(default_factory=EncodeTotals)
    listed: int = 0
    where: str = ""

    def encode(
        self,
        console: Console,
        runner: L.Trainer,
        codec: LatentSpace,
        transforms: Mapping[str, PixelTransform],
        max_bad: float,
        batch_size: int,
        num_workers: int,
    ) -> None:
        """Encode every bucket; too many unreadable clips in all of them together stop the run."""
        usable = sum(len(share.clips) for share in self.shares)
        for number, share in enumerate(self.shares):
            if self.several:
                place = f"bucket {number + 1} of {len(self.shares)}, {share.bucket}"
                console.print(f"  {place}: {amount(len(share.planned), 'window')}")
            bad = Quarantine(quarantine_path(share.read.store, share.read.recipe), max_bad, usable, share.clips)
            task = EncodeTask(codec, share.read, transforms, bad, batch_size)
            predict_latents(runner, task, EncodeDataModule(share.planned, share.read, batch_size, num_workers))
            self.totals = self.totals + task.totals
            self.listed += len(bad.bad())
            if self.listed > bad.allowed:
                told = f"{self.listed} of {amount(usable, 'clip')} cannot be read, in several buckets"
                raise TooManyBadClips(f"{told}: {bad.describe()}")
            self.where = f", listed in {bad.path.parent if self.several else bad.path}" if bad.path else ""

    def lines(self, recipe: LatentRecipe, there: int, left: Sequence[ClipError], uneven: str) -> list[str]:
        """The summary: what was encoded, what was there, and the clips that were left out."""
        fps = recipe.fps
        slow = [one for share in self.shares for one in repeated_clips((w.clip for w in share.planned), recipe)]
        label = "in no bucket" if self.several else "too short   " if fps is None else "left out    "
        return [
            f"  encoded        {amount(self.totals.encoded, 'latent')}, {self.totals.bytes / 2**20:.1f} MiB",
            f"  already there  {there}",
            f"  quarantined    {self.listed}{self.where if self.listed else ''}",
            f"  {label}   {len(left)}, first {left[0]}" if left else "",
            f"  repeat frames  {len(slow)}, slower than {fps:g} a second, first {slow[0].clip_id}" if slow else "",
            f"  variable rate  {uneven}" if uneven else "",
        ]


def _check(console: Console, shares: Sequence[EncodeShare], total: int, threads: int, started: float) -> None:
    """Read all latents of windows, about `total`; raises StoreError when some are damaged."""
    unreadable: dict[Path, str] = {}

    def keys() -> Iterator[LatentKey]:
        for read, window in ((share.read, window) for share in shares for window in share.planned):
            try:
                yield from read.recipe.keys(
                    read.hashes.digest(window.clip.path, window.clip.matte), window.frames
                ).values()
            except OSError as error:
                unreadable[window.clip.path] = error.strerror or str(error)
            except ClipError as error:
                unreadable[window.clip.path] = error.reason

    found = check_stored(console, shares[0].read.store, keys(), total, threads, started)
    for path, reason in list(unreadable.items())[:1]:
        say(
            console,
            f"latents of {amount(len(unreadable), 'clip')} were not looked for: the clip's bytes name them, and it "
            f"cannot be read (first {path}: {reason})",
        )
    found.complain()


def _trainer(options: dict[str, Any] | None, threads: int, clip_times: ClipTimes) -> L.Trainer:
    """A Trainer that predicts and leaves nothing behind."""
    fixed: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        # The DataModule shards by itself, and each process must reach the end of the loop.
        "use_distributed_sampler": False,
        "callbacks": [StopPredictionOnSigterm(), CPUThreads(threads), clip_times],
    }
    given = options or {}
    if given.get("enable_progress_bar", True):
        fixed["callbacks"].append(TrainingProgress())
    known = inspect.signature(L.Trainer).parameters.keys() - fixed.keys()
    wrong = sorted(given.keys() - known)
    if wrong:
        raise ValueError(f"trainer: {', '.join(wrong)} cannot be set here; known: {', '.join(sorted(known))}")
    return L.Trainer(**fixed, **given)


def embed(
    backbone: str,
    index: Path,
    store: Path,
    columns: list[str] | None = None,
    splits: list[Split] | None = None,
    clips: Path | None = None,
    keep: Limits = Limits(),  # noqa: B008  # frozen
    length: int | None = None,
    batch_size: int = 8,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    threads: int = 2,
    device: str = "auto",
    check: bool = False,
    measured: Path | None = None,
) -> None:
    """Embeds captions with the backbone's text encoder and stores them, so that training needs no text encoder.

    The empty caption, which classifier-free guidance needs, is always included. What is stored already is skipped,
    so an interrupted run continues. Several runs, one per GPU, may share a store: start each with its own device;
    when any of them ends, every caption is there.

    Args:
        backbone: Folder or hub id of the diffusers pipeline with the tokenizer and text encoder.
        index: UltraVideo's CSV, or an index that luve index made.
        store: Folder of the caption embeddings.
        columns: Caption columns; default ["Summarized Description"].
        splits: Splits to embed, of train, val and test; default all clips.
        clips: Folder of the clips; default clips/ beside a CSV, else the index's own folder.
        keep: Which clips of the index to take.
        length: Number of tokens to pad or cut a caption to; default the backbone's own, at most 512 for Wan.
        batch_size: Captions embedded at once.
        dtype: Dtype of the text encoder's weights and on disk. Wan's was trained in bfloat16; float16 overflows.
        threads: CPU threads for embedding. Fixed, because the last digit of embeddings depends on it.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        check: Embed nothing; read every stored embedding of these captions and name the damaged ones. The exit
            code is 2 when there are any.
        measured: Also write what it took to this file, FILE.json: seconds in all, of the first batch and of each later
            caption, and GPU memory.
    """
    started = time.perf_counter()
    console = Console(emoji=False)
    # Checked before minutes of loading.
    if batch_size < 1 or (length is not None and length < 1):
        raise ValueError(f"expected batch_size >= 1 and length >= 1, got {batch_size} and {length}")
    check_folder("store", store)
    target = choose_device(device)
    entries = entries_of(open_index(console, index, clips, keep), splits)
    captions = captions_of(entries, columns or ["Summarized Description"])
    encoder = load_backbone(backbone).text(getattr(torch, dtype), length)
    source = TextSource(encoder.fingerprint(), encoder.length, dtype)
    console.print(
        f"{amount(len(captions), 'caption')}, text encoder {source.encoder[:12]} on {target}", highlight=False
    )
    texts = TextStore(store)
    if check:
        keys = [source.key(caption) for caption in captions]
        check_stored(console, texts, keys, len(keys), decoding_threads(), started).complain()
        return
    texts.clean()
    times = UnitTimes("caption", target)
    with cpu_threads(threads), Steps(console) as steps:
        steps.begin("captions", len(captions))
        report = embed_captions(encoder.to(target), texts, source, captions, batch_size, steps.advance, times)
    # Last: whoever finds a record finds all its captions.
    texts.record(source, backbone)
    cut = ""
    if report.first_cut is not None:
        caption, first = report.first_cut
        cut = f"  cut            {amount(report.cut, 'caption')}, for instance {caption[:40]!r}...: {first}"
    embedded = f"  embedded       {amount(report.embedded, 'caption')}, {report.bytes / 2**20:.1f} MiB"
    print_summary(console, store, [embedded, cut, f"  already there  {report.there}"], started)
    made = {"total": len(captions), "there": report.there, "made": report.embedded, "bytes": report.bytes}
    times.write(measured, processes=1, units=len(captions), **made)
