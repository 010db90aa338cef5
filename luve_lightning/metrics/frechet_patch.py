"""Fréchet distance between patches, and FID_patch on Inception features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from luve_lightning.functional.patches import FrechetTarget, PatchPlan, cut_patches
from luve_lightning.metrics.base import VideoMetric, check_frames
from luve_lightning.metrics.feature_moments import FeatureExtractor, FeatureMoments, FeatureStatistics, checked_features
from luve_lightning.metrics.frame_networks import InceptionFeatures


class FrechetPatchDistance(Metric):
    """Squared Fréchet distance of patch features to those of a reference; lower is better.

    Memory is one sum of outer products, however many videos there are. Sums run over processes, so uneven or empty
    shares of the videos change nothing. Everything is float64, whatever the module is cast to.

    The distance of few patches is too large: its bias falls like 1/N (Chong and Forsyth 2020, arXiv 1911.07023),
    and covariances of fewer patches than features are singular. Compare only numbers of equally many patches.

    Args:
        patches: which patches of which frames.
        extractor: the network. The column is `fid_patch` for clean-fid's Inception and `fd_patch_<kind>` for any
            other, so that nobody takes it for FID.
        reference: statistics or their file (of a folder of images or videos, see
            evaluation/prepared_metrics.py); None when only `features` are needed, or `use_reference` follows.
        batch_size: patches per forward pass of the network.
        kernel: whether `luve evaluate` also has the column `kernel_name`, whose mean does not depend on the number of
            videos (evaluation/bootstrap.py); the reference then keeps its features.
        against: what the reference is, at the end of the column's name; for a second one.
    """

    is_differentiable: bool | None = False
    higher_is_better: bool | None = False
    full_state_update: bool | None = False
    feature_count: Tensor
    feature_sum: Tensor
    feature_outer: Tensor
    _counted = "patches"  # what has a feature vector, in words

    def __init__(
        self,
        patches: PatchPlan,
        extractor: FeatureExtractor,
        reference: FeatureStatistics | Path | str | None = None,
        batch_size: int = 64,
        kernel: bool = False,
        against: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: expected an integer >= 1")
        self.kernel, self.against = kernel, against
        self.extractor = extractor.requires_grad_(False).eval()
        self.patches, self.batch_size, self.reference = patches, batch_size, reference
        self._target: FrechetTarget | None = None
        self._prepared = False

    @property
    def name(self) -> str:
        """The column of a table."""
        is_fid = isinstance(self.extractor, InceptionFeatures)
        return self._against("fid_patch" if is_fid else f"fd_patch_{self.extractor.kind}")

    def _against(self, name: str) -> str:
        return f"{name}_{self.against}" if self.against else name

    @property
    def kernel_name(self) -> str:
        """The column of the kernel distance of the same features: `kd_` instead of `fd_`."""
        return f"kd_{self.name.removeprefix('fd_').removeprefix('fid_')}"

    @property
    def resolution(self) -> str:
        """The network's input size, in words."""
        size = self.patches.size
        return f"patches of {size}x{size} at native resolution, seen at {self.extractor.resolution}"

    def prepare(self, device: torch.device | str) -> None:
        """Load the network and the reference, once, and move everything to a device.

        Raises:
            Unavailable: the network's file is missing.
            FileNotFoundError: the reference's file is missing.
            ValueError: the reference was made differently.
        """
        self.extractor.prepare(device)
        if not self._prepared:
            zeros = FeatureMoments.zeros(self.extractor.dim)
            self.add_state("feature_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
            self.add_state("feature_sum", zeros.sum, dist_reduce_fx="sum")
            self.add_state("feature_outer", zeros.outer, dist_reduce_fx="sum")
            self._prepared = True
        self.to(device)
        if self.reference is not None and self._target is None:
            self.use_reference(self.reference)

    def reader(self) -> FrechetPatchDistance:
        """Another metric of the same features, without videos, for the statistics of a folder."""
        return FrechetPatchDistance(self.patches, self.extractor, kernel=self.kernel)

    def use_reference(self, reference: FeatureStatistics | Path | str) -> None:
        """Compare with this reference from now on; call after `prepare`, which does it for the constructor's.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it was made from other patches or by another network.
        """
        if not isinstance(reference, FeatureStatistics):
            if Path(reference).is_dir():
                raise ValueError(
                    f"{self.name}: reference {reference} is a folder; give the statistics that "
                    "luve_lightning.evaluation.prepared_metrics makes of it"
                )
            reference = FeatureStatistics.load(reference)
        reference.check(self.patches, self.extractor.name)
        if self.kernel and reference.rows is None:
            name = reference.path or f"of {reference.source}"
            raise ValueError(
                f"{self.kernel_name}: reference statistics {name} hold no features; make them again with kernel true"
            )
        self.reference = reference
        # The reference stays on the CPU, where distances are computed, a second each for 2048 features.
        self._target = FrechetTarget.of(reference.moments.mean().cpu(), reference.moments.cov().cpu())

    def features(self, frames: Tensor, key: str = "") -> Tensor:
        """Features of a video's patches.

        Args:
            frames: uint8 T x H x W x 3, on any device.
            key: what random patches are drawn for, e.g. the video's name.

        Returns:
            float32 N x D on the CPU, frame by frame.

        Raises:
            ValueError: unsuitable frames, or smaller than a patch.
        """
        return self._features(frames, key).cpu()

    def _features(self, frames: Tensor, key: str) -> Tensor:
        self._require_prepared()
        check_frames(frames, self.name)
        total, height, width, _ = frames.shape
        places = self.patches.places(total, height, width, key)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            parts = [
                self.extractor(cut_patches(frames, part, self.patches.size).to(self.device)).float()
                for part in places.split(self.batch_size)
            ]
        return checked_features(torch.cat(parts))

    def update(self, frames: Tensor, key: str = "") -> None:
        """Add a video, see `features`."""
        self.add(self._features(frames, key))

    def add(self, features: Tensor) -> None:
        """Add a video's features, see `features`."""
        features = features.double()
        self.feature_count += len(features)
        self.feature_sum += features.sum(0)
        self.feature_outer.addmm_(features.T, features)

    @property
    def moments(self) -> FeatureMoments:
        """Moments of this process's videos."""
        self._require_prepared()
        return FeatureMoments(int(self.feature_count), self.feature_sum.clone(), self.feature_outer.clone())

    def compute(self) -> Tensor:
        """The distance of all processes' videos to the reference, float64.

        Raises:
            ValueError: fewer than 2 patches, or no reference.
        """
        return torch.tensor(self.distance(self.moments), dtype=torch.float64)

    def distance(self, moments: FeatureMoments) -> float:
        """Distance of these moments to the reference, e.g. for a resample (`GroupedMoments`).

        Raises:
            ValueError: fewer than 2 patches, or no reference.
        """
        if self._target is None:
            raise ValueError(f"{self.name}: nothing to compare with; give a reference and call prepare(device)")
        if moments.count < 2:
            raise ValueError(f"{self.name}: needs at least 2 {self._counted}, got {moments.count}")
        return self._target.distance(moments.mean().cpu(), moments.cov().cpu())

    def train(self, mode: bool = True) -> FrechetPatchDistance:
        """Stay in evaluation mode: networks that measure are never trained."""
        return super().train(False)

    def _require_prepared(self) -> None:
        if not self._prepared:
            raise RuntimeError(f"{self.name}: call prepare(device) before it is used")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> nn.Module:
        # Moves, but never casts: neither the float64 states nor the network.
        device = fn(torch.zeros(1, device=self.device)).device
        return super()._apply(lambda tensor: tensor.to(device), exclude_state)


class FrechetClipDistance(FrechetPatchDistance):
    """Squared Fréchet distance of whole clips, a feature vector each, as FVD (Unterthiner et al. 2018) has it.

    Unlike patches, clips show motion. There are few of them: compare equally many, or read the kernel's column.

    Args:
        extractor: the network; its `forward` takes clips, uint8 B x T x H x W x 3. The column is `fd_<kind>`.
        frames: longer videos are cut to their first so many, so that motion is seen at one speed.
        reference: see `FrechetPatchDistance`.
        kernel: see `FrechetPatchDistance`.
        against: see `FrechetPatchDistance`.
    """

    _counted = "clips"

    def __init__(
        self,
        extractor: FeatureExtractor,
        frames: int = 17,
        reference: FeatureStatistics | Path | str | None = None,
        kernel: bool = True,
        against: str = "",
        **kwargs: Any,
    ) -> None:
        # The plan is what statistics are compared by.
        super().__init__(PatchPlan(size=1, frames=frames), extractor, reference, 1, kernel, against, **kwargs)

    def reader(self) -> FrechetPatchDistance:
        """See `FrechetPatchDistance`."""
        return FrechetClipDistance(self.extractor, self.patches.frames, kernel=self.kernel)

    @property
    def name(self) -> str:
        """The column of a table."""
        return self._against(f"fd_{self.extractor.kind}")

    @property
    def resolution(self) -> str:
        """The network's input size, in words."""
        return f"clips of {self.patches.frames} frames, seen at {self.extractor.resolution}"

    def _features(self, frames: Tensor, key: str) -> Tensor:
        self._require_prepared()
        check_frames(frames, self.name, self.extractor.least_frames)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            found = self.extractor(frames[: self.patches.frames][None].to(self.device)).float()
        return checked_features(found)


class DataCopying(VideoMetric):
    """How often a video is nearer to its nearest training clip than an unseen real clip is to its own.

    The statistic of the test of Meehan, Chaudhuri and Dasgupta (2020, arXiv 2004.05675), Mann and Whitney's U over the
    number of pairs: for each video, the share of unseen clips that are farther from their nearest training clip, ties
    half. About 0.5 for videos as new as the unseen clips, towards 1 for copies of training clips, towards 0 for videos
    unlike any. Nothing says that nearer to 0 or 1 is better.

    Args:
        extractor: the network, see `FrechetClipDistance`.
        training: statistics with features of the training clips, or their folder.
        unseen: of real clips that were not trained on; they should be as much like the training clips as a perfect
            model's videos would be.
        frames: see `FrechetClipDistance`.
    """

    name = "data_copying"
    higher_is_better = None

    def __init__(
        self, extractor: FeatureExtractor, training: Path | str, unseen: Path | str, frames: int = 17, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.extractor = extractor.requires_grad_(False).eval()
        self.sets: dict[str, Path] = {"training": Path(training), "unseen": Path(unseen)}
        self.frames, self.least_frames = frames, extractor.least_frames
        self._rows: dict[str, Tensor] = {}
        self._distances: Tensor | None = None

    @property
    def resolution(self) -> str:  # type: ignore[override]
        """The network's input size, in words."""
        return f"clips of {self.frames} frames, seen at {self.extractor.resolution}"

    def reader(self) -> FrechetClipDistance:
        """What makes statistics of a folder for this metric."""
        return FrechetClipDistance(self.extractor, self.frames)

    def use_set(self, which: str, statistics: FeatureStatistics) -> None:
        """Compare with these from now on, "training" or "unseen"; without it `load` reads files.

        Raises:
            ValueError: they hold no features, or were made differently.
        """
        reader = self.reader()
        reader.use_reference(statistics)
        assert statistics.rows is not None
        self._rows[which] = statistics.rows
        self._distances = None

    def load(self) -> None:
        """Load the network, and the sets that are files.

        Raises:
            Unavailable: the network's file is missing.
            FileNotFoundError: a set is missing.
        """
        self.extractor.prepare(self.device)
        for which in self.sets.keys() - self._rows.keys():
            self.use_set(which, FeatureStatistics.load(self.sets[which]))
        if self._distances is None:
            self._distances = _nearest(self._rows["unseen"], self._rows["training"])

    def measure(self, frames: Tensor, reference: Tensor | None) -> Tensor:
        """The share of unseen clips that are farther from training."""
        assert self._distances is not None
        own = self.extractor(frames[: self.frames][None].to(self.device)).float().cpu()
        distance = _nearest(own, self._rows["training"])
        return ((self._distances > distance).double() + (self._distances == distance).double() / 2).mean()


def _nearest(videos: Tensor, clips: Tensor) -> Tensor:
    """The distance of each video's features to the nearest of the clips'."""
    return torch.cdist(videos.double(), clips.double()).amin(1)


PAPER_PATCHES = PatchPlan()


class FIDPatch(FrechetPatchDistance):
    """FID of patches (LuVe, arXiv 2602.11564, Tables 5 and 6): lower is better.

    8 frames of each of 250 videos, 256x256 patches, clean-fid's resize and Inception; the paper's reference is
    UltraHR-eval4k's still images. The paper does not say how many patches of a frame, or where: here a grid covers
    the frame (`PatchPlan`). See `FrechetPatchDistance` for what can be compared.

    Args:
        patches: which patches of which frames.
        weights: Inception's file or its folder; None for the usual places (`WeightFile.find`).
        reference: see `FrechetPatchDistance`.
        batch_size: see `FrechetPatchDistance`.
    """

    def __init__(
        self,
        patches: PatchPlan = PAPER_PATCHES,
        weights: str | Path | None = None,
        reference: FeatureStatistics | Path | str | None = None,
        batch_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(patches, InceptionFeatures(weights), reference, batch_size, **kwargs)
