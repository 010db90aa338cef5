"""A run folder has one owner, and keeps what an earlier run left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from luve_lightning.commands.run_folder import LOCK, owned, set_aside
from tests.helpers.run_luve import run_luve

_HOLDS = """
import sys, time
from pathlib import Path
from luve_lightning.files import locked
with locked(Path(sys.argv[1]), what="x"):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def held_by_another_process(folder: Path) -> Iterator[int]:
    """As a live run holds its folder; yields its process id."""
    with subprocess.Popen([sys.executable, "-c", _HOLDS, folder / LOCK], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


@pytest.fixture
def config(tmp_path: Path) -> list[str]:
    file = tmp_path / "run.yaml"
    file.write_text(f"""
trainer:
  {{default_root_dir: {tmp_path / "run"}, max_steps: 2, accelerator: cpu, enable_progress_bar: false}}
model: {{class_path: tests.helpers.tiny.TinyModule}}
data: {{class_path: tests.helpers.tiny.TinyData}}
callbacks: {{keep: {{class_path: luve_lightning.callbacks.Checkpoints}}}}
""")
    return ["--config", str(file)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_live_runs_folder_is_refused_untouched_and_may_be_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: list[str]
) -> None:
    run = tmp_path / "run"
    assert run_luve(capsys, "fit", *config).code == 0
    assert not (run / LOCK).exists()
    saved = contents(run)
    with held_by_another_process(run) as pid:
        lock = contents(run).pop(LOCK)
        for resume in ((), ("--ckpt_path", "last")):
            refused = run_luve(capsys, "fit", *config, *resume)
            assert refused.code == 2
            [line] = refused.error_lines
            assert line.startswith(f"luve fit: error: run folder {run} is in use by process {pid} on ")
            assert line.endswith(": wait for that run to end, or choose another trainer.default_root_dir")
        assert contents(run) == saved | {LOCK: lock}
        for verb in ("validate", "test", "predict"):
            outcome = run_luve(capsys, verb, *config, "--ckpt_path", "last")
            assert outcome.code == 0, outcome.err
        assert saved.items() <= contents(run).items()
    assert run_luve(capsys, "fit", *config, "--ckpt_path", "last").code == 0


def test_a_folder_of_checkpoints_elsewhere_is_owned_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: list[str]
) -> None:
    folder = tmp_path / "elsewhere"
    with held_by_another_process(folder) as pid:
        refused = run_luve(capsys, "fit", *config, "--callbacks.keep.folder", folder)
    assert refused.code == 2
    assert f"error: checkpoint folder {folder} is in use by process {pid} on " in refused.error_lines[-1]


def test_a_refused_run_leaves_no_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: list[str]
) -> None:
    assert run_luve(capsys, "fit", *config, "--model.lr", "-1").code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variable", ["NODE_RANK", "GROUP_RANK"])
def test_only_the_first_process_of_a_run_holds_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    with owned(tmp_path):
        monkeypatch.setenv(variable, "1")
        with owned(tmp_path):
            assert (tmp_path / LOCK).read_text().startswith(f'{{"pid": {os.getpid()}, ')


def test_an_earlier_runs_checkpoints_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert set_aside(folder) is None
    folder.mkdir()
    assert set_aside(folder) is None
    for number in (1, 2):
        folder.mkdir(exist_ok=True)
        (folder / "last.ckpt").write_bytes(bytes([number]))
        assert set_aside(folder) == tmp_path / f"checkpoints-{number}"
        assert not folder.exists()
    assert (tmp_path / "checkpoints-1" / "last.ckpt").read_bytes() == b"\x01"
    assert (tmp_path / "checkpoints-2" / "last.ckpt").read_bytes() == b"\x02"
