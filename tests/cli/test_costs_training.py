"""`luve plan` of trainings, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luve_lightning.data.video_index import COLUMNS
from tests.helpers.run_luve import run_luve

CONFIG = "experiments/experts/mini-adaptation.yaml"


def plan(capsys: pytest.CaptureFixture[str], repository: Path, config: str = CONFIG, **options: Any) -> Any:
    words = [word for key, value in options.items() for word in (f"--{key.replace('__', '.')}", value)]
    backbone = ["--data.init_args.backbone", repository / "data/mini/wan", "--model.init_args.backbone"]
    return run_luve(capsys, "plan", "--config", repository / config, *backbone, repository / "data/mini/wan", *words)


@pytest.mark.slow
def test_each_bucket_has_its_line_largest_first(
    capsys: pytest.CaptureFixture[str], repository: Path, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    size = "{area: 36864, shapes: [[9, 16], [1, 1]]}"
    data = {"data__init_args__size": size, "data__init_args__frames": "[1, 17]", "data__init_args__batch_size": 3}
    data["data__init_args__index"] = tmp_path / "none.csv"  # all buckets, not those of clips that are there
    outcome = plan(capsys, repository, **data, data__init_args__fill_batches="true", gpu="h200", output=file)
    assert outcome.code == 0, outcome.err
    assert [line.split()[0] for line in outcome.out.splitlines()[1:5]] == [
        "144x256x17",
        "192x192x17",
        "144x256x1",
        "192x192x1",
    ]
    buckets = json.loads(file.read_text())["buckets"]
    assert [(one["latents"], one["batch"]) for one in buckets] == [
        ([5, 18, 32], 3), ([5, 24, 24], 3), ([1, 18, 32], 15), ([1, 24, 24], 15),
    ]  # fmt: skip
    assert buckets[0]["tokens"] == 5 * 9 * 16
    assert all(one["peak"] > one["weights"] + one["optimizer"] and one["seconds"] > 0 for one in buckets)
    assert "fits h200's 139 GiB" in outcome.out
    whole = json.loads(file.read_text())
    assert (whole["kind"], whole["unit"], whole["units"], whole["first_use_seconds"]) == ("training", "step", 200, 0)
    seconds = [one["seconds"] for one in buckets]
    assert min(seconds) < whole["seconds_per_unit"] < max(seconds)
    assert whole["gpu_hours"] == pytest.approx(200 * whole["seconds_per_unit"] / 3600)
    assert whole["peak_gib"] * 2**30 == max(one["peak"] for one in buckets)
    assert whole["terabytes"] is None


@pytest.mark.slow
def test_a_lora_and_an_expert_keep_less_than_all_weights(
    capsys: pytest.CaptureFixture[str], repository: Path, tmp_path: Path
) -> None:
    found = {}
    for name, config, more in (
        ("all", CONFIG, {}),
        ("lora", CONFIG, {"model__init_args__lora_rank": 4}),
        ("expert", "experiments/experts/mini-lfe.yaml", {}),
    ):
        outcome = plan(capsys, repository, config, **more, data__init_args__batch_size=1, output=tmp_path / "plan.json")
        assert outcome.code == 0, outcome.err
        found[name] = json.loads((tmp_path / "plan.json").read_text())["buckets"][0]
    assert found["all"]["optimizer"] > 5 * found["lora"]["optimizer"] > 0
    assert found["all"]["optimizer"] > 5 * found["expert"]["optimizer"] > 0


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            "experiments/mini/backbone.yaml",
            {},
            "model.class_path: a plan is for VLUerTask, VLUerDistillationTask, AdaptationTask, ExpertTask, "
            "FlashVideoTask, LaVieTask or WaverTask, got",
        ),
        (CONFIG, {"trainer__strategy": "deepspeed"}, "trainer.strategy: a plan is for auto, ddp or"),
        (
            CONFIG,
            {"trainer__precision": "64-true"},
            "trainer.precision: expected one of 32-true, 32, bf16-mixed, 16-mixed",
        ),
        (
            CONFIG,
            {"trainer__devices": 0},
            "trainer.devices: expected a number of at least 1, a list, auto or -1, got 0",
        ),
        (CONFIG, {"trainer__max_steps": "many"}, "trainer.max_steps: expected a whole number, got 'many'"),
        (CONFIG, {"trainer__num_nodes": -1}, "trainer.num_nodes: expected a whole number, got -1"),
        (CONFIG, {"data__init_args__batch_size": 0}, "data.init_args.batch_size: expected at least 1, got 0"),
        (CONFIG, {"model__init_args__lora_rank": -4}, "model.init_args.lora_rank: expected at least 1, got -4"),
        (
            "experiments/vluer/mini.yaml",
            {"data__init_args__crop": "[0, 0]"},
            'Parser key "data.init_args.crop": Expected a tuple with 3 elements. Got value: [0, 0]',
        ),
        (
            "experiments/vluer/mini.yaml",
            {"data__init_args__scales": "[]"},
            "data.init_args.scales: expected at least one",
        ),
        (CONFIG, {"data__init_args__frames": "[1, 1]"}, "frames: expected one or more, all different, got [1, 1]"),
    ],
)
def test_what_cannot_be_planned_is_told_in_a_line(
    capsys: pytest.CaptureFixture[str], repository: Path, config: str, options: dict[str, str], message: str
) -> None:
    outcome = plan(capsys, repository, config, **options)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        ("precompute", ["--batch_size", "0"], "batch_size: expected at least 1, got 0"),
        ("embed", ["--batch_size", "0"], "batch_size: expected at least 1, got 0"),
        ("embed", ["--length", "0"], "length: expected at least 1, got 0"),
        ("score", ["--frames", "0"], "frames: expected at least 1, got 0"),
        ("upsample", ["--limit", "0"], "limit: expected at least 1, got 0"),
        ("upsample", ["--baselines", "[lanczos]"], "baselines: expected some of nearest, "),
    ],
)
def test_so_is_what_no_run_would_take(
    capsys: pytest.CaptureFixture[str],
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: str,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(repository)
    outcome = run_luve(capsys, "plan", "--config", f"experiments/{config}/mini.yaml", *words)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.slow
def test_the_vluers_phases_and_an_expert_whose_base_is_not_trained_yet(
    capsys: pytest.CaptureFixture[str], repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    file = tmp_path / "plan.json"
    words = ("--gpu", "h200", "--output", file)
    outcome = run_luve(capsys, "plan", "--config", "experiments/vluer/mini.yaml", "--callbacks.ema", "null", *words)
    assert outcome.code == 0, outcome.err
    found = json.loads(file.read_text())
    names = [row["name"] for row in found["buckets"]]
    assert names == [f"192x192x9, {scale}x, phase {phase}" for phase in (1, 2) for scale in ("1.5", "2", "3")]
    by_phase = [sum(row["seconds"] for row in found["buckets"][part]) / 3 for part in (slice(3), slice(3, 6))]
    assert found["seconds_per_unit"] == pytest.approx((2100 * by_phase[0] + 100 * by_phase[1]) / 2200)

    words = ("--model.backbone", "runs/wan2.1/adaptation-2k-windows/export", *words)
    outcome = run_luve(capsys, "plan", "--config", "experiments/experts/mini-lfe.yaml", *words)
    assert outcome.code == 0, outcome.err
    assert "experiments/experts/adaptation-2k-windows.yaml will export it" in outcome.out
    windows = json.loads(file.read_text())["buckets"][0]["flops"]
    outcome = run_luve(
        capsys, "plan", "--config", "experiments/experts/mini-lfe.yaml", *words, "--model.backbone", "data/mini/wan"
    )
    assert json.loads(file.read_text())["buckets"][0]["flops"] > windows


@pytest.mark.slow
def test_data_are_planned_by_their_configurations(
    capsys: pytest.CaptureFixture[str], repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)

    def planned(config: str, *words: Any) -> tuple[Any, str]:
        file = tmp_path / "plan.json"
        outcome = run_luve(capsys, "plan", "--config", f"experiments/{config}.yaml", *words, "--output", file)
        assert outcome.code == 0, outcome.err
        return json.loads(file.read_text()), outcome.out

    index = tmp_path / "clips.csv"
    index.write_text("")
    found, text = planned("precompute/mini", "--index", index)
    assert (found["units"], found["terabytes"]) == (None, None), "an index without its clips"
    (tmp_path / "clips").mkdir()
    for clip in ("a1", "a2", "b1"):
        (tmp_path / "clips" / f"{clip}.mp4").touch()  # never read
    rows = "".join(f"{c},v{c},192,192,16,0,33,33,0,2,2,1,1,1{',text ' + c[:1]}{',' * 9}\n" for c in ("a1", "a2", "b1"))
    index.write_text(",".join(COLUMNS) + "\n" + rows)
    here = ("--index", index, "--gpu", "h200", "--num_workers", 0)
    found, text = planned("precompute/mini", *here, "--windows", 2)
    assert (found["kind"], found["unit"], found["units"]) == ("precompute", "clip", 6)
    stored = 2 * 16 * sum(3 * side**2 for side in (24, 16, 12, 8))  # float16, at every size
    assert found["terabytes"] == pytest.approx(6 * stored / 1e12)
    assert found["gpu_hours"] == pytest.approx(6 * found["seconds_per_unit"] / 3600)
    assert found["first_use_seconds"] == 0  # small clips need no kernels

    found, text = planned("embed/mini", "--index", index, "--columns", "[Brief Description]", "--gpu", "h200")
    assert (found["kind"], found["unit"], found["units"]) == ("embed", "text", 3)  # two texts and the empty one
    found, text = planned("score/mini", "--index", index)
    assert (found["kind"], found["units"], found["seconds_per_unit"], found["peak_gib"]) == ("score", 3, None, None)
    assert "SharpnessExposure scores 4 frames of each clip, 12 in all; its seconds and memory are unknown" in text
    found, text = planned("upsample/mini", "--index", tmp_path / "none.csv", "--gpu", "h200")
    assert (found["kind"], found["unit"], found["units"], found["gpu_hours"]) == ("upsample", "video", None, None)
    assert "how many there are is unknown; 1,000 videos: " in text

    outcome = run_luve(capsys, "plan", "--config", "experiments/evaluate/mini.yaml")
    assert outcome.code == 2
    assert "expected a configuration of luve generate, fit, precompute, embed, score, upsample; " in outcome.err
