"""p-values of a table's directions, and their correction."""

from __future__ import annotations

import pytest
from scipy.stats import ttest_1samp

from luve_lightning.ablations.output import holm, p_value
from luve_lightning.ablations.results import power_record, t_interval


def test_the_p_value_is_that_of_a_paired_t_test() -> None:
    values = [0.3, -0.1, 0.8, 0.5, 0.2]
    found = t_interval(values)
    assert p_value(found.mean, found.low, found.seeds) == pytest.approx(ttest_1samp(values, 0).pvalue, rel=1e-9)
    assert p_value(1.0, 1.0, 3) == 0
    assert p_value(0.0, 0.0, 3) == 1
    with pytest.raises(ValueError, match="two seeds"):
        p_value(1.0, 0.0, 1)


def test_holms_correction_of_his_kind_of_example() -> None:
    # By hand: 4 x 0.005, 3 x 0.01, then 2 x 0.03, which 1 x 0.04 may not fall below.
    assert holm({"c": 0.03, "a": 0.01, "d": 0.04, "b": 0.005}) == pytest.approx(
        {"c": 0.06, "a": 0.03, "d": 0.06, "b": 0.02}
    )
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_a_tables_directions_are_corrected_metric_by_metric() -> None:
    def line(row: str, metric: str, values: list[float], paper: float | None) -> dict[str, object]:
        found = t_interval(values)
        return {
            "row": row, "metric": metric, "seeds": found.seeds, "difference": found.mean, "difference_low": found.low,
            "paper_difference": paper, "direction": "same" if paper else "", "would_see": 0.1,
        }  # fmt: skip

    first, second = [0.3, -0.1, 0.8, 0.5, 0.2], [0.3, 0.2, 0.4, 0.3, 0.2]
    rows = [line("a", "x", first, 1.0), line("b", "x", second, 1.0), line("c", "x", second, None)]
    rows += [line("a", "y", first, None), line("b", "y", first, None)]
    found = power_record(rows, "full")["rows"]
    p = ttest_1samp(first, 0).pvalue
    assert found["a"]["x"]["p"] == pytest.approx(p)
    assert found["a"]["x"]["p_holm"] == pytest.approx(p)  # the larger of two
    assert found["b"]["x"]["p_holm"] == pytest.approx(2 * ttest_1samp(second, 0).pvalue)
    assert "p_holm" not in found["c"]["x"], "the paper says nothing of it"
    assert found["a"]["y"]["p_holm"] == found["b"]["y"]["p_holm"] == pytest.approx(2 * p)
