"""`luve generate` as real processes: killed and resumed, sharing a prompt file, sharing a video."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from luve_lightning.datasets.video_files import read_video
from tests.helpers.generate_process import finish, start_generate
from tests.helpers.processes import free_port

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
    return [f"--{key}={value}" for key, value in options.items()]


def finished(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.json")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in folder.glob("*.mp4")}


def kill_when(condition: Callable[[], bool], process: BaseProcess, log: Path) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < end
        time.sleep(0.002)
    process.kill()
    process.join(60)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, words: list[str]) -> None:
    log, out, whole = tmp_path / "log", tmp_path / "out", tmp_path / "whole"
    finish(log, start_generate(log, *words, f"--output={whole}"))
    victim = start_generate(log, *words, f"--output={out}")
    kill_when(lambda: len(finished(out)) >= 2, victim, log)
    done = finished(out)
    assert 2 <= len(done) < COUNT
    times = {name: (out / f"{name}.mp4").stat().st_mtime_ns for name in done}
    # What a kill leaves that strikes while a video is being written, and one between a video and its JSON file.
    missing, other = sorted(contents(whole).keys() - done)[:2]
    (out / f".{missing}.mp4.99999.tmp").write_bytes(b"half")
    (out / f"{other}.mp4").write_bytes(b"whole, but nothing says so")
    second = tmp_path / "second"
    finish(second, start_generate(second, *words, f"--output={out}"))
    assert f"written        {COUNT - len(done)} videos" in second.read_text()
    assert f"already there  {len(done)}" in second.read_text()
    assert {name: (out / f"{name}.mp4").stat().st_mtime_ns for name in done} == times
    assert contents(out) == contents(whole)
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == [".claims"]


def test_a_kept_stage_outlives_a_kill(tmp_path: Path, words: list[str]) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    options = [*words, "--keep_stages=true", "--lossless=true", "--steps=40", "--skip_steps=0"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red boat")
    victim = start_generate(log, *options, f"--output={out}")
    kill_when(lambda: len(list(out.glob("latents/*/*.safetensors"))) >= 1, victim, log)
    assert not finished(out)
    finish(log, start_generate(log, *options, f"--output={out}"))
    about = json.loads(next(out.glob("*.json")).read_text())
    assert about["stages"][0]["stage"] == "motion"
    assert about["stages"][0]["seconds"] is None
    assert about["stages"][2]["seconds"] is not None
    finish(log, start_generate(log, *options, f"--output={tmp_path / 'whole'}"))
    assert contents(out) == contents(tmp_path / "whole")


def test_torchruns_processes_share_the_prompts(tmp_path: Path, words: list[str]) -> None:
    out = tmp_path / "out"
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    processes = [
        start_generate(
            log,
            *words,
            "--steps=12",
            f"--output={out}",
            environment={"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
        )
        for rank, log in enumerate(logs)
    ]
    finish(logs[0], *processes)
    made = [[line for line in log.read_text().splitlines() if ".mp4  " in line] for log in logs]
    assert len(made[0]) + len(made[1]) == COUNT, "one video was made twice, or not at all"
    assert made[0], made
    assert made[1], made
    assert len(finished(out)) == COUNT
    assert all(
        f"already there  {COUNT - len(lines)}" in log.read_text()
        for lines, log in zip(made, logs, strict=True)
    )


def test_two_processes_make_one_video(tmp_path: Path, tiny_cascade: Path, words: list[str]) -> None:
    log, one, two = tmp_path / "log", tmp_path / "one", tmp_path / "two"
    (tmp_path / "prompts.txt").write_text("a red boat\ncalm water")
    options = [*words, "--lossless=true", "--keep_stages=true", f"--experts={tiny_cascade / 'experts'}"]
    finish(log, start_generate(log, *options, f"--output={one}"))
    port = str(free_port())
    processes = [
        start_generate(
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
    finish(log, *processes)
    assert finished(one) == finished(two)
    for name in finished(one):
        first, second = (read_video(folder / f"{name}.mp4")[0].astype(int) for folder in (one, two))
        assert np.abs(first - second).max() <= 1, "the same video to rounding"
    assert log.read_text().count("written        2 videos") == 2, "the second process wrote nothing"
