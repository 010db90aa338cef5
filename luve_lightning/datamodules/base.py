"""What DataModules share: a training order that resumes, and workers that outlive the signals that end a run.

Everything random follows from (seed, epoch, position), never from a generator's running state, so that a resumed
run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from luve_lightning.data.clip_windows import PairLookup
from luve_lightning.data.hashes import FileHashes
from luve_lightning.data.video_index import SPLITS, ClipEntry, Limits, Split, VideoIndex
from luve_lightning.files import text_digest, warn_kept_in_memory, write_text
from luve_lightning.machine import check_workers
from luve_lightning.models.backbones import load_backbone

T = TypeVar("T", covariant=True)
_ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}


class OutlivingLoader(DataLoader[T]):
    """A DataLoader whose workers survive signals to the whole process group, from their first moment on.

    Ctrl-C, a job's time limit and `kill -- -GROUP` reach the workers as well as the process that trains or
    encodes, which still needs them to finish its step. A worker that dies takes the run down before it has saved.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Lightning makes new loaders with all arguments of the given one.
        super().__init__(*args, **{"worker_init_fn": _outlive_signals, **kwargs})

    def __iter__(self) -> Any:
        """Start the workers with the signals held back, which they inherit until they can handle them."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_signals(worker: int) -> None:
    """In a worker: accept SIGTERM only from the parent, which is how the loader and the interpreter clean up."""
    del worker
    sys.excepthook = _print_unless_hung_up
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):  # not on macOS
        threading.Thread(target=_end_at_parents_word, args=(parent.pid,), daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)


def _end_at_parents_word(parent: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)


def _print_unless_hung_up(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The hook of the thread that hands over a worker's tensors; a run that ends takes what it needs and hangs up."""
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


@dataclass(frozen=True)
class SampleKey:
    """What a dataset needs to build one training sample.

    Attributes:
        index: which item.
        bucket: bucket (a scale, a view) that the whole batch shares.
        seed: run seed, epoch and position; `numpy.random.default_rng(list(key.seed))` is the sample's generator.
    """

    index: int
    bucket: int
    seed: tuple[int, int, int]


class ResumableBatchSampler(Sampler[list[SampleKey]]):
    """Shuffled batches for one rank; all ranks agree on each step's bucket.

    Each epoch visits every item `passes` times in a new order, cut to whole global batches: every rank gets the
    same number of full batches.

    Args:
        num_items: number of items in the dataset.
        batch_size: samples per batch on one rank.
        seed: run seed, >= 0.
        bucket_weights: relative frequency of each bucket, at least one, all > 0.
        passes: visits of each item per epoch.
        rank: rank of this process.
        world_size: processes.

    Raises:
        ValueError: when the items do not fill one global batch.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int,
        bucket_weights: Sequence[float] = (1.0,),
        passes: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or passes < 1:
            raise ValueError(f"batch_size and passes must be >= 1, got {batch_size} and {passes}")
        if not bucket_weights or min(bucket_weights) <= 0:
            raise ValueError(f"bucket weights must be positive, got {list(bucket_weights)}")
        if num_items * passes < batch_size * world_size:
            raise ValueError(
                f"{num_items} items x {passes} passes do not fill one batch of {batch_size} on {world_size} process(es)"
            )
        self.num_items, self.batch_size, self.seed, self.passes = num_items, batch_size, seed, passes
        weights = np.asarray(bucket_weights, dtype=np.float64)
        self.bucket_probabilities = weights / float(np.sum(bucket_weights))
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0

    @property
    def sampler(self) -> ResumableBatchSampler:
        """The object on which Lightning calls `set_epoch`: it looks for `batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def resume_at(self, batch: int) -> None:
        """Skip this many batches of the next iteration, once."""
        self.start = batch

    def __len__(self) -> int:
        return self.num_items * self.passes // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        # Read epoch and start now, not at the first `next`, which comes later without workers.
        return self._batches(self.epoch, self.start)

    def _batches(self, epoch: int, start: int) -> Iterator[list[SampleKey]]:
        # Not in __iter__: a DataLoader with workers calls that twice and uses the second iterator.
        self.start = 0
        rng = np.random.default_rng([self.seed, epoch])
        order = np.concatenate([rng.permutation(self.num_items) for _ in range(self.passes)])
        buckets = rng.choice(len(self.bucket_probabilities), size=len(self), p=self.bucket_probabilities)
        for step in range(start, len(self)):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield [
                # 1 + p: numpy treats [seed, epoch] and [seed, epoch, 0] as the same seed.
                SampleKey(int(order[p]), int(buckets[step]), (self.seed, epoch, 1 + p))
                for p in range(first, first + self.batch_size)
            ]


_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def open_index(csv: Path, keep: Limits) -> VideoIndex:
    """Open an index; the first process says how many of its rows are clips and why the others are not."""
    index = VideoIndex.open(csv, keep=keep)
    rank_zero_info(index.summary())
    return index


def tell_lookup(split: str, lookup: PairLookup) -> None:
    """Say, on the first process, which clips have no latents, and which have a varying frame rate."""
    if lookup.dropped:
        clip, reason = lookup.dropped[0]
        rank_zero_info(f"{split}: {len(lookup.dropped)} clips have no latents, first {clip}: {reason}")
    if lookup.uneven:
        rank_zero_info(
            f"{split}: {len(lookup.uneven)} clips have a variable frame rate, first {lookup.uneven[0]}: frames are "
            "counted, not timed"
        )
    if lookup.repeated:
        rank_zero_info(
            f"{split}: {len(lookup.repeated)} clips are slower than the frame rate that is read, first "
            f"{lookup.repeated[0]}: some of their frames come twice"
        )


def vae_fingerprint(backbone: str | Path, root: str | Path) -> str:
    """`LatentSpace.fingerprint()` of a backbone's VAE; remembered while the bytes of its files are the same.

    Args:
        backbone: local pipeline folder or hub id.
        root: folder of the latent store; keeps file hashes, and fingerprints under `vaes/`, where it may be
            written.

    Raises:
        FileNotFoundError: when the VAE is not available.
    """
    parts = load_backbone(backbone)
    folder = parts.vae_folder()
    if folder is None:
        return parts.latent_space().fingerprint()
    hashes = FileHashes(root)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
    contents = "".join(f"{path.name} {hashes.digest(path)}\n" for path in files)
    record = Path(root) / "vaes" / text_digest(contents)
    try:
        if _FINGERPRINT.fullmatch(known := record.read_text(encoding="ascii").strip()):
            return known
    except (OSError, ValueError):
        pass  # missing, or not readable by us
    fingerprint = parts.latent_space().fingerprint()
    try:
        write_text(record, f"{fingerprint}\n")
    except OSError as error:
        warn_kept_in_memory(Path(root), error)
    return fingerprint


class ResumableDataModule(L.LightningDataModule):
    """A DataModule whose training order is a function of (seed, epoch, step) and is part of the checkpoint.

    Run it with `Trainer(use_distributed_sampler=False)`: the batch sampler already shards over processes.

    Args:
        batch_size: samples per batch on one process.
        num_workers: loader processes, up to four per core; 0 loads in the training process.
        seed: seed of every random choice this module makes, >= 0.
    """

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        if seed < 0 or num_workers < 0 or batch_size < 1:
            raise ValueError(
                f"expected batch_size >= 1, num_workers >= 0, seed >= 0; got {batch_size}, {num_workers}, {seed}"
            )
        check_workers("num_workers", num_workers)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._resume: dict[str, Any] = {}
        self._sampler: ResumableBatchSampler | None = None

    def splits_of(self, stage: str) -> tuple[Split, ...]:
        """The splits that a stage reads; no validation clips where the Trainer runs no validation."""
        if stage == "fit" and self.trainer is not None and self.trainer.limit_val_batches == 0:
            return ("train",)
        stages: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        return stages.get(stage, ())

    def setup(self, stage: str) -> None:
        """Open the splits that a stage reads."""
        self.open_splits(*self.splits_of(stage))

    def open_splits(self, *splits: Split) -> None:
        """Look up the clips of splits, unless that was done; here there is nothing to look up.

        Called by `setup` for a stage, and directly by what looks at held-out clips in a run without validation.
        """

    @staticmethod
    def clips_of(index: VideoIndex, split: Split) -> list[ClipEntry]:
        """The clips of a split, at least one.

        Raises:
            ValueError: when there is none; says how many clips the other splits have and what to do.
        """
        entries = index.split(split)
        if not entries:
            counts = ", ".join(f"{len(index.split(name))} {name}" for name in SPLITS)
            way_out = " or train without validation (--trainer.limit_val_batches 0)" if split == "val" else ""
            raise ValueError(
                f"the split {split} of {index.source} is empty: {counts}; give its source videos in splits.json beside "
                f"the CSV{way_out}"
            )
        return entries

    def training_loader(
        self, dataset: Dataset[Any], num_items: int, bucket_weights: Sequence[float] = (1.0,), passes: int = 1
    ) -> DataLoader[Any]:
        """The loader of the training split; starts where the loaded checkpoint stopped.

        Raises:
            ValueError: when the checkpoint is from the middle of an epoch whose order this run cannot repeat.
        """
        trainer = self.trainer
        sampler = ResumableBatchSampler(
            num_items,
            self.batch_size,
            self.seed,
            bucket_weights,
            passes,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )
        resume, self._resume = self._resume, {}
        if resume:
            _check_order(resume, sampler)
            # Lightning makes the first iterator before it sets the epoch, and workers read ahead from it.
            sampler.set_epoch(resume["epoch"])
            sampler.resume_at(resume["batches"])
        self._sampler = sampler
        return OutlivingLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # The loader draws a base seed for its workers at each epoch. Its own generator keeps that draw out of
            # the global one, whose state a resumed run must find unchanged.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def evaluation_loader(self, dataset: Dataset[Any], batch_size: int = 1) -> DataLoader[Any]:
        """A loader in the dataset's own order, sharded over processes by taking every n-th item.

        With fewer items than processes some items come twice: gather results by item, do not count them.
        """
        trainer = self.trainer
        if trainer is not None and trainer.world_size > 1:
            size = len(dataset)  # type: ignore[arg-type]
            # A process without an item would skip the loop's hooks, where the others wait for it; it repeats one.
            items = range(trainer.global_rank, size, trainer.world_size) or [trainer.global_rank % size]
            dataset = Subset(dataset, items)
        return OutlivingLoader(
            dataset,
            batch_size=batch_size,
            num_workers=min(self.num_workers, 4),
            generator=torch.Generator().manual_seed(self.seed),
        )

    def clip_counts(self) -> dict[str, int]:
        """How many clips each split that was set up has, by name; for people."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The epoch and batch that training takes next, and what the order depends on; plain values."""
        if self.trainer is None or self._sampler is None:
            return self._resume
        sampler = self._sampler
        # `processed`, not `completed`: when saving, `completed` is one behind. The sampler's epoch, not the
        # trainer's, which is one ahead when an epoch has just ended.
        # Its type does not declare `processed`.
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        ended = progress.is_last_batch
        return {
            "epoch": sampler.epoch + ended,
            "batches": 0 if ended else progress.current.processed,
            "order": _order(sampler),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember where to start; the next training loader uses it."""
        self._resume = dict(state)


def check_clip_limits(**limits: int | None) -> None:
    """Raise ValueError for a limit below 1, by which a split would be measured on nothing; None is all clips."""
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(f"{name}: expected at least 1 clip, or null for all, got {limit}")


def _order(sampler: ResumableBatchSampler) -> dict[str, int]:
    """What decides which samples a batch holds, under the configuration's names."""
    return {
        "seed": sampler.seed,
        "items": sampler.num_items,
        "passes": sampler.passes,
        "batch_size": sampler.batch_size,
        "processes": sampler.world_size,
    }


def _check_order(resume: dict[str, Any], sampler: ResumableBatchSampler) -> None:
    then, now = resume["order"], _order(sampler)
    changed = [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]
    if changed and resume["batches"]:
        raise ValueError(
            f"the checkpoint is {resume['batches']} batches into epoch {resume['epoch']} of another order of the data "
            f"({'; '.join(changed)}): resume with the same values, or start a new run from its weights"
        )
