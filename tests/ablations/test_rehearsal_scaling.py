"""Rehearsals on several numbers of GPUs side by side, against sums written out here."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from luve_lightning.ablations.rehearsal_scaling import (
    check_alike,
    read_rehearsal,
    scaling_lines,
    scaling_rows,
    write_scaling,
)
from luve_lightning.ablations.rehearsal_table import RehearsalRow

FACTS = {
    "of": "wan2.1-1.3b, 2k, windows",
    "gpu": "H100",
    "versions": "torch 2.11.0",
    "python": "3.12.3",
    "video_devices": "1",
    "clips": "clips",
    "revision": "abc",
}


def written(folder: Path, devices: int, *rows: RehearsalRow, **facts: Any) -> Path:
    """A rehearsal's folder."""
    path = folder / f"{devices}-{facts.get('video_devices', 1)}"
    path.mkdir()
    content = {**FACTS, "devices": str(devices), **facts, "rows": [asdict(row) for row in rows]}
    (path / "rehearsal.json").write_text(json.dumps(content))
    return path


def step(devices: int, seconds: float | None, **values: Any) -> RehearsalRow:
    return RehearsalRow("lfe", "done", unit="step", processes=devices, measured_seconds=seconds, **values)


def clip(devices: int, seconds: float) -> RehearsalRow:
    """Seconds of one GPU for a clip."""
    rate = devices / seconds
    return RehearsalRow("precompute-vluer", "done", unit="clip", processes=devices, measured_seconds=seconds, rate=rate)


def video(gpus: int, seconds: float) -> RehearsalRow:
    return RehearsalRow("generate: refined", "done", unit="refined", processes=gpus, measured_seconds=seconds)


def test_the_efficiency_is_the_share_of_so_many_times_one_gpus_pace(tmp_path: Path) -> None:
    parts = {"data": 0.02, "compute": 0.9, "communication": 0.06, "waiting": 0.016, "optimizer": 0.004}
    alone = {"data": 0.045, "compute": 0.95, "communication": 0.0, "waiting": 0.0, "optimizer": 0.005}
    embed = RehearsalRow("embed", "done", unit="caption", processes=1, measured_seconds=0.02, rate=50.0)
    folders = [
        written(tmp_path, 4, clip(4, 5.2), embed, step(4, 6.25, parts=parts, planned_gib=50.0, measured_gib=60.0)),
        written(
            tmp_path,
            1,
            clip(1, 5.0),
            embed,
            step(1, 5.0, planned_gib=50.0, measured_gib=55.0, parts=alone),
            video(1, 80.0),
        ),
        written(tmp_path, 2, clip(2, 5.0), embed, step(2, None), video(1, 81.0)),
        written(tmp_path, 1, video(4, 25.0), video_devices="4"),
    ]
    found = [read_rehearsal(folder) for folder in folders]
    assert check_alike(found) == []
    rows = scaling_rows(found)
    assert [(row.stage, row.gpus) for row in rows] == [
        *(("precompute-vluer", gpus) for gpus in (1, 2, 4)),
        *(("lfe", gpus) for gpus in (1, 2, 4)),
        *(("generate: refined", gpus) for gpus in (1, 4)),
    ]
    efficiencies = [1.0, 1.0, 5.0 / 5.2, 1.0, None, 0.8, 1.0, 80 / (4 * 25)]
    assert [row.efficiency for row in rows] == [one if one is None else pytest.approx(one) for one in efficiencies]
    assert [row.rate for row in rows[:4]] == [0.2, 0.4, 4 / 5.2, None]
    write_scaling(tmp_path, rows, ["a note"], {"title": "Scaling", "gpu": "H100"})
    page = (tmp_path / "scaling.md").read_text()
    shares = "compute 90%, communication 6%, data 2%, waiting 2%"
    longer = "compute 18%, communication 8%, waiting 2%, data -2%"
    assert f"| lfe | 4 |  | 6.25 a step |  | 50.0 / 60.0, missed | 80% | {shares} | {longer} |" in page
    assert rows[5].beyond is not None
    assert sum(rows[5].beyond.values()) == pytest.approx(6.25 / 5 - 1), "all that it takes longer"
    assert "| lfe | 1 |  | 5 a step |  | 50.0 / 55.0 | 100% | compute 95%, data 4% |  |" in page
    assert "- a note" in page
    assert json.loads((tmp_path / "scaling.json").read_text())["rows"] == [asdict(row) for row in rows]
    console = Console(file=io.StringIO(), width=200)
    for line in scaling_lines(rows, ["a note"]):
        console.print(line)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "0.769" in shown
    assert "25 a video" in shown


def test_what_cannot_be_compared_is_refused_and_what_differs_besides_is_named(tmp_path: Path) -> None:
    one = read_rehearsal(written(tmp_path, 1, step(1, 5.0)))
    for number, (key, value, told) in enumerate(
        [
            ("gpu", "H200", "ran on H100, .* ran on H200"),
            ("versions", "torch 2.12.1", "ran with torch 2.11.0, .* ran with torch 2.12.1"),
            ("of", "wan2.1-1.3b, 2k, dense", "is of wan2.1-1.3b, 2k, windows, .* is of wan2.1-1.3b, 2k, dense"),
        ]
    ):
        other = read_rehearsal(written(tmp_path, 10 + number, step(2, 5.0), **{key: value}))
        with pytest.raises(ValueError, match=told):
            check_alike([one, other])
    twin = read_rehearsal(written(tmp_path / "1-1", 1, step(1, 5.0)))
    with pytest.raises(ValueError, match=r"1-1/rehearsal.json and .* both have devices 1, video_devices 1"):
        check_alike([one, twin])
    with pytest.raises(ValueError, match="none of them has a stage on several GPUs"):
        scaling_rows([one])
    two = read_rehearsal(written(tmp_path, 2, step(2, 5.0), clips="others", revision="abd"))
    assert check_alike([one, two]) == [
        "not all have the same clips: clips with devices 1, video_devices 1; others with devices 2, video_devices 1",
        "not all have the same revision: abc with devices 1, video_devices 1; abd with devices 2, video_devices 1",
    ]


def test_what_is_no_rehearsal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*/rehearsal.json; expected a folder of luve rehearse"):
        read_rehearsal(tmp_path)
    other = tmp_path / "other.json"
    other.write_text('{"rows": [{"stage": "lfe", "speed": 3}]}')
    with pytest.raises(ValueError, match=r"other.json is no table of this version of luve rehearse$"):
        read_rehearsal(other)
    old = json.loads((written(tmp_path, 2, step(2, 5.0)) / "rehearsal.json").read_text())
    del old["gpu"], old["devices"]
    other.write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"of this version of luve rehearse; it does not say gpu, devices$"):
        read_rehearsal(other)
    for devices in ("two", "0", "9" * 5000, 2):
        other.write_text(json.dumps({**old, "gpu": "H100", "devices": devices}))
        with pytest.raises(ValueError, match=r"other.json: devices is '?\w+'?; expected a number above 0 as a text$"):
            read_rehearsal(other)
    other.write_text(json.dumps(old)[:40])
    with pytest.raises(
        ValueError, match=r"^rehearsals: .*other.json: not JSON: .*; expected a folder of luve rehearse$"
    ):
        read_rehearsal(other)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("measured_seconds", "5 s", "measured_seconds of lfe is '5 s'; expected a number of at least 0 or null"),
        ("measured_gib", [60], r"measured_gib of lfe is \[60\]; expected a number of at least 0 or null"),
        ("measured_seconds", -1, "measured_seconds of lfe is -1; expected a number of at least 0 or null"),
        ("planned_gib", True, "planned_gib of lfe is True; expected a number of at least 0 or null"),
        ("rate", float("nan"), "rate of lfe is nan; expected a number of at least 0 or null"),
        ("rate", 10**400, "rate of lfe is 10+; expected a number of at least 0 or null"),
        ("processes", "2", "processes of lfe is '2'; expected a whole number above 0 or null"),
        ("processes", -2, "processes of lfe is -2; expected a whole number above 0 or null"),
        ("parts", {"data": "half"}, "data of lfe is 'half'; expected a number or null"),
        ("parts", "none", "parts of lfe is 'none'; expected a number or null"),
        ("stage", ["lfe"], r"stage of \['lfe'\] is \['lfe'\]; expected a text"),
    ],
)
def test_a_table_that_was_edited_into_nonsense_is_refused(tmp_path: Path, key: str, value: Any, told: str) -> None:
    file = written(tmp_path, 2, step(2, 5.0, parts={"data": 0.1})) / "rehearsal.json"
    content = json.loads(file.read_text())
    content["rows"][0][key] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"^rehearsals: {file}: {told}$"):
        read_rehearsal(file)
