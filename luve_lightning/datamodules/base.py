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
from collections.abc import Callable, Container, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, Dataset, Subset

from luve_lightning.data.clip_windows import NoUsableClips
from luve_lightning.data.hashes import FileHashes
from luve_lightning.data.video_index import SPLITS, ClipEntry, Limits, Split, VideoIndex
from luve_lightning.datamodules.buckets import Bucket, Buckets, LengthChoice, SizeChoice
from luve_lightning.datamodules.sampling import (
    BatchOrder,
    BucketBatchSampler,
    ResumableBatchSampler,
    batch_groups,
    check_order,
    evaluation_batches,
)
from luve_lightning.files import text_digest, warn_kept_in_memory, write_text
from luve_lightning.machine import check_workers, on_every_rank
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


_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def open_index(csv: Path, keep: Limits) -> VideoIndex:
    """Open an index; the first process says how many of its rows are clips and why the others are not."""
    index = VideoIndex.open(csv, keep=keep)
    rank_zero_info(index.summary(again=False))
    return index


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


class EmptySplit(ValueError):
    """A split without a clip."""


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
        self.validates = True
        """Whether there are validation clips, as far as splits were opened."""
        self.tests = True
        """Whether the index has test clips, once it was opened."""
        self.fill_batches = False
        self.stills_share: float | None = None
        self._choice: tuple[SizeChoice, LengthChoice, str] | None = None
        self._bucket_of: dict[str, list[Bucket]] = {}
        self._resume: dict[str, Any] = {}
        self._sampler: BatchOrder | None = None

    def choose_buckets(
        self,
        size: SizeChoice,
        frames: LengthChoice,
        backbone: str | Path,
        fill_batches: bool = False,
        stills_share: float | None = None,
    ) -> None:
        """Say which buckets the items are in, for a module whose items have some; see `batch_groups`."""
        if stills_share is not None and not 0 <= stills_share <= 1:
            raise ValueError(f"stills_share: expected a share in [0, 1], or null, got {stills_share}")
        if stills_share is not None and (isinstance(frames, int) or 1 not in frames or len(frames) == 1):
            raise ValueError(f"stills_share: expected several lengths in frames, one of them 1, got {frames}")
        self.fill_batches, self.stills_share = fill_batches, stills_share
        self._choice = size, frames, str(backbone)

    @cached_property
    def buckets(self) -> Buckets:
        """All buckets of the configuration, largest first."""
        # Not before the clips are looked up: an area's sizes need the backbone, which need not be there earlier.
        assert self._choice is not None
        size, frames, backbone = self._choice
        return Buckets.chosen(size, frames, lambda: load_backbone(backbone).size_rules().step)

    def note_buckets(self, split: str, buckets: Sequence[Bucket]) -> None:
        """Remember the bucket of each item of a split."""
        self._bucket_of[split] = list(buckets)

    def buckets_of(self, split: str) -> list[Bucket] | None:
        """The bucket of each item of a split; None where the configuration has a single one, or none."""
        if self._choice is None or len(self.buckets) == 1:
            return None
        return self._bucket_of[split]

    def bucket_numbers(self, split: str) -> list[int] | None:
        """Number of each item's bucket among all, or None; see `buckets_of`."""
        numbers = {bucket: number for number, bucket in enumerate(self.buckets)}
        found = self.buckets_of(split)
        return None if found is None else [numbers[bucket] for bucket in found]

    def splits_of(self, stage: str) -> tuple[Split, ...]:
        """The splits that a stage reads; no validation clips where the Trainer runs no validation."""
        if stage == "fit" and self.trainer is not None and self.trainer.limit_val_batches == 0:
            return ("train",)
        stages: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        return stages.get(stage, ())

    def setup(self, stage: str) -> None:
        """Open the splits that a stage reads; what is missing there ends all processes, and the first one says it."""
        rank = 0 if self.trainer is None else self.trainer.global_rank
        on_every_rank(rank, lambda: self.open_splits(*self.splits_of(stage)))

    def open_splits(self, *splits: Split) -> None:
        """Look up the clips of splits, unless that was done; here there is nothing to look up.

        Called by `setup` for a stage, and directly by what looks at held-out clips in a run without validation.
        """

    def look_up(self, index: VideoIndex, splits: Iterable[Split], find: Callable[[Split], None]) -> None:
        """Call `find` for each split. Where an index of one's own has nothing to validate on, say so and go on.

        Raises:
            EmptySplit: see `clips_of`.
            NoUsableClips: none of a split's clips has latents.
        """
        self.tests = bool(index.split("test"))
        for split in splits:
            try:
                find(split)
            except (EmptySplit, NoUsableClips) as error:
                trainer = self.trainer
                if not index.own or split != "val" or (trainer and trainer.state.fn == TrainerFn.VALIDATING):
                    raise
                rank_zero_info(f"training goes on without validation: {error}")
                self.validates = False
                if trainer is not None:
                    trainer.limit_val_batches = 0

    def unopened(self, splits: Iterable[Split], opened: Container[str]) -> list[Split]:
        """The splits that are still to be opened; not validation where there is none."""
        return [split for split in splits if split not in opened and (split != "val" or self.validates)]

    def open_held_out(self) -> Split:
        """Open the validation split, in a run without validation too, and name it; training where there is none."""
        self.open_splits("val")
        if self.validates:
            return "val"
        self.open_splits("train")
        return "train"

    @staticmethod
    def clips_of(index: VideoIndex, split: Split) -> list[ClipEntry]:
        """The clips of a split, at least one.

        Raises:
            EmptySplit: when there is none; says how many clips the other splits have and what to do.
        """
        entries = index.split(split)
        if not entries:
            counts = ", ".join(f"{len(index.split(name))} {name}" for name in SPLITS)
            way_out = " or train without validation (--trainer.limit_val_batches 0)" if split == "val" else ""
            where = "splits.json beside the CSV"
            if index.own:
                where, way_out = "a file for luve index --splits", ""
            raise EmptySplit(
                f"the split {split} of {index.source} is empty: {counts}; give its source videos in {where}{way_out}"
            )
        return entries

    def training_loader(
        self,
        dataset: Dataset[Any],
        num_items: int,
        kind_weights: Sequence[float] = (1.0,),
        passes: int = 1,
        volume_of: Callable[[int], int] | None = None,
        first_kind: int | None = None,
    ) -> DataLoader[Any]:
        """The loader of the training split; starts where the loaded checkpoint stopped.

        Args:
            dataset: gives a sample for a `SampleKey`.
            num_items: its length.
            kind_weights: see BatchOrder.
            passes: visits of each item per epoch.
            volume_of: latents of an item's sample, frames x height x width; asked for one item of each bucket. None
                where all items have one size.
            first_kind: see BucketBatchSampler.

        Raises:
            ValueError: when the checkpoint is from the middle of an epoch whose order this run cannot repeat.
        """
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        sampler: BatchOrder
        buckets = self.buckets_of("train")
        if buckets is None:
            sampler = ResumableBatchSampler(
                num_items, self.batch_size, self.seed, kind_weights, passes, rank, world_size
            )
        else:
            assert volume_of is not None
            volumes = {bucket: volume_of(buckets.index(bucket)) for bucket in dict.fromkeys(buckets)}
            groups = batch_groups(
                self.buckets, buckets, volumes, self.batch_size, passes, self.fill_batches, self.stills_share
            )
            sampler = BucketBatchSampler(groups, self.seed, kind_weights, rank, world_size, first_kind)
            rank_zero_info(sampler.table())
        resume, self._resume = self._resume, {}
        if resume:
            check_order(resume, sampler)
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

    def evaluation_loader(
        self, dataset: Dataset[Any], batch_size: int = 1, buckets: Sequence[Bucket | int] | None = None
    ) -> DataLoader[Any]:
        """A loader in the dataset's own order, sharded over processes by taking every n-th item.

        With fewer items than processes some items come twice: gather results by item, do not count them. So they do
        where the model is sharded and the items do not divide: every process must take part in each pass.

        Args:
            dataset: gives an item for its place.
            batch_size: items per batch on one process.
            buckets: the bucket of each item; then a batch comes from one bucket, the same on every process, and buckets
                come one after another. None where all items have one size.
        """
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        loading: dict[str, Any] = {
            "num_workers": min(self.num_workers, 4),
            "generator": torch.Generator().manual_seed(self.seed),
        }
        strategy = getattr(trainer, "strategy", None)
        sharded = world_size > 1 and isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
        if sharded or (buckets is not None and batch_size > 1):
            buckets = buckets or [0] * len(dataset)  # type: ignore[arg-type]
            return OutlivingLoader(
                dataset, batch_sampler=evaluation_batches(buckets, batch_size, rank, world_size), **loading
            )
        if world_size > 1:
            size = len(dataset)  # type: ignore[arg-type]
            # A process without an item would skip the loop's hooks, where the others wait for it; it repeats one.
            items = range(rank, size, world_size) or [rank % size]
            dataset = Subset(dataset, items)
        return OutlivingLoader(dataset, batch_size=batch_size, **loading)

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
            "order": sampler.order(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember where to start; the next training loader uses it."""
        self._resume = dict(state)


def check_clip_limits(**limits: int | None) -> None:
    """Raise ValueError for a limit below 1, by which a split would be measured on nothing; None is all clips."""
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(f"{name}: expected at least 1 clip, or null for all, got {limit}")
