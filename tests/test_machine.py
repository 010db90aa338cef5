from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from luve_lightning.machine import UnitTimes, visible_gpus


def test_units_are_timed_from_the_end_of_one_to_the_end_of_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = iter([0.0, 0.0, 10.0, 50.0, 52.0, 55.0, 100.0, 108.0, 110.0])
    monkeypatch.setattr(time, "perf_counter", clock.__next__)
    times = UnitTimes("step")
    times.begin()  # at 10
    times.advance()  # 40 s: the first one
    times.advance()  # 2 s
    times.advance()  # 3 s
    times.begin()  # a validation until 100
    times.advance(2)  # 8 s, two together
    times.write(tmp_path / "new" / "measured.json", step=5)
    assert json.loads((tmp_path / "new" / "measured.json").read_text()) == {
        "unit": "step",
        "done": 5,
        "seconds": 110.0,
        "first_seconds": 40.0,
        "seconds_per_unit": 3.0,
        "peak_gib": None,
        "step": 5,
    }
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["measured.json"]


def test_what_the_later_units_were_spent_on_is_told_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 5.0, 6.0, 10.0, 12.0, 20.0, 27.0, 27.0, 30.0])
    monkeypatch.setattr("luve_lightning.machine.time.perf_counter", lambda: next(now))
    times = UnitTimes("clip")
    times.spend("reading")  # until 5, for the first
    times.advance()
    times.begin()  # at 10
    times.spend("reading")
    times.spend("upsampling")  # until 20
    times.spend("reading")
    times.advance()
    found = times.record()
    assert found["parts"] == {"seconds": 17.0, "reading": 9.0, "upsampling": 8.0}
    assert (found["first_seconds"], found["seconds_per_unit"]) == (6.0, 17.0)


def test_nothing_is_said_of_units_that_were_not(tmp_path: Path) -> None:
    found = UnitTimes("clip").record()
    assert (found["done"], found["first_seconds"], found["seconds_per_unit"]) == (0, None, None)
    UnitTimes("clip").write(None)


def test_gpus_are_listed_without_one_being_touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho NVIDIA H100\necho NVIDIA H100\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for visible, count in ((None, 2), ("1", 1), ("", 0)):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert visible_gpus() == ["NVIDIA H100"] * count
    program.write_text("#!/bin/sh\nexit 9\n")
    assert visible_gpus() == []
