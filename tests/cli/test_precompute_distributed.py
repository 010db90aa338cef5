"""`luve precompute` on two processes of one run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.precompute_run import PrecomputeRun
from tests.helpers.small_world import write_world

CLIPS = 6
LATENTS = 4 * CLIPS


@pytest.mark.slow
def test_two_distributed_processes_share_the_windows(tmp_path: Path, tiny_backbone: Path) -> None:
    world = write_world(tmp_path, CLIPS)
    log = tmp_path / "log"
    transform = f"{{dark: {{class_path: tests.helpers.recording.Recording, init_args: {{log: {log}}}}}}}"
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", f"--variants={transform}"]
    run = PrecomputeRun(tmp_path, tiny_backbone, world, tmp_path / "store", *options)
    assert run.encoded() == LATENTS
    lines = [line.split() for line in log.read_text().splitlines()]
    by_process = {pid: sum(int(n) for p, n in lines if p == pid) for pid in {p for p, _ in lines}}
    assert sorted(by_process.values()) == [CLIPS // 2, CLIPS // 2], "each window once, half of them each"
    assert run.text().count("encoded") == 1, "one process reports for all"
