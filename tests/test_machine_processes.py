"""Gathering by key, several processes of which are in tests/evaluation and tests/tasks; memory that a process keeps."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from luve_lightning.machine import gather_mappings


def test_without_a_process_group_it_is_the_mapping_in_order() -> None:
    mapping = {(2.0, "b"): 1, (1.5, "z"): 2, (2.0, "a"): 3}
    assert list(gather_mappings(mapping).items()) == [((1.5, "z"), 2), ((2.0, "a"), 3), ((2.0, "b"), 1)]
    assert gather_mappings({}) == {}


_FAULTS = """
import resource, sys
from luve_lightning.machine import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for turn in range(9):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(48 * 2**20)[::4096] = b"x" * (12 * 2**10)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 8)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_memory_that_was_freed_is_used_again() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", _FAULTS, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 0.1 * faults("")
