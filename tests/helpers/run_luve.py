"""Runs the `luve` command inside the test process."""

from __future__ import annotations

import re
import sys
import time
import warnings
from dataclasses import dataclass

# Lightning's log handler keeps the stream that standard error is when it is imported: not that of one test.
import lightning.pytorch  # noqa: F401
import pytest

from luve_lightning.__main__ import main

_SLOW = re.compile(r"luve \w+: (.* \.\.\.|first (step|batch) done after .*)")  # on a busy machine; see Phases


@dataclass(frozen=True)
class Outcome:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        """The lines of standard error, without notices: Lightning's of the seed, wandb's, and what takes long."""
        lines = [line for line in self.err.splitlines() if line and not line.startswith("Seed set to")]
        lines = [line for line in lines if not _SLOW.fullmatch(line)]
        return [line for line in lines if "wandb" not in line[:12]]

    def numbers(self, *patterns: str) -> tuple[int, ...]:
        """The number in each of the lines that match, of a command that ended well."""
        assert self.code == 0, self.err
        found = [re.search(rf"^{pattern}$", self.out, re.MULTILINE) for pattern in patterns]
        assert all(found), self.out
        return tuple(int(match[1]) for match in found if match)


def run_luve(capsys: pytest.CaptureFixture[str], *words: object) -> Outcome:
    """Runs `luve` with these words; a bug shows as code 1 with its traceback in `err`."""
    capsys.readouterr()
    with warnings.catch_warnings():
        # Tests run few batches on few cores, which Lightning comments on.
        warnings.filterwarnings("ignore", module="lightning")
        code = main([str(word) for word in words])
    printed = capsys.readouterr()
    if port := sys.modules.get("wandb.sdk.lib.service.service_port_file"):
        vars(port)["_SLEEP"] = lambda seconds: time.sleep(0.01)  # else 0.2 s, at the start of each run's other process
    if "wandb" in sys.modules:
        # What the end of the process does: the next test's logger would write into this one's run, and in this one's
        # environment. `finish` only asks wandb's own process to close the run's file, `teardown` waits for its end.
        sys.modules["wandb"].finish()
        sys.modules["wandb"].teardown()
    return Outcome(code, printed.out, printed.err)
