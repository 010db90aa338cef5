"""`luve plan-training` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.run_luve import run_luve

CONFIG = "experiments/experts/mini-adaptation.yaml"


def plan(capsys: pytest.CaptureFixture[str], repository: Path, config: str = CONFIG, **options: Any) -> Any:
    words = [word for key, value in options.items() for word in (f"--{key.replace('__', '.')}", value)]
    backbone = ["--data.init_args.backbone", repository / "data/mini/wan", "--model.init_args.backbone"]
    return run_luve(
        capsys, "plan-training", "--config", repository / config, *backbone, repository / "data/mini/wan", *words
    )


@pytest.mark.slow
def test_each_bucket_has_its_line_largest_first(
    capsys: pytest.CaptureFixture[str], repository: Path, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    size = "{area: 36864, shapes: [[9, 16], [1, 1]]}"
    data = {"data__init_args__size": size, "data__init_args__frames": "[1, 17]", "data__init_args__batch_size": 3}
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
    assert "fits one h200" in outcome.out


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
        ("experiments/vluer/mini.yaml", {}, "model.class_path: a plan is for AdaptationTask or ExpertTask, got"),
        (
            CONFIG,
            {"trainer__precision": "64-true"},
            "trainer.precision: expected one of 32-true, 32, bf16-mixed, 16-mixed",
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
