"""`luve generate` as real processes: killed and resumed, sharing a prompt file, sharing a video."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from luve_lightning.data.video_files import read_video
from tests.helpers.luve_process import LuveProcess, finish_together
from tests.helpers.processes import free_port
from tests.helpers.renames import before_rename, kill_before
from tests.helpers.waiting import wait_for

pytestmark = pytest.mark.slow

COUNT = 5


@pytest.fixture
def words(tiny_cascade: Path, tmp_path: Path) -> list[str]:
    """Videos of a few steps, of as many prompts as COUNT."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"boat {n}" for n in range(COUNT)))
    options = {
        "backbone": tiny_cascade / "wan",
        "vluer": tiny_cascade / "vluer",
        "prompts": prompts,
        "height": 64,
        "width": 96,
        "num_frames": 5,
        "steps": 4,
        "skip_steps": 1,
        "device": "cpu",
    }
    return ["generate", *(f"--{key}={value}" for key, value in options.items())]


def finished(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.json")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in folder.glob("*.mp4")}


def run_until_killed(log: Path, *words: str, before: str, number: int) -> None:
    LuveProcess(log, *words, prepare=partial(kill_before, before, number)).finish(-signal.SIGKILL)


def meet(folder: Path, rank: int) -> None:
    """This process's first video is finished when the other process has come to its own."""

    def wait() -> None:
        (folder / f"rank-{rank}").touch()
        assert wait_for(lambda: len(list(folder.glob("rank-*"))) == 2)

    before_rename("*.mp4", 1, wait)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, words: list[str]) -> None:
    log, out, whole = tmp_path / "log", tmp_path / "out", tmp_path / "whole"
    LuveProcess(log, *words, f"--output={whole}").finish()
    run_until_killed(log, *words, f"--output={out}", before="*/out/boat*.json", number=3)
    done = finished(out)
    assert len(done) == 2
    times = {name: (out / f"{name}.mp4").stat().st_mtime_ns for name in done}
    # What a kill leaves that strikes while a video is being written, and one between a video and its JSON file.
    missing, other = sorted(contents(whole).keys() - done)[:2]
    (out / f".{missing}.mp4.99999.tmp").write_bytes(b"half")
    (out / f"{other}.mp4").write_bytes(b"whole, but nothing says so")
    second = tmp_path / "second"
    LuveProcess(second, *words, f"--output={out}").finish()
    assert f"written        {COUNT - len(done)} videos" in second.read_text()
    assert f"already there  {len(done)}" in second.read_text()
    assert {name: (out / f"{name}.mp4").stat().st_mtime_ns for name in done} == times
    assert contents(out) == contents(whole)
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == [".claims"]


def test_a_kept_stage_outlives_a_kill(tmp_path: Path, words: list[str]) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    options = [*words, "--keep_stages=true", "--lossless=true"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red boat")
    run_until_killed(log, *options, f"--output={out}", before="*/latents/*.safetensors", number=2)
    assert len(list(out.glob("latents/*/*.safetensors"))) == 1
    assert not finished(out)
    LuveProcess(log, *options, f"--output={out}").finish()
    about = json.loads(next(out.glob("*.json")).read_text())
    assert about["stages"][0]["stage"] == "motion"
    assert about["stages"][0]["seconds"] is None
    assert about["stages"][2]["seconds"] is not None
    LuveProcess(log, *options, f"--output={tmp_path / 'whole'}").finish()
    assert contents(out) == contents(tmp_path / "whole")


def test_torchruns_processes_share_the_prompts(tmp_path: Path, words: list[str]) -> None:
    out = tmp_path / "out"
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    processes = [
        LuveProcess(
            log,
            *words,
            f"--output={out}",
            environment={"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
            prepare=partial(meet, tmp_path, rank),
        )
        for rank, log in enumerate(logs)
    ]
    finish_together(processes)
    made = [[line for line in log.read_text().splitlines() if ".mp4  " in line] for log in logs]
    assert len(made[0]) + len(made[1]) == COUNT, "one video was made twice, or not at all"
    assert made[0], made
    assert made[1], made
    assert len(finished(out)) == COUNT
    assert all(f"already there  {COUNT - len(lines)}" in log.read_text() for lines, log in zip(made, logs, strict=True))


def test_two_processes_make_one_video(tmp_path: Path, tiny_cascade: Path, words: list[str]) -> None:
    log, one, two = tmp_path / "log", tmp_path / "one", tmp_path / "two"
    (tmp_path / "prompts.txt").write_text("a red boat\ncalm water")
    options = [*words, "--lossless=true", "--keep_stages=true", f"--experts={tiny_cascade / 'experts'}"]
    LuveProcess(log, *options, f"--output={one}").finish()
    port = str(free_port())
    processes = [
        LuveProcess(
            log,
            *options,
            f"--output={two}",
            "--context_parallel=2",
            environment={
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for rank in range(2)
    ]
    finish_together(processes)
    assert finished(one) == finished(two)
    for name in finished(one):
        first, second = (read_video(folder / f"{name}.mp4")[0].astype(int) for folder in (one, two))
        assert np.abs(first - second).max() <= 1, "the same video to rounding"
    assert log.read_text().count("written        2 videos") == 2, "the second process wrote nothing"
