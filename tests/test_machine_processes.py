"""Gathering by key; several processes are in tests/evaluation and tests/tasks."""

from __future__ import annotations

from luve_lightning.machine import gather_mappings


def test_without_a_process_group_it_is_the_mapping_in_order() -> None:
    mapping = {(2.0, "b"): 1, (1.5, "z"): 2, (2.0, "a"): 3}
    assert list(gather_mappings(mapping).items()) == [((1.5, "z"), 2), ((2.0, "a"), 3), ((2.0, "b"), 1)]
    assert gather_mappings({}) == {}
