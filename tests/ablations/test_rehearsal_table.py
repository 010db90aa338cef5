"""The table of a rehearsal, against sums written out here."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from luve_lightning.ablations.rehearsal_stage import RehearsalStage, StageResult
from luve_lightning.ablations.rehearsal_table import markdown, rehearsal_rows, terminal_lines, write_table
from luve_lightning.cascade.generation_jobs import StageLatents

FACTS = {"title": "A rehearsal", "date": "2026-11-26", "device": "2 x H100"}


def record(**values: Any) -> dict[str, Any]:
    return {"unit": "step", "first_seconds": None, "seconds_per_unit": None, "peak_gib": None, **values}


def plan(root: Path, name: str, **values: Any) -> None:
    folder = root / "stages" / name
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(values))


def test_a_training_stands_beside_its_plan_and_is_projected(tmp_path: Path) -> None:
    stage = RehearsalStage("lfe", "fit", unit="step", units=3000, steps=4, gpus=2)
    before = record(began=0, step=2, first_seconds=40.0, seconds_per_unit=7.0, peak_gib=60.5)
    after = record(began=2, step=4, first_seconds=12.0, seconds_per_unit=6.0, peak_gib=61.0)
    result = StageResult("lfe", "luve fit", "done", seconds=[50.0, 31.5], records=[before, after], stopped=True)
    result.bytes = 17 * 10**9
    plan(tmp_path, "lfe", seconds_per_unit=6.2, first_use_seconds=35.0, peak_gib=62.0)
    [row] = rehearsal_rows([stage], {"lfe": result}, tmp_path)
    assert (row.planned_seconds, row.planned_first, row.planned_gib) == (6.2, 35.0, 62.0)
    assert row.measured_seconds == (7.0 + 6.0) / 2
    assert row.measured_first == 40.0 - 6.5
    assert row.measured_gib == 61.0
    assert row.rate == 1 / 6.5
    assert row.gpu_hours == 6.5 * 3000 * 2 / 3600
    after["processes"] = 1
    [row] = rehearsal_rows([stage], {"lfe": result}, tmp_path)
    assert row.gpu_hours == 6.5 * 3000 / 3600, "it was measured on one, in an earlier rehearsal in this folder"
    assert row.terabytes == 0.017
    assert row.seconds == 81.5
    assert row.resumed == "at step 2 of 4"


def test_a_plan_that_misses_by_more_than_it_may_is_named(tmp_path: Path) -> None:
    # Planned and measured seconds and GiB, and what is missed.
    cases = {
        "met": (0.75, 1.0, 11.5, 10.0, []),
        "slow": (0.74, 1.0, 10.0, 10.0, ["seconds"]),
        "fast": (1.26, 1.0, 8.4, 10.0, ["seconds", "GiB"]),
        "unmeasured": (1.0, None, None, 10.0, None),
    }
    stages = [RehearsalStage(name, "fit", unit="step", units=10) for name in cases]
    results = {}
    for name, (seconds, took, gib, peak, _) in cases.items():
        plan(tmp_path, name, seconds_per_unit=seconds, peak_gib=gib)
        results[name] = StageResult(name, status="done", records=[record(seconds_per_unit=took, peak_gib=peak)])
    rows = rehearsal_rows(stages, results, tmp_path)
    assert {row.stage: row.missed for row in rows} == {name: case[-1] for name, case in cases.items()}
    page = markdown(rows, results, FACTS)
    sentence = (
        "planned within 25% of the measured seconds and 15% of the GiB: 1 of 3 rows; "
        "misses: slow (seconds), fast (seconds and GiB)"
    )
    assert f"\n{sentence}.\n" in page
    assert sentence in terminal_lines(rows, results, FACTS)
    [header, _, *lines] = [line for line in page.splitlines() if line.startswith("|")]
    column = [cell.strip() for cell in header.split("|")].index("plan")
    assert [line.split("|")[column].strip() for line in lines] == [
        "met",
        "misses seconds",
        "misses seconds and GiB",
        "",
    ]


def test_a_process_counts_by_the_steps_that_it_measured(tmp_path: Path) -> None:
    stage = RehearsalStage("vluer-1", "fit", unit="step", units=100, steps=40)
    before = record(began=0, step=2, done=2, first_seconds=3.0, seconds_per_unit=0.11)
    after = record(began=2, step=40, done=38, first_seconds=1.0, seconds_per_unit=0.2)
    result = StageResult("vluer-1", "luve fit", "done", seconds=[9.0, 9.0], records=[before, after], stopped=True)
    [row] = rehearsal_rows([stage], {"vluer-1": result}, tmp_path)
    assert row.measured_seconds == pytest.approx((1 * 0.11 + 37 * 0.2) / 38)


def test_what_all_processes_took_stands_in_their_row(tmp_path: Path) -> None:
    fit = RehearsalStage("lfe", "fit", unit="step", units=3000, steps=6, gpus=2)
    ranks = [{"compute": 7.0, "peak_gib": 60.0}, {"compute": 7.4, "peak_gib": 61.5}]
    parts = {"seconds": 8.0, "data": 0.02, "compute": 7.2, "communication": 0.6, "waiting": 0.18, "ranks": ranks}
    took = record(done=4, processes=2, seconds_per_unit=7.9, peak_gib=60.5, parts=parts)
    encode = RehearsalStage("precompute", "precompute", unit="clip", units=20_000)
    parts = {"seconds": 10.0, "reading": 1.0, "encoding": 8.0, "writing": 0.0, "waiting": 1.0, "ranks": []}
    encoded = record(processes=2, units=6, seconds_per_unit=4.0, rate=0.5, parts=parts)
    results = {
        "lfe": StageResult("lfe", "luve fit", "done", seconds=[60.0], records=[took]),
        "precompute": StageResult("precompute", "luve precompute", "done", seconds=[60.0], records=[encoded]),
    }
    training, clips = rehearsal_rows([fit, encode], results, tmp_path)
    assert training.parts == pytest.approx({"data": 0.0025, "compute": 0.9, "communication": 0.075, "waiting": 0.0225})
    assert (training.processes, training.measured_gib, training.rate) == (2, 61.5, 1 / 7.9)
    assert (clips.processes, clips.rate) == (2, 0.5)
    assert clips.gpu_hours == 4.0 * 20_000 / 3600
    page = markdown([training, clips], results, FACTS)
    assert "| compute 90%, communication 8%, waiting 2% |" in page
    assert "| encoding 80%, reading 10%, waiting 10% |" in page


def test_a_training_that_was_interrupted_again_says_no_step_that_it_does_not_know(tmp_path: Path) -> None:
    stage = RehearsalStage("lfe", "fit", unit="step", units=3000, steps=4)
    before = record(began=0, step=2, done=2, seconds_per_unit=7.0)
    result = StageResult("lfe", status="interrupted", seconds=[9.0, 3.0], records=[before, {}], stopped=True)
    [row] = rehearsal_rows([stage], {"lfe": result}, tmp_path)
    assert row.resumed == "stopped"


def test_data_are_projected_by_what_a_clip_takes(tmp_path: Path) -> None:
    stage = RehearsalStage("precompute", "precompute", unit="clip", units=20_000)
    last = record(units=6, total=48, there=8, made=40, bytes=40 * 10**6, seconds_per_unit=4.5)
    result = StageResult("precompute", status="done", seconds=[20.0, 40.0], records=[{}, last], stopped=True)
    [row] = rehearsal_rows([stage], {"precompute": result}, tmp_path)
    assert row.gpu_hours == 4.5 * 20_000 / 3600
    # Eight latents of a megabyte for each clip.
    assert row.terabytes == pytest.approx(8 * 1e6 * 20_000 / 1e12)
    assert row.resumed == "with 8 of 48"
    assert (row.planned_seconds, row.planned_gib) == (None, None), "without a plan nothing is guessed"


def test_a_videos_stages_are_those_of_the_run_that_made_them(tmp_path: Path) -> None:
    """A resumed video measures only the later ones; the others' seconds are kept with their latents."""
    folder = tmp_path / "videos"
    motion = {"stage": "motion", "seconds": 110.0, "peak_gib": 5.0, "latents": [16, 13, 90, 160]}
    StageLatents(folder / "latents").put("ab" * 32, {"latents": torch.zeros(2)}, motion)
    upsampled = {"stage": "upsampled", "seconds": 0.15, "peak_gib": 12.0, "latents": [16, 13, 184, 320]}
    reused = {"stage": "motion", "seconds": None, "peak_gib": None, "latents": [16, 13, 90, 160]}
    refined = {"stage": "refined", "seconds": 180.0, "peak_gib": 12.0, "latents": [16, 13, 184, 320]}
    (folder / "fox.json").write_text(json.dumps({"stages": [reused, upsampled, refined]}))
    stage = RehearsalStage("generate", "generate", unit="video", gives={"videos": str(folder)})
    stages = [
        {"stage": "text", "seconds": 0.1, "peak": 2**30},
        {"stage": "upsample", "made_as": "upsampled", "seconds": 0.04, "first_use_seconds": 0, "peak": 12 * 2**30},
        {"stage": "refine", "made_as": "refined", "seconds": 190.0, "first_use_seconds": 40.0, "peak": 13 * 2**30},
    ]
    plan(tmp_path, "generate", stages=stages)
    result = StageResult("generate", status="done", seconds=[130.0, 200.0], records=[{}, {}], stopped=True)
    rows = {row.stage: row for row in rehearsal_rows([stage], {"generate": result}, tmp_path)}
    assert list(rows) == ["generate", "generate: motion", "generate: upsampled", "generate: refined"]
    assert (rows["generate: motion"].measured_seconds, rows["generate: motion"].measured_gib) == (110.0, 5.0)
    assert (rows["generate: refined"].planned_seconds, rows["generate: refined"].planned_gib) == (190.0 + 40.0, 13.0)
    assert rows["generate: refined"].missed == ["seconds"], "what was measured holds the first use, too"
    assert rows["generate: upsampled"].missed == [], "seconds of so short a part are not compared"
    assert rows["generate: motion"].missed is None
    assert rows["generate"].seconds == 330.0


def test_the_page_and_the_terminal_say_what_failed_and_what_is_left_out_of_the_sum(tmp_path: Path) -> None:
    stages = [
        RehearsalStage("embed", "embed", unit="caption", units=3600),
        RehearsalStage("adaptation", "fit", unit="step", units=10),
        RehearsalStage("lfe", "fit", unit="step", units=10),
    ]
    results = {
        "embed": StageResult(
            "embed", "luve embed", "done", records=[record(seconds_per_unit=2.0)], note="by [one] GPU"
        ),
        "adaptation": StageResult("adaptation", "luve fit", "failed", code=2, lines=["CUDA out of memory | 80 GiB"]),
        "lfe": StageResult("lfe", status="needs", note="needs adaptation"),
    }
    rows = rehearsal_rows(stages, results, tmp_path)
    page = markdown(rows, results, FACTS)
    console = Console(width=160, record=True, file=io.StringIO())
    for line in terminal_lines(rows, results, FACTS):
        console.print(line, markup=False)
    for text in (page, console.export_text()):
        assert "2.0 GPU-hours" in text
        assert "without adaptation, lfe" in text
        assert "adaptation: failed, exit status 2" in text
        assert "CUDA out of memory | 80 GiB" in text
        assert "lfe: needs; needs adaptation" in text
        assert "embed: by [one] GPU" in text
    assert "| embed | ok |" in page
    assert "- device: 2 x H100" in page
    write_table(tmp_path, rows, results, FACTS)
    written = json.loads((tmp_path / "rehearsal.json").read_text())
    assert [row["stage"] for row in written["rows"]] == ["embed", "adaptation", "lfe"]
    assert written["stages"][1]["lines"] == ["CUDA out of memory | 80 GiB"]
    assert (tmp_path / "rehearsal.md").read_text() == page
