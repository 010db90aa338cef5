"""Every panel shows what tiny runs of the experiments really log; workspaces are built and serialised offline."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from luve_lightning.ablations.table import read_table
from luve_lightning.cli import report as verb
from luve_lightning.reporting.dashboard import find_runs
from tests.helpers.run_luve import run_luve

REPOSITORY = Path(__file__).resolve().parents[2]
DEFINITIONS = {path.stem: path for path in sorted((REPOSITORY / "experiments" / "dashboards").glob("*.yaml"))}
# Base, difference, and where the run goes.
RUNS = {
    "vluer": ("vluer/mini.yaml", "vluer/mini-metrics.yaml", "runs/mini/vluer"),
    "experts": ("experts/mini-lfe.yaml", "experts/mini-metrics.yaml", "runs/mini/experts/lfe"),
}


def definition(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load(DEFINITIONS[name].read_text())["dashboards"][name])


def panels(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for section in definition(name)["sections"].values():
        yield from section["panels"].items()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def tiny_run(
    capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch, root: Path, name: str, tiny: dict[str, Path]
) -> None:
    """One step, validated, sampled and tested, of the experiment that a dashboard is for."""
    base, difference, folder = RUNS[name]
    for key, path in (tiny | {"run": root / folder}).items():
        patch.setenv(f"TINY_{key.upper()}", str(path))
    files = [REPOSITORY / "experiments" / base, REPOSITORY / "experiments" / difference]
    files += [REPOSITORY / "tests" / "conf" / file for file in ("one_step.yaml", base, difference)]
    options = [word for file in files for word in ("--config", str(file))]
    options += ["--loggers.wandb", "null"]
    for words in (("fit",), ("test", "--ckpt_path", "last")):
        outcome = run_luve(capsys, words[0], *options, *words[1:])
        assert outcome.code == 0, outcome.err


@pytest.fixture
def tiny(
    tiny_backbone: Path, tiny_clips: Path, tiny_latents: Path, tiny_texts: Path, tiny_cascade: Path
) -> dict[str, Path]:
    return {
        "backbone": tiny_backbone, "world": tiny_clips, "latents": tiny_latents, "texts": tiny_texts,
        "cascade": tiny_cascade,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUNS))
def test_every_metric_is_logged_and_every_panel_has_data(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    offline: None,
    tmp_path: Path,
    tiny: dict[str, Path],
    name: str,
) -> None:
    tiny_run(capsys, monkeypatch, tmp_path, name, tiny)
    [run] = find_runs(definition(name)["folders"], tmp_path)
    for title, panel in panels(name):
        missing = [metric for metric in panel.get("metrics", []) if metric not in run.curves]
        # Without a gap between bilinear and the ceiling no share of it is logged, and random weights have none.
        assert not [metric for metric in missing if not metric.endswith("/gap_closed")], title
        if "pattern" in panel:
            assert [metric for metric in run.curves if re.fullmatch(panel["pattern"], metric)], title
    monkeypatch.chdir(tmp_path)
    outcome = run_luve(capsys, "report", "--config", DEFINITIONS[name], "--output", "report.html")
    assert outcome.code == 0, outcome.err
    assert "dashboards 1" in outcome.out
    page = Path("report.html").read_text()
    assert RUNS[name][2] in page
    assert re.findall(r"([^>]*): no run has", page) in ([], ["Gap to the ceiling closed"])
    assert page.count('<figure class="chart"') >= 5


@pytest.mark.slow
def test_results_are_metrics_of_the_tables() -> None:
    """`luve ablate` names them, and a run of a sweep logs them as result/<metric>."""
    tables = [path.parent for path in (REPOSITORY / "experiments" / "ablations").glob("*/table.yaml")]
    known = {f"result/{metric}" for folder in tables for metric in read_table(folder).metrics}
    shown = {
        metric for _, panel in panels("ablations") if panel.get("kind") == "results" for metric in panel["metrics"]
    }
    assert shown == known


@pytest.mark.slow
def test_workspaces_are_built_and_serialised(capsys: pytest.CaptureFixture[str], offline: None, tmp_path: Path) -> None:
    configs = [word for path in DEFINITIONS.values() for word in ("--config", path)]
    outcome = run_luve(capsys, "dashboards", *configs, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "workspaces not saved, WANDB_MODE is offline: written as JSON to" in outcome.out
    assert set(DEFINITIONS) == {"vluer", "experts", "ablations"}
    for name in DEFINITIONS:
        view = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert view["displayName"] == definition(name)["title"]
        section = view["spec"]["section"]
        built = section["panelBankConfig"]["sections"]
        wanted = {key: part for key, part in definition(name)["sections"].items() if not part.get("local_only")}
        assert [part["name"] for part in built] == list(wanted)
        for part, source in zip(built, wanted.values(), strict=True):
            for panel, (title, spec) in zip(part["panels"], source["panels"].items(), strict=True):
                assert panel["config"]["chartTitle"] == title
                assert panel["config"].get("metrics", []) == spec.get("metrics", [])
                if "pattern" in spec:
                    assert panel["config"]["metricRegex"] == f"^(?:{spec['pattern']})$"
                line = panel["viewType"] == "Run History Line Plot"
                assert line == (spec.get("kind", "lines") == "lines")
        [chosen] = section["runSets"][0]["filters"]["filters"]
        key, value = re.fullmatch(r"Metric\('(\w+)'\) == '(\w+)'", definition(name)["filter"]).groups()  # type: ignore[union-attr]
        assert (chosen["key"]["name"], chosen["value"]) == ({"Group": "group", "JobType": "jobType"}[key], value)


def test_the_groups_are_those_of_the_experiments() -> None:
    for name, (base, _, _) in RUNS.items():
        logger = yaml.safe_load((REPOSITORY / "experiments" / base).read_text())["loggers"]["wandb"]
        assert f"== '{logger['init_args']['group']}'" in definition(name)["filter"]


def test_with_an_account_the_workspace_is_saved(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import wandb_workspaces.workspaces as ws

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(verb, "_own_entity", lambda: "me")
    saved = []
    monkeypatch.setattr(ws.Workspace, "save", lambda self: saved.append((self.entity, self.project, self.name)))
    outcome = run_luve(capsys, "dashboards", "--config", DEFINITIONS["experts"], "--output", tmp_path)
    assert outcome.code == 0, outcome.err
    assert saved == [("me", "luve-lightning", definition("experts")["title"])]
    assert "not saved" not in outcome.out


BASE = "dashboards.vluer.sections.Validation.panels.PSNR_rgb"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((f"--{BASE}.metrics", "[]"), "panel: expected metrics or a pattern, got neither"),
        ((f"--{BASE}.pattern", "("), "pattern: '(' is no regular expression"),
        ((f"--{BASE}.kind", "bars"), "dashboards * kind * lines * last * results * bars"),
        (("--dashboards.vluer.max_runs", "0"), "max_runs: expected at least 1, got 0"),
        (("--dashboards.vluer.filter", "Grup(1)"), "wandb-workspaces refuses it"),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str], offline: None, tmp_path: Path, options: tuple[str, str], message: str
) -> None:
    config = ("--config", DEFINITIONS["vluer"], "--output", tmp_path)
    outcome = run_luve(capsys, "dashboards", *config, *options)
    assert outcome.code == 2, outcome.err
    assert re.search(".*".join(map(re.escape, message.split(" * "))), outcome.error_lines[-1])


def test_a_name_is_no_path(capsys: pytest.CaptureFixture[str], offline: None, tmp_path: Path) -> None:
    content = yaml.safe_load(Path(DEFINITIONS["vluer"]).read_text())
    content["dashboards"] = {"../x": content["dashboards"]["vluer"]}
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(content))
    config = ("--config", tmp_path / "d.yaml", "--output", tmp_path / "out")
    outcome = run_luve(capsys, "dashboards", *config)
    assert outcome.code == 2, outcome.err
    assert "dashboards: '../x': expected letters, digits" in outcome.error_lines[-1]
    assert not list(tmp_path.glob("x.*"))


def test_without_a_dashboard_it_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_luve(capsys, "dashboards")
    assert outcome.code == 2
    assert "dashboards" in outcome.error_lines[-1]
