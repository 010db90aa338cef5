"""The tables under experiments/ablations: every file's header, every command's options, and a tiny run."""

from __future__ import annotations

import json
import math
import re
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from luve_lightning.ablations.costs import add_costs
from luve_lightning.ablations.graph import AblationPlanner, AblationStage, Contents
from luve_lightning.ablations.results import collect, result_rows
from luve_lightning.ablations.stage_process import write_done
from luve_lightning.ablations.table import merged, read_table
from luve_lightning.cli.ablation_runs import planned_video
from luve_lightning.cli.compose import compose
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.models.attention.tiles import Tiles
from luve_lightning.models.attention.windows import Windows
from luve_lightning.models.backbones import load_backbone
from luve_lightning.tasks.flow import sigma_edges
from tests.helpers.run_luve import run_luve

REPOSITORY = Path(__file__).resolve().parents[1]
TABLES = REPOSITORY / "experiments" / "ablations"
FILES = sorted(TABLES.rglob("*.yaml"))
ROWS = [file for file in FILES if file.parent != TABLES and file.name != "table.yaml"]
NAMES = sorted(file.parent.name for file in FILES if file.name == "table.yaml")
OVERLAYS = [file for file in FILES if file.parent == TABLES and not file.name.startswith("mini-")]
# The paper's (arXiv 2602.11564) values; Table 7 has none, of Table 12 two rows have none here.
PAPER: dict[str, dict[str, list[float]]] = {
    "upsampling": {"vluer": [41.03], "latent": [47.80], "rgb": [51.75]},
    "experts": {
        "uhr_scaling_only": [54.10, 6.72, 57.04],
        "plain_lora": [47.03, 7.28, 58.65],
        "without_experts": [46.48, 7.00, 58.57],
        "without_lfe": [43.86, 7.08, 59.10],
        "without_hfe": [44.44, 7.36, 59.34],
        "without_selection": [43.77, 7.40, 58.80],
        "without_unsharp": [42.96, 7.52, 59.53],
        "full": [41.03, 7.64, 59.78],
    },
    "vluer_parts": {"full": [29.42], "without_pixel_loss": [29.09], "without_decoder": [26.02]},
}


def relative(file: Path) -> str:
    return str(file.relative_to(REPOSITORY))


def header(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line.lstrip("# ") for line in lines[: next(i for i, t in enumerate(lines) if not t.startswith("#"))]]


def leaves(tree: Any) -> int:
    return sum(map(leaves, tree.values())) if isinstance(tree, dict) else 1


def planner_of(name: str, root: Path, changes: dict[str, Any] | None = None) -> AblationPlanner:
    return AblationPlanner(read_table(TABLES / name, changes), root, compose, Contents(root))


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_the_header_says_what_it_is_and_how_to_run_it(file: Path) -> None:
    first, *rest = header(file)
    assert len(first) >= 30
    [command] = [line for line in rest if line.startswith("luve ablate")]
    if file in OVERLAYS:
        assert re.fullmatch(rf"luve ablate --config {relative(file)} ({'|'.join(NAMES)})", command)
    elif file in ROWS:
        assert command == f"luve ablate {file.parent.name} --rows {file.stem}"
    else:
        assert command.removeprefix("luve ablate ") in ([file.parent.name] if file.parent != TABLES else NAMES)


@pytest.mark.parametrize("file", ROWS, ids=relative)
def test_a_row_changes_few_keys_or_says_why(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    changed = leaves({key: content[key] for key in ("settings", "stages") if key in content})
    assert changed <= 3 or any("Why:" in line for line in header(file))
    if changed == 0:
        assert read_table(file.parent).reference == file.stem, "a row without a difference is the reference"


@pytest.mark.parametrize("name", NAMES)
def test_a_table_has_its_rows_and_the_papers_values(name: str) -> None:
    table = read_table(TABLES / name)
    assert set(table.rows) == {file.stem for file in ROWS if file.parent.name == name}
    assert len(table.seeds) >= (10 if name in ("experts", "upsampling", "paradigms") else 5)
    assert "mini world" in table.world
    assert table.results == "mini"
    values = {row.name: list(row.paper.values()) for row in table.rows.values() if row.paper}
    assert values == PAPER.get(name, {})
    if "fd_patch_vae" in table.metrics and values:
        assert "not FID" in table.note


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_another_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    planner = planner_of(name, tmp_path)
    for seed in (0, 1):
        own = {row: frozenset(s.digest for s in planner.before_gathering(row, seed)) for row in planner.table.rows}
        assert len(set(own.values())) == len(own), "two rows run the same"
    whole = planner.plan({seed: list(planner.table.rows) for seed in (0, 1)})
    assert len(whole.stages) <= 20 * 2


@pytest.mark.parametrize("name", ["lavie", "waver"])
def test_rivals_of_the_cascades_schedule_train_in_it(name: str) -> None:
    generated = compose([REPOSITORY / f"experiments/rivals/generate-{name}.yaml"], [])
    trained = compose([REPOSITORY / f"experiments/rivals/{name}.yaml"], [])
    assert trained["model"]["init_args"]["shift"] == generated["shift"]
    assert read_table(TABLES / "paradigms").settings["shift"] == generated["shift"]


def test_videos_of_a_seed_do_not_share_their_noise() -> None:
    made = {
        name: [
            stage.options["own_noise"]
            for row in read_table(TABLES / name).rows.values()
            for stage in row.stages.values()
            if stage.verb == "generate"
        ]
        for name in NAMES
    }
    assert {name for name, own in made.items() if not own} == {"multi_scale", "vluer_parts"}, "these upsample clips"
    assert all(own is True for options in made.values() for own in options)


def test_rows_of_selection_differ_in_their_clips_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    planner = planner_of("experts", tmp_path)

    def trained(row: str, name: str) -> dict[str, Any]:
        [stage] = [stage for stage in planner.before_gathering(row, 1) if stage.name == name]
        files = [Path(word) for before, word in pairwise(stage.words) if before == "--config"]
        options = [pair for pair in pairwise(stage.words) if pair[0].startswith("--") and pair[0] != "--config"]
        return {"files": compose(files), **dict(options)}

    for name in ("lfe", "hfe"):
        selected, every = trained("full", name), trained("without_selection", name)
        changed = {key for key in {*selected, *every} if selected.get(key) != every.get(key)}
        assert changed == {"--data.init_args.selection", "--trainer.default_root_dir"}
        assert every["--data.init_args.selection"] == "null"
        selection = selected["files"]["data"]["init_args"]["selection"]
        assert (selection["scorer"], selection["threshold"]) == ("take-quality", 0.5)
        assert selected["--trainer.max_steps"] == every["--trainer.max_steps"]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("attention", "windows"),
        ("attention", "tiles"),
        ("attention_long", "windows"),
        ("attention_long", "windows_dense_layers"),
        ("attention_long", "tiles"),
    ],
)
def test_sparse_rows_compute_the_share_of_pairs_that_the_note_says(name: str, row: str) -> None:
    """Close to windows of a sixteenth in two ways; of 17 frames of 192x192 there are 5 x 12 x 12 tokens."""
    table, grid = read_table(TABLES / name), (5, 12, 12)
    family = row.split("_")[0]
    attention, dense = table.settings[family], table.settings["dense_layers"] if "dense_layers" in row else []
    kind = {"windows": Windows, "tiles": Tiles}[family]
    assert attention["class_path"] == f"{kind.__module__}.{kind.__qualname__}"
    sparse = kind(**attention["init_args"], dense_layers=dense)
    shares = [sparse.pairs(grid, layer, 0.5) / math.prod(grid) ** 2 for layer in range(6)]
    assert [share == 1 for share in shares] == [layer in dense for layer in range(6)]
    assert 1 / 16 <= sum(share for share in shares if share < 1) / (6 - len(dense)) <= 1 / 8
    assert f"{family} {'compute ' if family == 'windows' else ''}{100 * sum(shares) / 6:.1f} %" in table.note


def test_the_third_stage_has_the_papers_steps() -> None:
    """Of 50 steps the released checkpoints of LuVe (arXiv 2602.11564) skip 10; 11 are the LFE's and 29 the HFE's."""
    files = ["generate/mini.yaml", "experts/mini-lfe.yaml", "experts/mini-hfe.yaml"]
    generate, lfe, hfe = (yaml.safe_load((REPOSITORY / "experiments" / file).read_text()) for file in files)
    settings = read_table(TABLES / "experts").settings
    low, high = (made["model"]["init_args"]["expert"]["band"] for made in (lfe, hfe))
    assert low["low"] == high["high"] == settings["switch"]
    keys = ("shift", "steps", "skip_steps")
    assert [generate[key] for key in keys] == [settings[key] for key in keys]
    assert lfe["model"]["init_args"]["shift"] == settings["shift"]
    scheduler = load_backbone(str(REPOSITORY / "data/mini/wan")).build_schedule(settings["shift"]).scheduler
    scheduler.set_timesteps(settings["steps"])

    def shares(switch: float, skipped: int = settings["skip_steps"]) -> tuple[int, int]:
        above = [sigma >= switch for sigma in scheduler.sigmas.tolist()[skipped : settings["steps"]]]
        return sum(above), len(above) - sum(above)

    assert scheduler.sigmas[settings["skip_steps"]].item() == pytest.approx(2 / 3, abs=1e-3)
    assert shares(settings["switch"]) == (11, 29)
    assert shares(settings["switch"], 5) == (16, 29)  # as the paper has it
    switches = [float(f"0.{name[7:]}") for name in read_table(TABLES / "switch_point").rows if name != "full"]
    assert [shares(switch)[0] for switch in switches] == [20, 16, 7]
    assert "has 20, 16, 11 and 7" in read_table(TABLES / "switch_point").note
    edges = sorted(sigma_edges(SigmaBand(), settings["shift"], 5).tolist())
    columns = [
        metric.column for metric in read_table(TABLES / "attention").metrics.values() if "sigma" in metric.column
    ]
    assert columns == [f"loss_sigma_{a:.3f}-{b:.3f}" for a, b in pairwise(edges)]


def kinds(tmp_path: Path) -> dict[tuple[Any, ...], AblationStage]:
    """Stages of every table and row in which each option, null or not, meets each verb and files once at least."""
    found: dict[tuple[Any, ...], AblationStage] = {}
    for name in NAMES:
        planner = planner_of(name, tmp_path)
        for stage in planner.plan({0: list(planner.table.rows)}).stages.values():
            words = stage.words
            keys = tuple(
                word if word.startswith("--") else word if before == "--config" else word == "null"
                for before, word in pairwise(words)
            )
            if not stage.gathers:
                found.setdefault((words[0], *keys), stage)
            else:
                found.setdefault((words[0], stage.name, name), stage)
    seen: set[tuple[Any, ...]] = set()
    for key in sorted(found, key=len, reverse=True):
        stage = found[key]
        if not stage.gathers:
            files = tuple(word for before, word in pairwise(stage.words) if before == "--config")
            options = [
                (stage.words[0], files, word, value == "null")
                for word, value in pairwise(stage.words)
                if word.startswith("--") and word != "--config"
            ]
            if seen.issuperset(options):
                del found[key]
            seen.update(options)
    return found


@pytest.mark.slow
def test_every_command_fits_the_signatures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As written, without an overlay: every key is known and every value has its type."""
    monkeypatch.chdir(REPOSITORY)
    stages = kinds(tmp_path)
    assert {key[0] for key in stages} == {"fit", "generate", "upsample", "evaluate"}
    assert len(stages) >= 15
    for stage in stages.values():
        outcome = run_luve(capsys, *stage.words, "--print_config")
        assert outcome.code == 0, f"{' '.join(stage.words)}\n{outcome.err}"


@pytest.mark.slow
@pytest.mark.parametrize("file", OVERLAYS, ids=relative)
def test_an_overlay_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: Path
) -> None:
    monkeypatch.chdir(REPOSITORY)
    name = header(file)[1].split()[-1]
    plain, changed = planner_of(name, tmp_path), planner_of(name, tmp_path, compose([file]))
    rows = {0: [plain.table.reference]}
    known = plain.plan(rows).stages
    new = [stage for digest, stage in changed.plan(rows).stages.items() if digest not in known]
    assert new
    for stage in new:
        outcome = run_luve(capsys, *stage.words, "--print_config")
        assert outcome.code == 0, outcome.err


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tiny_places: dict[str, str], tmp_path: Path) -> None:
    for name, place in (tiny_places | {"TINY_RUN": str(tmp_path / "run")}).items():
        monkeypatch.setenv(name, place)
    monkeypatch.chdir(REPOSITORY)
    # What is recognised in a video is what its prompt asks for, in the mini world's words.
    prompt = "a photograph of a temple . the camera pans left . a red heart is in front ."
    lines = [json.dumps({"name": f"{number:040x}", "prompt": prompt}) for number in range(2)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("experts", ["uhr_scaling_only", "full"]),
        ("vluer_parts", ["full"]),
        ("attention", ["dense", "windows_linear"]),
        ("paradigms", ["pixels"]),
    ],
)
def test_a_tiny_run_of_all_stages(
    capsys: pytest.CaptureFixture[str], tiny: None, tmp_path: Path, name: str, rows: list[str]
) -> None:
    """The real commands in this process, with tests/conf/ablations laid over the table."""
    bases = ["mini-vluer.yaml"] if name == "vluer_parts" else ["mini-cascade.yaml"]
    bases += ["attention.yaml"] if name == "attention" else []
    overlays = [yaml.safe_load((REPOSITORY / "tests" / "conf" / "ablations" / base).read_text()) for base in bases]
    changes = reduce(merged, overlays)
    if name != "vluer_parts":
        changes = merged(changes, {"settings": {"prompts": str(tmp_path / "prompts.jsonl")}})
    planner = planner_of(name, tmp_path / "runs", changes)
    plan = planner.plan({0: rows})
    for stage in plan.stages.values():
        outcome = run_luve(capsys, *stage.words)
        assert outcome.code == 0, f"{' '.join(stage.words)}\n{outcome.err}"
        write_done(stage, {"seconds": 1.0})
    results = collect(planner, {0: rows})
    add_costs(results, planner, {0: rows}, planned_video)
    found = result_rows(planner.table, results.values)
    if name == "paradigms":  # only the first stage counts, and its records are of more
        assert list(results.cost["pixels"]["tflop"]) == ["text", "direct", "decode"]
        assert results.values["pixels"][0]["tflop"] > 0
        found.append({"row": "pixels", "metric": "seconds"})
        assert results.missing["seconds"].startswith("pixels: ")
    assert {(row["row"], row["metric"]) for row in found} == {(r, m) for r in rows for m in planner.table.metrics}
    if name == "experts":
        [motion] = [stage for stage in plan.stages.values() if stage.name == "motion"]
        [refined] = [s for s in plan.stages.values() if s.name == "generate" and ("full", 0) in s.uses]
        about = json.loads((refined.folder / f"{0:040x}.json").read_text())
        seconds = {report["stage"]: report["seconds"] for report in about["stages"]}
        assert seconds["motion"] is None, "taken from the motion stage, not made again"
        assert seconds["upsampled"] is None
        assert seconds["refined"] is not None
        assert {"lfe", "hfe"} <= {step["expert"] for step in about["steps"]}
        # Motion and its upsampling, of two videos of one prompt and seed, each with noise of its own.
        assert len(list((motion.folder / "latents").glob("??/*.safetensors"))) == 4


def test_a_command_that_cannot_be_planned_is_refused_in_one_line() -> None:
    words = ["generate", "--config", "experiments/generate/mini.yaml", "--steps", "many"]
    with pytest.raises(ValueError, match="steps") as refused:
        planned_video(words, {})
    assert "\n" not in str(refused.value)
