"""The report of a comparison of upsampling methods: its tables in words and Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from luve_lightning.evaluation.tables import table_markdown
from luve_lightning.evaluation.upsampling_comparison import COLUMNS, closed_gap

Rows = Sequence[dict[str, Any]]

_NOTES = (
    "latent_l1: against the high-resolution latents. psnr_rgb (dB), ssim, frame_diff: of the decoded video against the "
    "clip's own pixels in [-1, 1]; means over clips. ms, peak_mib: of the step from latents to latents alone, one clip "
    "at a time after a warm-up; median and maximum over the clips that were timed. `vae` decodes the "
    "high-resolution latents themselves (the ceiling; no step to time)."
)


def rows_by_scale(rows: Rows) -> Iterator[tuple[float, list[dict[str, Any]]]]:
    """Each scale with its rows, without the column of the scale."""
    for scale in sorted({row["scale"] for row in rows}):
        yield scale, [{k: v for k, v in row.items() if k != "scale"} for row in rows if row["scale"] == scale]


def gap_shares(rows: Rows, scale: float, learned: Sequence[str]) -> dict[str, float]:
    """`closed_gap` of each learned method that has one at this scale."""
    shares = {name: closed_gap(rows, scale, name) for name in learned}
    return {name: share for name, share in shares.items() if not math.isnan(share)}


def gap_lines(rows: Rows, scale: float, learned: Sequence[str]) -> list[str]:
    """The sentence that sums a scale up, for each learned method."""
    return [
        f"{name} closes {100 * share:.1f} % of the PSNR_rgb gap between bilinear and vae at {scale:g}x"
        for name, share in gap_shares(rows, scale, learned).items()
    ]


def report_markdown(rows: Rows, learned: Sequence[str], facts: Mapping[str, str]) -> str:
    """One table for each scale under what it was measured on and with.

    Args:
        rows: of all scales; see `comparison_rows`.
        learned: methods whose share of the gap is told.
        facts: provenance, listed at the top.
    """
    parts = [
        "# Upsampling of latents compared",
        "\n".join(f"- {key}: {value}" for key, value in facts.items()),
    ]
    for scale, part in rows_by_scale(rows):
        parts += [f"## {scale:g}x", table_markdown(COLUMNS[1:], part).rstrip()]
        parts += gap_lines(rows, scale, learned)
    return "\n\n".join([*parts, _NOTES]) + "\n"
