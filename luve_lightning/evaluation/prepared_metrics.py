"""The metrics of an evaluation: prepared, with statistics of their references, or set aside with the reason."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchmetrics import Metric

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.hashes import FileHashes, shown_digest
from luve_lightning.data.still_files import ORIENTATION, opened_still, still_kind
from luve_lightning.data.stills import read_still, still_label
from luve_lightning.data.video_files import VIDEO_SUFFIXES, read_video
from luve_lightning.evaluation.result_cache import code_digest, describe_metric, digest_of
from luve_lightning.files import file_digest, listing_digest, text_digest, warn_kept_in_memory
from luve_lightning.functional.patches import PatchPlan
from luve_lightning.metrics.base import Unavailable, VideoMetric
from luve_lightning.metrics.content import MotionMetric
from luve_lightning.metrics.feature_moments import FeatureExtractor, FeatureStatistics
from luve_lightning.metrics.frechet_patch import DataCopying, FrechetPatchDistance

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})

Progress = Callable[[int, int], None]
"""Called with the number of files done and of all files."""


def reference_files(folder: str | Path) -> list[Path]:
    """Images and videos of a folder and its subfolders, sorted by path, without hidden ones.

    Raises:
        FileNotFoundError: there is no such folder, or none of them in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"reference {folder}: no such folder")
    known = IMAGE_SUFFIXES.union(VIDEO_SUFFIXES)
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in known and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise FileNotFoundError(f"reference {folder}: holds neither images nor videos")
    return files


def source_hash(folder: str | Path, files: Sequence[Path]) -> str:
    """sha256 over names (below the folder) and contents of files; changes with any of them."""

    def digest(path: Path) -> str:
        content = file_digest(path)
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            return shown_digest(path, content)
        # Statistics of images that are shown as they are stored, which were always read as now, stay valid.
        shown = _shown(path)
        return text_digest(f"{content}\nshown as: {shown}") if shown else content

    return listing_digest((path.relative_to(folder).as_posix(), digest(path)) for path in files)


def _shown(path: Path) -> str:
    """How an image is shown, where not as it is stored, in words."""
    if still_kind(path) is None:
        return ""
    try:
        with opened_still(path) as picture:
            turned = picture.getexif().get(ORIENTATION, 1) in range(2, 9)
        return ", ".join(filter(None, ("turned" * turned, still_label(path))))
    except ClipError as error:
        raise ValueError(f"reference image {error}") from error


def read_frames(path: Path) -> Tensor:
    """Frames of a video, or the single one of an image as a viewer shows it, uint8 T x H x W x 3.

    Raises:
        ValueError: an image that is unreadable or refused, see `read_still`; a video's error is `read_video`'s own.
    """
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return torch.from_numpy(read_video(path)[0])
    try:
        if still_kind(path) is not None:
            return torch.from_numpy(read_still(path))
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))[None]
    except ClipError as error:
        raise ValueError(f"reference image {error}") from error
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"reference image {path}: cannot be read ({error})") from error


def folder_statistics(
    folder: str | Path,
    patches: PatchPlan,
    extractor: FeatureExtractor,
    device: torch.device | str,
    progress: Progress | None = None,
    reader: FrechetPatchDistance | None = None,
) -> FeatureStatistics:
    """Statistics of every image and video of a folder, one file at a time.

    Args:
        folder: searched with all its subfolders.
        patches: which patches of which frames; an image is one frame.
        extractor: the network.
        device: device of the network.
        progress: see `Progress`.
        reader: makes the features instead of a `FrechetPatchDistance` of these patches; without videos.

    Raises:
        FileNotFoundError: no such folder, or nothing in it.
        Unavailable: the network's file is missing.
        ValueError: a file that is unreadable, or smaller than a patch; nothing is skipped.
    """
    folder = Path(folder)
    files = reference_files(folder)
    metric = reader or FrechetPatchDistance(patches, extractor)
    metric.prepare(device)
    rows: list[Tensor] = []
    for done, path in enumerate(files, start=1):
        frames = read_frames(path)
        key = path.relative_to(folder).as_posix()
        try:
            if metric.kernel:
                rows.append(metric.features(frames, key))
                metric.add(rows[-1].to(metric.device))
            else:
                metric.update(frames, key)
        except ValueError as error:
            raise ValueError(f"reference {path}: {error}") from error
        if progress is not None:
            progress(done, len(files))
    return FeatureStatistics(
        moments=metric.moments,
        plan=patches,
        extractor=extractor.name,
        source=str(folder),
        source_hash=source_hash(folder, files),
        files=len(files),
        rows=torch.cat(rows) if rows else None,
        lengths=tuple(map(len, rows)),
    )


def prepare_reference(
    metric: FrechetPatchDistance,
    reference: str | Path,
    device: torch.device | str,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> FeatureStatistics:
    """Give a metric its reference: a statistics file, or a folder, whose statistics are made once.

    Args:
        metric: prepared here, see `FrechetPatchDistance.prepare`.
        reference: a statistics file, or a folder of images and videos.
        device: device of the network.
        cache: folder that keeps statistics by the content of their source, so that a changed reference never meets
            old ones; None keeps nothing.
        progress: see `Progress`; not called for existing statistics.

    Returns:
        The metric's reference from now on.

    Raises:
        FileNotFoundError: neither exists.
        ValueError: statistics made differently, or unusable files; see `folder_statistics`.
        Unavailable: the network's file is missing.
    """
    if not Path(reference).exists():
        raise FileNotFoundError(f"reference {reference}: no such file or folder")
    folder = Path(reference)
    metric.reference = None
    metric.prepare(device)
    if not folder.is_dir():
        statistics = FeatureStatistics.load(folder)
    else:
        kept = None if cache is None else _kept(folder, metric, cache)
        found = None if kept is None else _load_kept(kept)
        statistics = found or folder_statistics(
            folder, metric.patches, metric.extractor, device, progress, metric.reader()
        )
        if kept is not None and found is None:
            try:
                statistics.save(kept)
            except OSError as error:
                warn_kept_in_memory(kept.parent, error)
    metric.use_reference(statistics)
    return statistics


def _load_kept(kept: Path) -> FeatureStatistics | None:
    """Statistics of an earlier run; None, with a message, when they are damaged."""
    if not kept.is_file():
        return None
    try:
        return FeatureStatistics.load(kept)
    except (ValueError, OSError) as error:
        warnings.warn(f"{error}; they are made again", stacklevel=2)
        return None


def _kept(folder: Path, metric: FrechetPatchDistance, cache: Path) -> Path:
    content = source_hash(folder, reference_files(folder))
    recipe = f"{metric.extractor.name}\n{metric.patches}\n{content}\n" + "with features\n" * metric.kernel
    return cache / f"{metric.name}-{text_digest(recipe)[:20]}.safetensors"


# How frames are decoded is part of every result.
_DECODING = "luve_lightning.data.clips"


@dataclass(eq=False)  # metrics compare into metrics
class ReadyMetric:
    """A metric that is ready.

    Attributes:
        name: its column.
        torch_metric: a `VideoMetric` or a `FrechetPatchDistance`; None for columns computed from others.
        identity: digest of everything its values depend on besides the videos.
        higher_is_better: direction; None for neither.
        resolution: size at which frames are measured, in words.
        extractor: extractor of the features, for a Fréchet distance.
    """

    name: str
    torch_metric: VideoMetric | FrechetPatchDistance | None
    identity: str
    higher_is_better: bool | None
    resolution: str
    extractor: str | None = None

    @property
    def full_reference(self) -> bool:
        """Whether each video is compared with its original."""
        return isinstance(self.torch_metric, VideoMetric) and self.torch_metric.full_reference

    @property
    def prompted(self) -> bool:
        """Whether the value depends on the video's prompt."""
        return isinstance(self.torch_metric, VideoMetric) and self.torch_metric.prompted

    @property
    def with_motion(self) -> bool:
        """Whether each video is compared with its motion video."""
        return isinstance(self.torch_metric, MotionMetric)

    @property
    def frechet(self) -> FrechetPatchDistance | None:
        """The metric, if it is a distance between sets."""
        return self.torch_metric if isinstance(self.torch_metric, FrechetPatchDistance) else None

    @property
    def needs_originals_features(self) -> bool:
        """Whether its reference set is that of the originals."""
        return self.frechet is not None and self.frechet.reference is None

    def seed(self, video: str) -> str | None:
        """What decides the result of a video of this name, besides the contents."""
        frechet = self.frechet
        return video if frechet is not None and frechet.patches.placement != "grid" else None


@dataclass(frozen=True)
class Skipped:
    """A metric that cannot run here, with the reason, which is kept without the metric's name in front."""

    name: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", self.reason.removeprefix(f"{self.name}: "))

    def __str__(self) -> str:
        """In one line; many reasons begin with the name."""
        return self.reason if self.reason.startswith(f"{self.name} ") else f"{self.name}: {self.reason}"


def prepare_metrics(
    metrics: Mapping[str, Metric],
    device: torch.device,
    originals: bool,
    hashes: FileHashes,
    cache: Path,
    prompts: bool = False,
    motions: bool = False,
) -> tuple[list[ReadyMetric], list[Skipped]]:
    """Prepare every metric that can run, in the given order.

    Args:
        metrics: metrics by their key in the configuration.
        device: device of the metrics.
        originals: whether there are originals to compare with.
        hashes: hashes of the files that the configuration names.
        cache: folder for statistics of reference folders.
        prompts: whether some video has a prompt.
        motions: whether some video has its motion video.

    Raises:
        FileNotFoundError: a named reference does not exist.
        ValueError: an unsuitable reference, an object that is no metric of videos, or two of one name.
    """
    ready: list[ReadyMetric] = []
    skipped: list[Skipped] = []
    keys: dict[str, str] = {}
    for key, metric in metrics.items():
        if not isinstance(metric, VideoMetric | FrechetPatchDistance):
            raise ValueError(f"metrics.{key}: {type(metric).__name__} is no metric of videos")
        name = metric.name
        if name in keys:
            raise ValueError(f"metrics.{keys[name]} and metrics.{key} are both {name}: switch one off with null")
        keys[name] = key
        if isinstance(metric, VideoMetric) and metric.full_reference and not originals:
            skipped.append(Skipped(name, "compares with originals: give their folder, --reference DIR"))
            continue
        if isinstance(metric, MotionMetric) and not motions:
            skipped.append(Skipped(name, "needs motion videos: generate with --keep_stages true, or give --motion DIR"))
            continue
        if isinstance(metric, VideoMetric) and metric.prompted and not prompts:
            skipped.append(Skipped(name, "needs prompts: --prompts FILE, or a JSON file beside each video"))
            continue
        if isinstance(metric, FrechetPatchDistance) and metric.reference is None and not originals:
            skipped.append(
                Skipped(name, f"has no reference: give --reference DIR, or metrics.{key}.init_args.reference")
            )
            continue
        try:
            ready.append(_prepare(name, metric, device, hashes, cache))
        except Unavailable as reason:
            skipped.append(Skipped(name, " ".join(str(reason).split())))
    return ready, skipped


def _prepare(
    name: str, metric: VideoMetric | FrechetPatchDistance, device: torch.device, hashes: FileHashes, cache: Path
) -> ReadyMetric:
    if isinstance(metric, FrechetPatchDistance):
        if isinstance(metric.reference, str | Path):
            prepare_reference(metric, metric.reference, device, cache)
        else:
            metric.prepare(device)
        identity: dict[str, Any] = {
            "class": type(metric).__qualname__,
            "code": [code_digest(type(part).__module__) for part in (metric, metric.extractor)],
            "patches": asdict(metric.patches),
            "extractor": metric.extractor.name,
        }
        extractor: str | None = metric.extractor.name
    else:
        identity = describe_metric(metric, hashes)  # before anything is loaded
        if isinstance(metric, DataCopying):
            identity |= {"sets": _prepare_sets(metric, device, cache)}
        metric.prepare(device)
        identity |= {"weights": _weights_digest(metric)}
        extractor = None
    identity |= {"decoding": code_digest(_DECODING)}
    better = metric.higher_is_better
    return ReadyMetric(name, metric, digest_of(identity), better, metric.resolution, extractor)


def _prepare_sets(metric: DataCopying, device: torch.device, cache: Path) -> dict[str, str]:
    """Give the metric its sets, files or folders, and say what they are of."""
    found = {}
    for which, source in metric.sets.items():
        statistics = prepare_reference(metric.reader(), source, device, cache)
        metric.use_set(which, statistics)
        found[which] = statistics.source_hash
    return found


def _weights_digest(metric: VideoMetric) -> str | None:
    """SHA-256 of the loaded networks: other weights at the same place give other values."""
    tensors = [*metric.named_parameters(), *metric.named_buffers()]
    if not tensors:
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
