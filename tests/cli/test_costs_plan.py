"""`luve plan` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.run_luve import run_luve

SIZE = ("--height", 192, "--width", 192, "--num_frames", 17)


@pytest.fixture
def backbone(repository: Path) -> str:
    return str(repository / "data/mini/wan")


@pytest.mark.slow
def test_prints_a_table_and_writes_json(
    capsys: pytest.CaptureFixture[str], backbone: str, repository: Path, tmp_path: Path
) -> None:
    file = tmp_path / "new" / "plan.json"
    options = ["--vluer", repository / "data/mini/vluer", "--gpu", "h200", "--tile", "[12,12]", "--output", file]
    options += ["--guidance.high", 0.5, "--refine_guidance.scale", 1]
    outcome = run_luve(capsys, "plan", "--backbone", backbone, *SIZE, *options)
    assert outcome.code == 0, outcome.err
    assert "refine    5x24x24" in outcome.out
    assert "peak" in outcome.out
    found = json.loads(file.read_text())
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert stages["motion"]["latents"] == [5, 12, 12]
    assert stages["motion"]["tokens"] == 180
    assert stages["refine"]["tokens"] == 720
    assert stages["refine"]["steps"] == stages["refine"]["forwards"] == 45
    assert 50 < stages["motion"]["forwards"] < 100
    assert found["motion_frames_height_width"] == [17, 96, 96]
    assert found["seconds"] > 0


@pytest.mark.slow
def test_steps_are_the_samplers(capsys: pytest.CaptureFixture[str], backbone: str, tmp_path: Path) -> None:
    """Euler's first sigma is 1, UniPC's a millionth less: above that, one guided step of 50 or none."""
    found = {}
    for sampler in ("backbone", "euler"):
        options = ["--guidance.low", 0.9999995, "--upsampling", "latent", "--sampler", sampler]
        outcome = run_luve(capsys, "plan", "--backbone", backbone, *SIZE, *options, "--output", tmp_path / "plan.json")
        assert outcome.code == 0, outcome.err
        plan = json.loads((tmp_path / "plan.json").read_text())
        assert plan["sampler"] == sampler
        found[sampler] = next(stage["forwards"] for stage in plan["stages"] if stage["stage"] == "motion")
    assert found == {"backbone": 50, "euler": 51}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--height", 200, *SIZE[2:]), "height 200: expected a multiple of 16, nearest are 192 and 208"),
        ((*SIZE[:4], "--num_frames", 16), "num_frames 16: expected 4k + 1, nearest are 13 and 17"),
        ((*SIZE, "--motion_height", 100), "motion_height 100: expected a multiple of 16"),
        ((*SIZE, "--motion_height", 256, "--motion_width", 256), "larger than the video's 192x192"),
        ((*SIZE, "--tile", "[0,4]"), "tile: expected"),
        ((*SIZE, "--speed.cache", "taylorseer"), "speed.cache: taylorseer skips work"),
        ((*SIZE, "--attention", "Nothing"), "attention"),
        ((*SIZE, "--prompt", "a boat"), "prompt: unknown key"),
        ((*SIZE, "--gpu", "k80"), "gpu: expected h200"),
        ((*SIZE, "--gpu", "/missing"), "gpu: no such file: /missing; expected h200 or a file"),
        ((*SIZE, "--vluer", "/nowhere"), "vluer /nowhere: no config.json there"),
        ((*SIZE, "--skip_steps", 51), "skip_steps 51"),
        ((*SIZE, "--sampler", "heun"), "sampler"),
    ],
)  # fmt: skip
def test_one_line_for_what_is_impossible(
    capsys: pytest.CaptureFixture[str], backbone: str, options: tuple[object, ...], message: str
) -> None:
    outcome = run_luve(capsys, "plan", "--backbone", backbone, *options)
    assert outcome.code == 2
    [line] = outcome.error_lines
    assert message in line


def test_a_file_is_no_folder_for_a_plan(capsys: pytest.CaptureFixture[str], repository: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    target = tmp_path / "file" / "plan.json"
    outcome = run_luve(capsys, "plan", "--config", repository / "experiments/score/mini.yaml", "--output", target)
    assert outcome.code == 2
    assert outcome.error_lines == [f"luve plan: error: {target}: Not a directory"]


def test_a_backbone_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_luve(capsys, "plan", "--backbone", "nobody/nothing", *SIZE)
    assert outcome.code == 2
    [line] = outcome.error_lines
    assert "backbone nobody/nothing: no such folder" in line


@pytest.mark.slow
def test_beside_a_video_whose_first_stages_were_kept(
    capsys: pytest.CaptureFixture[str], backbone: str, repository: Path, tmp_path: Path
) -> None:
    stages = {
        "motion": (12, None, None),
        "upsampled": (24, None, None),
        "refined": (24, 2.0, 8.0),
        "decoded": (24, 1.0, 0.5),
    }
    made = {
        "stages": [
            {"stage": name, "latents": [16, 5, side, side], "seconds": seconds, "peak_gib": peak}
            for name, (side, seconds, peak) in stages.items()
        ],
        "steps": [{"stage": "refined"}] * 45,
    }
    record = tmp_path / "video.json"
    record.write_text(json.dumps(made))
    words = ["--vluer", repository / "data/mini/vluer", "--gpu", "h200", "--made", record]
    outcome = run_luve(capsys, "plan", "--backbone", backbone, *SIZE, *words)
    assert outcome.code == 0, outcome.err
    table = outcome.out.partition("planned s")[2].splitlines()[1:]
    rows = {line.split()[0]: line.split()[1:] for line in table}
    assert list(rows) == ["motion", "upsample", "refine", "decode", "together"]
    assert rows["motion"][1:3] == rows["upsample"][1:3] == ["-", "-"]
    assert (rows["refine"][1], rows["refine"][4], rows["together"][1]) == ("2.00", "8.00", "3.00")
    assert sum(float(rows[name][0]) for name in ("refine", "decode")) == pytest.approx(
        float(rows["together"][0]), abs=0.011
    ), "what was kept took no time that a plan could be compared with"
    planned, took, error = rows["refine"][:3]
    assert float(error.rstrip("%")) == pytest.approx(100 * (float(planned) / float(took) - 1), abs=0.5)
    record.write_text('{"stages": [{"stage": "motion", "latents": 5, "seconds": "fast"}]}')
    outcome = run_luve(capsys, "plan", "--backbone", backbone, *SIZE, *words)
    assert (outcome.code, "made: expected the record that luve generate writes" in outcome.error_lines[-1]) == (2, True)
    record.write_text("{}")
    outcome = run_luve(capsys, "plan", "--backbone", backbone, *SIZE, *words)
    assert outcome.code == 2
    assert outcome.error_lines[-1].endswith("the plan has motion [5, 12, 12] in 50 steps, the video's record no stages")


@pytest.mark.slow
def test_a_picture_is_planned(capsys: pytest.CaptureFixture[str], repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    words = ["--backbone", repository / "data/mini/wan", "--vluer", repository / "data/mini/vluer", *SIZE[:4]]
    outcome = run_luve(capsys, "plan", *words, "--num_frames", 1, "--output", file)
    assert outcome.code == 0, outcome.err
    stages = {stage["stage"]: stage for stage in json.loads(file.read_text())["stages"]}
    assert stages["motion"]["latents"] == [1, 12, 12]
    assert stages["refine"]["tokens"] == 144
    assert stages["upsample"]["latents"] == stages["decode"]["latents"] == [1, 24, 24]


@pytest.mark.slow
def test_a_configuration_of_generate_is_planned(
    capsys: pytest.CaptureFixture[str], repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(repository)
    changed = ("--steps", 30, "--skip_steps", 5, "--shift", 5, "--output", tmp_path / "videos")
    outcome = run_luve(capsys, "plan", "--config", "experiments/generate/mini.yaml", *changed)
    assert outcome.code == 0, outcome.err
    assert "experts: 8 steps lfe, 17 steps hfe" in outcome.out
    assert outcome.out.splitlines()[-1].startswith(f"nothing is written to {tmp_path / 'videos'}")
    assert not (tmp_path / "videos").exists()
    outcome = run_luve(capsys, "plan", "--config", "experiments/generate/mini.yaml", *changed, "--switch", 0.75)
    assert "experts: 14 steps lfe, 11 steps hfe" in outcome.out, "from sigma 0.75 on, instead of 0.875"


@pytest.mark.slow
def test_a_speed_that_was_measured_gives_times(
    capsys: pytest.CaptureFixture[str], backbone: str, tmp_path: Path
) -> None:
    file = tmp_path / "speed.jsonl"
    measured = run_luve(capsys, "bench", "--subject", "speed", "--device", "cpu", "--repeats", 1, "--output", file)
    assert measured.code == 0, measured.err
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    first = {row["of"]: row["seconds"] for row in rows if row["kind"] == "first use"}
    assert first.keys() == {"compiler", "forward", "training"}
    timed = [row for row in rows if row["kind"] in ("first use", "host")]
    assert all(row.get("tflops", row.get("tb_per_second")) > 0 for row in rows if row not in timed)
    assert {row["of"] for row in timed if row["kind"] == "host" and row["seconds"] > 0} == {"operation", "step"}
    plan = ("plan", "--backbone", backbone, *SIZE, "--gpu", file)
    outcome = run_luve(capsys, *plan)
    assert outcome.code == 0, outcome.err
    assert "on one cpu, without loading" in outcome.out
    assert "first use" not in outcome.out
    outcome = run_luve(capsys, *plan, "--speed.compile", "true", "--output", tmp_path / "plan.json")
    assert "of it for first uses" in outcome.out
    stages = {stage["stage"]: stage for stage in json.loads((tmp_path / "plan.json").read_text())["stages"]}
    assert stages["motion"]["first_use_seconds"] == pytest.approx(first["compiler"] + first["forward"])
    assert stages["refine"]["first_use_seconds"] == first["forward"]


@pytest.mark.slow
def test_an_attention_by_name_and_compiled_blocks(
    capsys: pytest.CaptureFixture[str], backbone: str, repository: Path, tmp_path: Path
) -> None:
    kind = "luve_lightning.models.attention.windows.Windows"
    windows = ("--attention", kind, "--attention.cuts", "[[1, 2, 2]]", "--attention.dense_above", 0.9)
    models = ("--backbone", backbone, "--refiner", repository / "data/mini/refiner")
    seconds = {}
    for name, options in {"dense": (), "windows": windows, "compiled": ("--speed.compile", "true")}.items():
        file = tmp_path / f"{name}.json"
        outcome = run_luve(capsys, "plan", *models, *SIZE, *options, "--gpu", "h200", "--output", file)
        assert outcome.code == 0, outcome.err
        plan = json.loads(file.read_text())
        stages = {stage["stage"]: stage for stage in plan["stages"]}
        assert stages["motion"]["attention"] == {"dense": 50}
        assert stages["refine"]["attention"] == ({"dense": 13, "Windows": 32} if name == "windows" else {"dense": 45})
        assert [list(one["attention"]) for one in plan["forward_passes"]] == [
            ["dense"], *([["Windows"]] if name == "windows" else [])
        ]  # fmt: skip
        seconds[name] = plan["seconds"]
    assert seconds["compiled"] < seconds["dense"]


@pytest.mark.slow
def test_models_that_are_not_trained_yet_are_planned_as_their_configurations_say(
    capsys: pytest.CaptureFixture[str], repository: Path, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    words: tuple[Any, ...] = ("--config", "experiments/generate/2k-windows.yaml", "--backbone", backbone)
    words += ("--attention", "luve_lightning.models.attention.windows.Windows", "--attention.cuts", "[[1,2,2]]")
    words += (*SIZE, "--motion_height", 96)
    outcome = run_luve(capsys, "plan", *words, "--motion_width", 96, "--gpu", "h200")
    assert outcome.code == 0, outcome.err
    assert "experts: 16 steps lfe, 29 steps hfe; attention: 45 steps Windows" in outcome.out
    for name, file in {
        "vluer runs/wan2.1/vluer/vluer": "vluer/wan2.1.yaml",
        "refiner runs/wan2.1/adaptation-2k-windows/export": "experts/adaptation-2k-windows.yaml",
        "experts.hfe runs/wan2.1/experts/hfe-2k-windows": "experts/hfe-2k-windows.yaml",
    }.items():
        assert f"{name} is not there yet: planned as experiments/{file} will export it" in outcome.out
