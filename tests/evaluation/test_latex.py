"""Tables for papers."""

from __future__ import annotations

import pytest

from luve_lightning.evaluation.tables import booktabs, escape


def test_what_means_something_to_latex_is_escaped() -> None:
    assert escape("fd_patch 50% a&b #1 {x}^2 ~ \\") == (
        r"fd\_patch 50\% a\&b \#1 \{x\}\textasciicircum{}2 \textasciitilde{} \textbackslash{}"
    )


def test_a_table_with_rules_and_notes() -> None:
    text = booktabs(["Method", "$n$"], [["a", "1"], ["b", "2"]], ["two\nlines"])
    assert text == (
        "% two lines\n\\begin{tabular}{lr}\n\\toprule\nMethod & $n$ \\\\\n\\midrule\n"
        "a & 1 \\\\\nb & 2 \\\\\n\\bottomrule\n\\end{tabular}\n"
    )
    with pytest.raises(ValueError, match="every row needs 2 cells"):
        booktabs(["Method", "$n$"], [["a"]])
