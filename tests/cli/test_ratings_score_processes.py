"""`luve score` as real processes: killed, resumed, side by side, and without what HPS v3's environment lacks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from luve_lightning.data.clip_scores import read_rows
from tests.helpers.luve_process import finish_together
from tests.helpers.renames import kill_before
from tests.helpers.scoring import REPOSITORY, ScoreProcess, captioned_world, recorded, wait_until_recorded

CLIPS, BATCH = 10, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return captioned_world(tmp_path_factory.mktemp("world"), CLIPS)


def scores(folder: Path) -> dict[str, float | None]:
    return {row.clip_id: row.score for row in read_rows(folder)}


@pytest.mark.slow
def test_a_kill_loses_at_most_the_batch_in_hand(tmp_path: Path, world: Path) -> None:
    log, output = tmp_path / "log", tmp_path / "scores"
    killed = partial(kill_before, "*.parquet", 3)
    ScoreProcess(world, output, log, f"--batch_size={BATCH}", prepare=killed).finish(-signal.SIGKILL)
    saved, begun = scores(output), recorded(log)
    assert (len(saved), len(begun)) == (2 * BATCH, 3)
    again = tmp_path / "again"
    printed = ScoreProcess(world, output, again, f"--batch_size={BATCH}").finish()
    assert f"already there  {len(saved)}" in printed
    repeated = {clip for batch in recorded(again) for clip in batch}
    assert not repeated & saved.keys(), "a finished clip was scored again"
    assert len(repeated & {clip for batch in begun for clip in batch}) == BATCH
    ScoreProcess(world, tmp_path / "whole", tmp_path / "log-whole").finish()
    assert scores(output) == scores(tmp_path / "whole")
    assert not list(output.glob(".*")), "the kill left a file behind"


@pytest.mark.slow
def test_torchruns_processes_share_the_clips(tmp_path: Path, world: Path) -> None:
    output = tmp_path / "scores"
    runs = [
        ScoreProcess(
            world,
            output,
            tmp_path / f"log-{rank}",
            f"--batch_size={BATCH}",
            environment={"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for rank, told in enumerate(finish_together(runs)):
        assert f"shard {rank}/2" in told
    clips = [{clip for batch in recorded(tmp_path / f"log-{rank}") for clip in batch} for rank in range(2)]
    assert [len(part) for part in clips] == [CLIPS // 2, CLIPS // 2]
    assert not clips[0] & clips[1]
    assert scores(output).keys() == clips[0] | clips[1]
    assert len(list(output.glob("*.parquet"))) == 2


@pytest.mark.slow
def test_one_shard_is_scored_by_one_process_at_a_time(tmp_path: Path, world: Path) -> None:
    log, output, hold = tmp_path / "log", tmp_path / "scores", tmp_path / "hold"
    hold.touch()
    first = ScoreProcess(world, output, log, f"--batch_size={BATCH}", f"--scorer.hold={hold}")
    wait_until_recorded(log, 1, first)
    try:
        second = ScoreProcess(world, output, tmp_path / "other").finish(2)
        told = f"luve score: error: {output}: another process is scoring shard 0/1: process {first.pid} on"
        assert second.splitlines()[-1].startswith(told)
    finally:
        hold.unlink()
    first.finish()
    assert len(scores(output)) == CLIPS
    assert not list(output.glob(".*")), "the lock goes with the process"


@pytest.mark.slow
def test_it_needs_neither_lightning_nor_diffusers_nor_our_models(tmp_path: Path, world: Path) -> None:
    """What the environment of HPS v3 lacks, or has in a version that does not import."""
    program = (
        "import sys\n"
        "absent = {'lightning', 'pytorch_lightning', 'diffusers', 'transformers', 'peft', 'torchmetrics', 'wandb',\n"
        "          'cleanfid', 'accelerate', 'luve_lightning.models', 'luve_lightning.losses'}\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in absent:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from luve_lightning.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ["score", f"--index={world}", f"--output={tmp_path / 'scores'}"]
    words += ["--scorer=luve_lightning.data.scorers.SharpnessExposure"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=REPOSITORY,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(scores(tmp_path / "scores")) == CLIPS
