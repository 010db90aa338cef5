"""The interface of a network that gives features for a Fréchet distance, and moments of its features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from luve_lightning.files import replacing
from luve_lightning.functional.patches import PatchPlan
from luve_lightning.revision import package_version


class FeatureExtractor(nn.Module):
    """Patches to feature vectors, frozen.

    Constructors take configuration values and load nothing; `prepare` does. A subclass defines the methods that
    raise NotImplementedError here.

    Attributes:
        kind: suffix of the column `fd_patch_<kind>`, e.g. "vae"; "inception" is FID's own network.
        resolution: size at which the network sees a patch, in words.
        least_frames: fewest frames of a clip, for a network that sees clips.
    """

    kind: str
    resolution: str
    least_frames: int = 1

    @property
    def name(self) -> str:
        """Identifies the network and its weights, e.g. "inception-clean"; equal names mean comparable features."""
        raise NotImplementedError

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        raise NotImplementedError

    def prepare(self, device: torch.device | str) -> None:
        """Load what is needed, once, and move it to a device.

        Raises:
            Unavailable: a file or a package is missing.
        """
        self.to(device)

    def forward(self, patches: Tensor) -> Tensor:
        """Features of patches; the extractor resizes and normalises them itself.

        Args:
            patches: uint8 N x 3 x S x S, full-range sRGB, on the device given to `prepare`.

        Returns:
            float32 N x D.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stay in evaluation mode: features must not depend on the rest of the batch."""
        return super().train(False)


Network = TypeVar("Network", bound=nn.Module)


class LoadedFeatures(FeatureExtractor, Generic[Network]):
    """A feature extractor whose network and name are known once its weights are loaded.

    A subclass defines `load`, `dim` and `forward`.

    Attributes:
        family: what the name begins with; the first 12 digits of the weights' digest follow.
    """

    family: str

    def __init__(self) -> None:
        super().__init__()
        self._network: Network | None = None
        self._digest = ""

    def load(self) -> tuple[Network, str]:
        """The network, and a digest of its weights; called once."""
        raise NotImplementedError

    @property
    def network(self) -> Network:
        """The network; known after `prepare`."""
        if self._network is None:
            raise RuntimeError(f"{type(self).__name__}: call prepare(device) before it is used")
        return self._network

    @property
    def name(self) -> str:
        """The family and the weights; known after `prepare`."""
        _ = self.network
        return f"{self.family}-{self._digest[:12]}"

    def prepare(self, device: torch.device | str) -> None:
        """Load the network onto a device, as `load` does."""
        if self._network is None:
            self._network, self._digest = self.load()
        self.to(device)


# Outer products of all videos are kept up to this size; above it, they are summed anew from the features.
_KEPT_BYTES = 2**28


@dataclass(frozen=True)
class FeatureMoments:
    """Moments of a set of feature vectors; adding two gives the moments of both sets.

    Attributes:
        count: number of vectors.
        sum: float64, shape (D,).
        outer: sum of f f^T, float64, D x D.
    """

    count: int
    sum: Tensor
    outer: Tensor

    @classmethod
    def zeros(cls, dim: int) -> FeatureMoments:
        """Moments of no vectors of `dim` dimensions."""
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def from_features(cls, features: Tensor) -> FeatureMoments:
        """Moments of N vectors, N x D of any precision.

        Raises:
            ValueError: another shape, or values that are not finite.
        """
        checked_features(features)
        exact = features.detach().to(torch.float64)
        return cls(len(exact), exact.sum(0), exact.T @ exact)

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        return len(self.sum)

    def __add__(self, other: FeatureMoments) -> FeatureMoments:
        if self.dim != other.dim:
            raise ValueError(f"features of {self.dim} and {other.dim} dimensions cannot be put together")
        return FeatureMoments(self.count + other.count, self.sum + other.sum, self.outer + other.outer)

    def mean(self) -> Tensor:
        """The mean, float64, shape (D,).

        Raises:
            ValueError: fewer than 2 vectors.
        """
        self._require_two()
        return self.sum / self.count

    def cov(self) -> Tensor:
        """The covariance with N - 1 in the denominator (like `numpy.cov`), float64, D x D.

        Raises:
            ValueError: fewer than 2 vectors.
        """
        self._require_two()
        return (self.outer - torch.outer(self.sum, self.sum / self.count)) / (self.count - 1)

    def _require_two(self) -> None:
        if self.count < 2:
            raise ValueError(f"{self.count} patches have no covariance: at least 2 are needed")


class GroupedMoments:
    """Features of several videos, for moments under many different weights.

    For the bootstrap over videos: a resample is how often each video was drawn. The Fréchet distance of few
    samples is too large: its bias falls like 1/N (Chong and Forsyth 2020), and below N = D rank is missing. A
    resample holds fewer different videos than the sample, so resampled distances lie above the sample's: their
    spread is that of the distance, their mean is not. Compare only distances of equally many patches.

    Args:
        features: features of each video, N x D; N may differ.

    Raises:
        ValueError: no video, unequal D, or values that are not finite.
    """

    def __init__(self, features: Sequence[Tensor]) -> None:
        if not features:
            raise ValueError("no video to take features from")
        for group in features:
            checked_features(group)
        if len({group.shape[1] for group in features}) > 1:
            raise ValueError("features of videos differ in their number of dimensions")
        self.dim = features[0].shape[1]
        self._lengths = torch.tensor([len(group) for group in features])
        self._rows: Tensor | None = torch.cat([group.detach() for group in features])
        self._sums = torch.stack([group.detach().double().sum(0) for group in features])
        self._outers: Tensor | None = None
        if len(features) * self.dim**2 * 8 <= _KEPT_BYTES:
            self._outers = torch.stack([(group.double().T @ group.double()).flatten() for group in features])
            self._rows = None

    def __len__(self) -> int:
        return len(self._lengths)

    def weighted(self, counts: Sequence[int] | Tensor) -> FeatureMoments:
        """Moments of all videos, the i-th taken `counts[i]` times.

        Args:
            counts: an integer >= 0 for each video.

        Raises:
            ValueError: a wrong number of counts, or other numbers.
        """
        weights = torch.as_tensor(counts)
        if weights.shape != self._lengths.shape or weights.is_floating_point() or (weights < 0).any():
            raise ValueError(f"expected {len(self)} counts, each an integer >= 0")
        exact = weights.double()
        count = int((weights * self._lengths).sum())
        return FeatureMoments(count, exact @ self._sums, self._outer(weights, exact))

    def _outer(self, weights: Tensor, exact: Tensor) -> Tensor:
        if self._outers is not None:
            return (exact @ self._outers).reshape(self.dim, self.dim)
        assert self._rows is not None  # one of the two is kept
        drawn = weights.repeat_interleave(self._lengths)
        total = torch.zeros(self.dim, self.dim, dtype=torch.float64)
        taken = drawn.nonzero().squeeze(1)
        for part in taken.split(4096):  # float64 copies of all features would double their size
            rows = self._rows[part].double() * drawn[part].double().sqrt()[:, None]
            total.addmm_(rows.T, rows)
        return total


def checked_features(features: Tensor) -> Tensor:
    """The features themselves, checked.

    Raises:
        ValueError: not N x D of floating point, or values that are not finite.
    """
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"features must be floating point N x D, got {features.dtype} {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("features hold values that are not finite: the extractor or its input is broken")
    return features


_KEY = "luve_feature_statistics"
_FORMAT = 1


@dataclass(frozen=True)
class FeatureStatistics:
    """Moments of the patches of a reference, and their provenance.

    Attributes:
        moments: moments of the features.
        plan: how the patches were chosen. A still image has one frame, whatever `plan.frames` says.
        extractor: name of the network and its weights.
        source: folder, for people.
        source_hash: sha256 over the names and contents of the folder's files.
        files: number of files.
        package: version of this package that made the statistics.
        path: file it was loaded from, for messages.
        rows: the features themselves, float32, all files' one after another; None where only moments are kept.
        lengths: number of rows of each file.
    """

    moments: FeatureMoments
    plan: PatchPlan
    extractor: str
    source: str
    source_hash: str
    files: int
    package: str = ""
    path: str = ""
    rows: Tensor | None = None
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.package:
            object.__setattr__(self, "package", package_version())

    def check(self, plan: PatchPlan, extractor: str) -> None:
        """Refuse a comparison with features made differently.

        The random patches' seed may differ: it changes which patches, not their kind. The package's version is
        kept, not compared.

        Args:
            plan: the other side's plan.
            extractor: the other side's network.

        Raises:
            ValueError: they differ; one line names each difference.
        """
        wrong = [
            f"patches.{field.name} {mine} there and {other} here"
            for field in fields(PatchPlan)
            if field.name not in self._irrelevant(plan)
            and (mine := getattr(self.plan, field.name)) != (other := getattr(plan, field.name))
        ]
        if self.extractor != extractor:
            wrong.append(f"extractor {self.extractor} there and {extractor} here")
        if wrong:
            name = self.path or f"of {self.source}"
            raise ValueError(
                f"reference statistics {name} do not fit: {'; '.join(wrong)}; make them again from the reference"
            )

    def _irrelevant(self, plan: PatchPlan) -> set[str]:
        """Fields that the placement does not use, and the seed."""
        unused = {"grid": {"per_frame"}, "random": {"grid"}, "both": set()}
        return {"seed"} | (unused[plan.placement] if plan.placement == self.plan.placement else set())

    def save(self, path: str | Path) -> None:
        """Write safetensors with the provenance as JSON in the header; the file is complete or absent."""
        path = Path(path)
        about = {
            "format": _FORMAT,
            "count": self.moments.count,
            "sha256": _digest(self.moments, self.rows),
            "plan": asdict(self.plan),
            **{name: getattr(self, name) for name in ("extractor", "source", "source_hash", "files", "package")},
        }
        tensors = {"sum": self.moments.sum.cpu().contiguous(), "outer": self.moments.outer.cpu().contiguous()}
        if self.rows is not None:
            tensors["rows"] = self.rows.cpu().float().contiguous()
            about["lengths"] = list(self.lengths)
        with replacing(path) as temporary:
            temporary.write_bytes(save(tensors, {_KEY: json.dumps(about, sort_keys=True)}))

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no file.
            ValueError: not a statistics file, or another version of the format.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"reference statistics {path}: no such file")
        try:
            with safe_open(str(path), framework="pt") as file:
                about: dict[str, Any] = json.loads((file.metadata() or {}).get(_KEY, "null"))
                tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"reference statistics {path}: cannot be read ({error})") from error
        if not isinstance(about, dict) or about.get("format") != _FORMAT:
            raise ValueError(f"reference statistics {path}: not a statistics file of format {_FORMAT}")
        try:
            moments = FeatureMoments(about["count"], tensors["sum"], tensors["outer"])
            # Files written before there was a sha256 stay valid.
            if about.get("sha256", "") not in ("", _digest(moments, tensors.get("rows"))):
                raise ValueError(f"reference statistics {path}: damaged (sha256 differs)")
            return cls(
                moments=moments,
                plan=PatchPlan(**about["plan"]),
                path=str(path),
                rows=tensors.get("rows"),
                lengths=tuple(about.get("lengths", ())),
                **{name: about[name] for name in ("extractor", "source", "source_hash", "files", "package")},
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"reference statistics {path}: damaged ({type(error).__name__}: {error})") from error


def _digest(moments: FeatureMoments, rows: Tensor | None) -> str:
    digest = hashlib.sha256(str(moments.count).encode())
    for tensor in (moments.sum, moments.outer, *(() if rows is None else (rows.float(),))):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
