"""The average of LuVe's Table 1."""

from __future__ import annotations

import pytest

from luve_lightning.metrics import VBENCH_DIMENSIONS, vbench_average

# SC, BC, TF, IQ, AQ and the average, percent (arXiv 2602.11564, Table 1).
TABLE_1 = {
    "Wan2.1-720p": (95.70, 96.05, 98.45, 68.28, 56.46, 82.98),
    "UltraWan-4K": (95.81, 96.11, 97.71, 71.44, 57.69, 83.75),
    "CineScale-4K": (95.16, 95.95, 97.80, 67.74, 57.82, 82.89),
    "LuVe-2K": (95.83, 96.76, 98.18, 71.15, 59.78, 84.34),
    "LuVe-4K": (95.36, 96.46, 98.09, 71.33, 58.91, 84.03),
}


@pytest.mark.parametrize("model", TABLE_1)
def test_the_papers_rows(model: str) -> None:
    *scores, average = TABLE_1[model]
    named = dict(zip(VBENCH_DIMENSIONS, scores, strict=True)) | {"niqe": 3.0}
    assert vbench_average(named) == pytest.approx(average, abs=0.0101)
    fractions = {name: value / 100 for name, value in named.items()}
    assert vbench_average(fractions) == pytest.approx(average / 100, abs=1.01e-4)


def test_an_average_of_fewer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^vbench_average needs all five .* missing: temporal_flickering$"):
        vbench_average(dict.fromkeys(set(VBENCH_DIMENSIONS) - {"temporal_flickering"}, 0.5))
