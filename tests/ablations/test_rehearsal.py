"""The stages of a rehearsal are the recipe's own configurations, with values that they know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from luve_lightning.ablations.rehearsal import PROMPT, RANDOM, Rehearsal
from luve_lightning.ablations.rehearsal_stage import RehearsalStage, StageRun, laid_over, nested
from luve_lightning.cli.compose import compose
from luve_lightning.cli.run_verb import refusal

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES: dict[str, dict[str, Any]] = {
    "mini": {},
    "2k, windows, one GPU": {
        "backbone": RANDOM,
        "size": "2k",
        "windows": True,
        "gpu": True,
        "measure": True,
        "wandb": False,
    },
    "2k, two GPUs": {"backbone": RANDOM, "size": "2k", "gpu": True, "devices": 2},
    "4k, own data": {"backbone": "folder", "size": "4k", "data": Path("own.csv"), "hpsv3": Path("luve")},
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def recipe(name: str, root: Path) -> Rehearsal:
    return Rehearsal(root, compose, **RECIPES[name])


def everything(rehearsal: Rehearsal) -> dict[str, str]:
    """What is there when every stage is done."""
    found = rehearsal.given()
    for stage in rehearsal.stages():
        found |= stage.gives
    return found


def composed(stage: RehearsalStage, there: dict[str, str]) -> dict[str, Any]:
    return laid_over(compose(stage.configs, ()), stage.tree(there))


@pytest.mark.parametrize("name", RECIPES)
def test_each_stage_needs_what_an_earlier_one_gives(tmp_path: Path, name: str) -> None:
    rehearsal = recipe(name, tmp_path)
    there = set(rehearsal.given())
    for stage in rehearsal.stages():
        assert set(stage.needs) <= there, stage.name
        assert all(file.is_file() for file in stage.configs), stage.name
        assert "{" not in str(stage.tree(everything(rehearsal))).replace("{'", "").replace("{}", ""), stage.name
        there |= set(stage.gives)
    assert {"videos", "table", "report"} <= there


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2k, windows, one GPU"])
def test_each_command_fits_its_verb(tmp_path: Path, name: str) -> None:
    rehearsal = recipe(name, tmp_path)
    there = everything(rehearsal)
    for stage in rehearsal.stages():
        if stage.verb:
            run = StageRun(stage, tmp_path, stage.tree(there), True, 1.0, program=())
            run.folder.mkdir(parents=True)
            (run.folder / "overrides.yaml").write_text(yaml.safe_dump(run.tree))
            assert refusal(run.words()) is None, stage.name


def test_the_recipe_is_the_one_that_is_configured(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in recipe("2k, windows, one GPU", tmp_path).stages()}
    there = everything(recipe("2k, windows, one GPU", tmp_path))
    assert [stages[name].units for name in ("adaptation", "lfe", "hfe")] == [15_000, 3000, 3000]
    assert (stages["vluer-1"].units, stages["vluer-2"].units) == (101_250, 135_000 - 101_250)
    attention = stages["models"].tree(there)["attention"]
    assert attention == composed(stages["adaptation"], there)["model"]["init_args"]["attention"]
    hfe = composed(stages["hfe"], there)
    assert hfe["model"]["init_args"]["name"] == "hfe"
    assert hfe["trainer"]["max_steps"] == 4
    assert hfe["data"]["init_args"]["selection"]["scorer"] == "sharpness-exposure"
    without = stages["hfe"].tree({name: path for name, path in there.items() if name != "scores"})
    assert without["data"]["init_args"]["selection"] is None
    generate = composed(stages["generate"], there)
    assert (generate["steps"], generate["skip_steps"], generate["prompt"]) == (50, 5, PROMPT)
    assert generate["refiner"] == str(tmp_path / "runs/adaptation/export"), "the trained one comes first"


def test_trainings_are_profiled_for_two_steps_more_and_gpus_may_share_the_video(tmp_path: Path) -> None:
    shared = Rehearsal(tmp_path, compose, RANDOM, "2k", devices=2, gpu=True, profile=True, video_devices=4, steps=3)
    stages, plain = (
        {stage.name: stage for stage in shared.stages()},
        Rehearsal(tmp_path, compose, RANDOM, "2k", steps=3),
    )
    for name, steps in (("lfe", 3), ("vluer-2", 3 * 4)):
        values = stages[name].values
        assert values["callbacks.step_parts"]["init_args"] == {"after": steps}
        assert values["trainer.max_steps"] == values["trainer.val_check_interval"] == stages[name].steps == steps + 2
        [without] = [stage for stage in plain.stages() if stage.name == name]
        assert (without.steps, without.values["trainer.max_steps"]) == (steps, steps)
        assert "callbacks.step_parts" not in without.values
    run = StageRun(stages["generate"], tmp_path, {}, True, 1.0, program=("python", "-m", "luve_lightning"))
    assert run.words()[:8] == [
        *("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "luve_lightning")
    ]
    assert stages["generate"].values["context_parallel"] == 4
    assert StageRun(stages["lfe"], tmp_path, {}, True, 1.0).words()[3] == "fit", "its Trainer starts the processes"


def test_a_short_video_skips_as_large_a_share(tmp_path: Path) -> None:
    short = Rehearsal(tmp_path, compose, RANDOM, "2k", video_steps=20)
    [generate] = [stage for stage in short.stages() if stage.name == "generate"]
    assert (generate.values["steps"], generate.values["skip_steps"]) == (20, 2)


def test_dotted_keys_make_a_configuration_over_which_another_lies() -> None:
    tree = nested({"a.b": 1, "a.c.d": None, "e": [1]})
    assert tree == {"a": {"b": 1, "c": {"d": None}}, "e": [1]}
    assert laid_over(tree, {"a": {"c": {"d": 2}}, "e": [3]}) == {"a": {"b": 1, "c": {"d": 2}}, "e": [3]}
