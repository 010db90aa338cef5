"""The average of VBench's five dimensions, as in LuVe's Table 1."""

from __future__ import annotations

from collections.abc import Mapping

VBENCH_DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "imaging_quality",
    "aesthetic_quality",
)


def vbench_average(scores: Mapping[str, float]) -> float:
    """The unweighted mean of SC, BC, TF, IQ and AQ, the column `vbench_average`.

    In the unit of the scores: the metrics give [0, 1], LuVe's Table 1 (arXiv 2602.11564) percent. VBench itself
    (arXiv 2311.17982) has no such average; its quality score rescales and weighs seven dimensions.

    Args:
        scores: scores by column; others are ignored.

    Raises:
        ValueError: one of the five is missing; an average of fewer would be another number.
    """
    missing = [name for name in VBENCH_DIMENSIONS if name not in scores]
    if missing:
        raise ValueError(f"vbench_average needs all five dimensions, missing: {', '.join(missing)}")
    return sum(scores[name] for name in VBENCH_DIMENSIONS) / len(VBENCH_DIMENSIONS)
