"""`luve precompute` on two processes of one run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.luve_process import finish_together
from tests.helpers.precompute_run import PrecomputeRun
from tests.helpers.processes import free_port
from tests.helpers.small_world import write_world

CLIPS = 6
LATENTS = 4 * CLIPS


@pytest.mark.slow
def test_two_distributed_processes_share_the_windows(tmp_path: Path, tiny_backbone: Path) -> None:
    world = write_world(tmp_path, CLIPS)
    log = tmp_path / "log"
    transform = f"{{dark: {{class_path: tests.helpers.recording.Recording, init_args: {{log: {log}}}}}}}"
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", f"--variants={transform}"]
    port = str(free_port())
    runs = []
    for rank in ("0", "1"):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": "0", "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        runs.append(
            PrecomputeRun(tmp_path, tiny_backbone, world, tmp_path / "store", *options, environment=environment)
        )
    _, second = finish_together(runs)
    assert runs[0].encoded() == LATENTS
    assert "encoded" not in second, "one process reports for all"
    lines = [line.split() for line in log.read_text().splitlines()]
    by_process = {pid: sum(int(n) for p, n in lines if p == pid) for pid in {p for p, _ in lines}}
    assert sorted(by_process.values()) == [CLIPS // 2, CLIPS // 2], "each window once, half of them each"
