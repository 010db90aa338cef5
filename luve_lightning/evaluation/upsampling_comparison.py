"""Comparison of upsampling methods: scores, tables, and the report in Markdown."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from luve_lightning.cascade.upsampling import LatentUpsampler, baselines
from luve_lightning.evaluation.tables import table_markdown
from luve_lightning.evaluation.upsampled_clips import CEILING as CEILING
from luve_lightning.evaluation.upsampled_clips import DECODED_TOGETHER
from luve_lightning.functional.fidelity import frame_difference_error, psnr, ssim
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.machine import Cost, gather_mappings, measure_ms, measure_peak_mib
from luve_lightning.models.backbones import LatentSpace

ComparisonRows = Sequence[dict[str, Any]]

_NOTES = (
    "latent_l1: against the high-resolution latents. psnr_rgb (dB), ssim, frame_diff: of the decoded video against the "
    "clip's own pixels in [-1, 1]; means over clips. ms, peak_mib: of the step from latents to latents alone, one clip "
    "at a time after a warm-up; median and maximum over the clips that were timed. `vae` decodes the "
    "high-resolution latents themselves (the ceiling; no step to time)."
)


def rows_by_scale(rows: ComparisonRows) -> Iterator[tuple[float, list[dict[str, Any]]]]:
    """Each scale with its rows, without the scale's column."""
    for scale in sorted({row["scale"] for row in rows}):
        yield scale, [{k: v for k, v in row.items() if k != "scale"} for row in rows if row["scale"] == scale]


def gap_shares(rows: ComparisonRows, scale: float, learned: Sequence[str]) -> dict[str, float]:
    """`closed_gap` of each learned method that has one at this scale."""
    shares = {name: closed_gap(rows, scale, name) for name in learned}
    return {name: share for name, share in shares.items() if not math.isnan(share)}


def gap_lines(rows: ComparisonRows, scale: float, learned: Sequence[str]) -> list[str]:
    """The sentence that sums up a scale, for each learned method."""
    return [
        f"{name} closes {100 * share:.1f} % of the PSNR_rgb gap between bilinear and vae at {scale:g}x"
        for name, share in gap_shares(rows, scale, learned).items()
    ]


def report_markdown(rows: ComparisonRows, learned: Sequence[str], facts: Mapping[str, str]) -> str:
    """One table per scale, below the machine and settings of the measurement.

    Args:
        rows: rows of all scales; see `comparison_rows`.
        learned: methods whose share of the gap is reported.
        facts: provenance, listed at the top.
    """
    parts = ["# Upsampling of latents compared", "\n".join(f"- {key}: {value}" for key, value in facts.items())]
    for scale, part in rows_by_scale(rows):
        parts += [f"## {scale:g}x", table_markdown(COLUMNS[1:], part).rstrip()]
        parts += gap_lines(rows, scale, learned)
    return "\n\n".join([*parts, _NOTES]) + "\n"


COLUMNS = ("scale", "method", "latent_l1", "psnr_rgb", "ssim", "frame_diff", "ms", "peak_mib")

Shapes = tuple[torch.Size, Size3d]
"""Sizes of the input latents and of the output."""


@dataclass(frozen=True)
class Fidelity:
    """How close decoded latents are to a clip's own pixels; see functional/fidelity.py."""

    psnr_rgb: float
    ssim: float
    frame_diff: float


@dataclass(frozen=True)
class ClipScore:
    """One method on one clip at one scale.

    Attributes:
        scale: high over low resolution.
        method: its name.
        clip: identifies the clip and its window.
        frames: frames of the clip.
        height: height of its frames in pixels.
        width: width of its frames in pixels.
        latent_l1: mean absolute difference from the high-resolution latents.
        fidelity: fidelity of the decoded latents.
        cost: cost of the step from latents to latents; None where it was not measured.
    """

    scale: float
    method: str
    clip: str
    frames: int
    height: int
    width: int
    latent_l1: float
    fidelity: Fidelity
    cost: Cost | None


class UpsamplingComparison:
    """Runs methods on clips, one clip at a time, and scores them.

    The VAE's own reconstruction is decoded once per clip, whatever the number of scales. It has no upsampling
    step, so its latent L1, time and memory are 0.

    Args:
        codec: the VAE.
        methods: methods by name, in addition to the ceiling.
        timed_clips: for each size of input and output, number of clips on which to time the methods, the first
            ones; memory is measured on the first. The time changes little from clip to clip; the scores cover all
            clips.

    Raises:
        ValueError: when no clip would be timed.
    """

    def __init__(self, codec: LatentSpace, methods: Mapping[str, LatentUpsampler], timed_clips: int = 4) -> None:
        if timed_clips < 1:
            raise ValueError(f"timed_clips: expected at least 1, got {timed_clips}")
        self.codec, self.methods, self.timed_clips = codec, dict(methods), timed_clips
        self._ceilings: dict[str, Fidelity] = {}
        self._peaks: dict[Shapes, dict[str, float]] = {}
        self._timed: Counter[Shapes] = Counter()

    def score_batch(self, batch: Mapping[str, Any]) -> list[ClipScore]:
        """Score every clip of a batch.

        Args:
            batch: "lr" B x C x t x h x w and "hr" B x C x T x H x W, normalised latents; "video", the clips' own
                pixels in [-1, 1]; "scale" (B,); "clip_id", B strings.
        """
        scores = []
        for i, (scale, clip_id) in enumerate(zip(batch["scale"], batch["clip_id"], strict=True)):
            low, high, video = (batch[key][i : i + 1] for key in ("lr", "hr", "video"))
            # Six digits: a scale that went through float32 keeps the value it was given as.
            scores += self.score_clip(low, high, video, round(float(scale), 6), clip_id)
        return scores

    @torch.no_grad()
    def score_clip(self, low: Tensor, high: Tensor, video: Tensor, scale: float, clip_id: str) -> list[ClipScore]:
        """Score one clip.

        Args:
            low: latents to upsample, 1 x C x t x h x w.
            high: what they should become, 1 x C x T x H x W.
            video: the clip's own pixels, 1 x 3 x frames x height x width.
            scale: high over low resolution.
            clip_id: the clip's name.

        Returns:
            One score per method, then the ceiling's.
        """
        # A clip may have several windows, which only their latents distinguish.
        clip = f"{clip_id}:{hashlib.sha256(high.float().cpu().numpy().tobytes()).hexdigest()[:16]}"
        size: Size3d = (high.shape[2], high.shape[3], high.shape[4])
        outputs, costs = self._outputs(low, size)
        fidelities = dict(zip(outputs, self._fidelities(list(outputs.values()), video), strict=True))
        if clip not in self._ceilings:
            [self._ceilings[clip]] = self._fidelities([high], video)
        outputs[CEILING], costs[CEILING], fidelities[CEILING] = high, Cost(0.0, 0.0), self._ceilings[clip]
        frames, height, width = video.shape[2:]
        return [
            ClipScore(
                scale, name, clip, frames, height, width,
                latent_l1=(outputs[name].float() - high.float()).abs().mean(dtype=torch.float64).item(),
                fidelity=fidelities[name],
                cost=costs.get(name),
            )
            for name in outputs
        ]  # fmt: skip

    def _outputs(self, low: Tensor, size: Size3d) -> tuple[dict[str, Tensor], dict[str, Cost]]:
        """Each method's output for a clip and, for timed clips, its cost."""
        shapes = (low.shape, size)
        if self._timed[shapes] == self.timed_clips:
            return {name: method(low, size) for name, method in self.methods.items()}, {}
        self._timed[shapes] += 1
        if shapes not in self._peaks:
            self._peaks[shapes] = {}
            for name, method in self.methods.items():
                method(low, size)  # warms up
                self._peaks[shapes][name] = measure_peak_mib(partial(method, low, size), low.device)
        outputs: dict[str, Tensor] = {}
        costs: dict[str, Cost] = {}
        for name, method in self.methods.items():
            outputs[name], ms = measure_ms(partial(method, low, size), low.device)
            costs[name] = Cost(ms, self._peaks[shapes][name])
        return outputs, costs

    def _fidelities(self, latents: Sequence[Tensor], video: Tensor) -> list[Fidelity]:
        """Decode as many latents at a time as the codec takes in one pass, and compare each with the clip."""
        at_once = min(DECODED_TOGETHER, self.codec.clips_at_once(*video.shape[2:]))
        found = []
        for start in range(0, len(latents), at_once):
            decoded = self.codec.decode(torch.cat([z.float() for z in latents[start : start + at_once]]))
            for one in decoded.split(1):
                values = (measure(one, video).item() for measure in (psnr, ssim, frame_difference_error))
                found.append(Fidelity(*values))
        return found


def method_names(extra: Iterable[str] = ()) -> list[str]:
    """Every row of a table in order: the trained VLUer, further ones, the baselines, the ceiling.

    Args:
        extra: names of further VLUers.

    Raises:
        ValueError: when a further VLUer has the name of another row.
    """
    names = ["vluer", *extra, *baselines(), CEILING]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"extra: {', '.join(twice)}: the comparison has a method of that name already")
    return names


def gather_scores(scores: Sequence[ClipScore]) -> list[ClipScore]:
    """The scores of all processes, on every one of them; every process must call it, even without scores.

    A clip that two processes had (a sampler fills up uneven shards) counts once.
    """
    return list(gather_mappings({(s.scale, s.method, s.clip): s for s in scores}).values())


def comparison_rows(scores: Iterable[ClipScore], methods: Sequence[str]) -> list[dict[str, Any]]:
    """The table: one row per scale and method, in the order of `methods`.

    Args:
        scores: scores of all clips.
        methods: names, in order; those without a score have no row.

    Returns:
        Rows with the keys `COLUMNS`: means over clips, but the median of the time and the maximum of the memory
        over the timed clips.
    """
    groups: dict[tuple[float, str], list[ClipScore]] = {}
    for score in sorted(scores, key=lambda s: s.clip):
        groups.setdefault((score.scale, score.method), []).append(score)
    rows = []
    for scale in sorted({scale for scale, _ in groups}):
        for method in methods:
            group = groups.get((scale, method))
            if group:
                rows.append({"scale": scale, "method": method} | _aggregate(group))
    return rows


def _aggregate(group: Sequence[ClipScore]) -> dict[str, float]:
    fidelity = [asdict(s.fidelity) for s in group]
    means = {name: math.fsum(f[name] for f in fidelity) / len(group) for name in fidelity[0]}
    costs = [s.cost for s in group if s.cost is not None]
    return {
        "latent_l1": math.fsum(s.latent_l1 for s in group) / len(group),
        **means,
        "ms": statistics.median(cost.ms for cost in costs) if costs else math.nan,
        "peak_mib": max((cost.peak_mib for cost in costs), default=math.nan),
    }


def closed_gap(rows: Iterable[Mapping[str, Any]], scale: float, method: str) -> float:
    """Share of the PSNR_rgb gap between `bilinear` and the VAE's own reconstruction that a method closes.

    (PSNR(method) - PSNR(bilinear)) / (PSNR(vae) - PSNR(bilinear)): 0 is no better than bilinear, 1 is the ceiling.
    NaN when one of the three has no row or there is no gap.
    """
    found = {row["method"]: row["psnr_rgb"] for row in rows if row["scale"] == scale}
    if not {method, "bilinear", CEILING} <= set(found):
        return math.nan
    gap = found[CEILING] - found["bilinear"]
    return (found[method] - found["bilinear"]) / gap if gap > 0 else math.nan
