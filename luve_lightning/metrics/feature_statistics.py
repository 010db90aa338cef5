"""Statistics of reference features in a file, with their provenance."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from luve_lightning.files import replacing
from luve_lightning.functional.patches import PatchPlan
from luve_lightning.metrics.feature_moments import FeatureMoments

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
    """

    moments: FeatureMoments
    plan: PatchPlan
    extractor: str
    source: str
    source_hash: str
    files: int
    package: str = ""
    path: str = ""

    def __post_init__(self) -> None:
        if not self.package:
            object.__setattr__(self, "package", version("luve-lightning"))

    def check(self, plan: PatchPlan, extractor: str, source_hash: str | None = None) -> None:
        """Refuse a comparison with features made differently.

        The random patches' seed may differ: it changes which patches, not their kind. The package's version is
        kept, not compared.

        Args:
            plan: the other side's plan.
            extractor: the other side's network.
            source_hash: hash of the folder as it is now, if known.

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
        if source_hash is not None and source_hash != self.source_hash:
            wrong.append(
                f"files of {self.source} (sha256 {self.source_hash[:12]} there, {source_hash[:12]} now)"
            )
        if wrong:
            name = self.path or f"of {self.source}"
            raise ValueError(
                f"reference statistics {name} do not fit: {'; '.join(wrong)}; make them anew from the reference"
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
            "sha256": _digest(self.moments),
            "plan": asdict(self.plan),
            **{
                name: getattr(self, name)
                for name in ("extractor", "source", "source_hash", "files", "package")
            },
        }
        tensors = {"sum": self.moments.sum.cpu().contiguous(), "outer": self.moments.outer.cpu().contiguous()}
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
            if about.get("sha256", "") not in ("", _digest(moments)):
                raise ValueError(f"reference statistics {path}: damaged (sha256 differs)")
            return cls(
                moments=moments,
                plan=PatchPlan(**about["plan"]),
                path=str(path),
                **{name: about[name] for name in ("extractor", "source", "source_hash", "files", "package")},
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"reference statistics {path}: damaged ({type(error).__name__}: {error})"
            ) from error


def _digest(moments: FeatureMoments) -> str:
    digest = hashlib.sha256(str(moments.count).encode())
    for tensor in (moments.sum, moments.outer):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
