"""Every file under experiments/ is run by the command its header names, laid over with a tiny configuration."""

from __future__ import annotations

import importlib
import re
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from luve_lightning.cli import verbs
from luve_lightning.cli.compose import compose
from luve_lightning.config_files import merge, read_config
from luve_lightning.data.variants import variant_name
from luve_lightning.models.attention.dense import Dense
from luve_lightning.models.attention.windows import Windows
from tests.helpers.run_luve import run_luve

REPOSITORY = Path(__file__).resolve().parents[1]
EXPERIMENTS = REPOSITORY / "experiments"
OVERLAYS = REPOSITORY / "tests" / "conf"
# Ablations have a rule of their own for each kind of file: tests/test_experiment_tables.py.
# What files extend is run with them.
APART = (EXPERIMENTS / "ablations", EXPERIMENTS / "base")
FILES = sorted(file for file in EXPERIMENTS.rglob("*.yaml") if not set(APART) & set(file.parents))

_LUVE = re.compile(r"\bluve ([a-z-]+)((?: --config [\w./-]+)+)")
_MAKE = re.compile(r"\bmake train-vluer CONFIG=([\w./-]+)")


def relative(file: Path) -> str:
    return str(file.relative_to(REPOSITORY))


def header(file: Path) -> str:
    """The comment a file opens with, comment signs removed."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return "\n".join(lines)


def documented_command(file: Path) -> tuple[str, list[Path]]:
    """The verb and the configuration files of the command in a file's header that uses this file."""
    text = header(file)
    commands = [(verb, re.findall(r"--config (\S+)", words)) for verb, words in _LUVE.findall(text)]
    commands += [("fit", [name]) for name in _MAKE.findall(text)]
    for verb, names in commands:
        if relative(file) in names:
            return verb, [REPOSITORY / name for name in names]
    raise AssertionError(f"{relative(file)}: its header names no command with --config {relative(file)}")


def extended(file: Path) -> list[Path]:
    """The experiments that a file extends, and those that they extend, first ones first."""
    names = yaml.safe_load(file.read_text(encoding="utf-8")).get("extends", [])
    direct = [(file.parent / name).resolve() for name in ([names] if isinstance(names, str) else names)]
    return [one for other in direct if EXPERIMENTS / "base" not in other.parents for one in (*extended(other), other)]


def overlays(verb: str, files: list[Path]) -> list[Path]:
    """The tiny configurations to lay over: the common one, then that of each file, or of what it extends, with one."""
    files = [one for file in files for one in (*extended(file), file)]
    own = [OVERLAYS / file.relative_to(EXPERIMENTS) for file in files]
    assert own[0].is_file(), f"add {own[0].relative_to(REPOSITORY)}: what makes {relative(files[0])} tiny"
    common = [OVERLAYS / "one_step.yaml"] if verb == "fit" else []
    return [*common, *(file for file in own if file.is_file())]


def tiny_runs() -> list[Path]:
    """The files whose tiny runs differ; experiments of two sizes are one when tiny.

    Those of own clips run in tests/test_own_data.py.
    """
    runs = {}
    for file in FILES:
        if file.parent.name == "own":
            continue
        verb, files = documented_command(file)
        laid = reduce(merge, (read_config(one) for one in (*files, *overlays(verb, files))), {})
        runs.setdefault((verb, repr(laid)), file)
    return list(runs.values())


def leaves(tree: Any) -> int:
    if isinstance(tree, dict) and "class_path" not in tree:
        return sum(leaves(value) for value in tree.values())
    return 1


def as_options(files: list[Path]) -> list[str]:
    return [word for file in files for word in ("--config", str(file))]


@pytest.fixture
def tiny_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_places: dict[str, str]) -> Path:
    """Sets what the overlays refer to, and moves to an empty folder; returns the run folder."""
    for name, place in tiny_places.items():
        monkeypatch.setenv(name, place)
    monkeypatch.setenv("TINY_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb"))  # where artifacts wait, by default at home
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes a minute and is tested elsewhere
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "run"


@pytest.mark.parametrize("file", [file for file in FILES if file.parent.name == "experts"], ids=relative)
def test_experts_of_real_size_say_how_noise_levels_are_weighted(file: Path) -> None:
    """Those of the mini world keep the uniform weight that its numbers were made with."""
    _, files = documented_command(file)
    options = reduce(merge, map(read_config, files), {}).get("model", {}).get("init_args", {})
    real = "mini" not in file.name
    assert options.get("loss_weight", {}).get("class_path", "").endswith(".BellLossWeight") == real


def test_there_are_experiments() -> None:
    assert len(FILES) >= 2


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_the_header_says_what_it_is_and_how_to_run_it(file: Path) -> None:
    verb, files = documented_command(file)
    assert verb in verbs()
    assert all(other.is_file() for other in files)
    assert len(header(file).splitlines()[0]) >= 30, "the first line says what the experiment is"


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=relative)
def test_it_fits_the_signatures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    """As written, without an overlay: every key is known and every value has its type."""
    monkeypatch.chdir(REPOSITORY)
    verb, files = documented_command(file)
    outcome = run_luve(capsys, verb, *as_options(files), "--print_config")
    assert outcome.code == 0, outcome.err
    assert yaml.safe_load(outcome.out)


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_a_difference_changes_few_keys_or_says_why(file: Path) -> None:
    verb, files = documented_command(file)
    if extended(file):
        own = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert leaves({key: value for key, value in own.items() if key != "extends"}) <= 3 or "Why:" in header(file)
        return
    if file == files[0]:
        assert verb in ("report", "dashboards") or "class_path" in file.read_text() or "backbone" in file.read_text()
        return
    assert leaves(compose([file])) <= 3 or "Why:" in header(file)


@pytest.mark.parametrize("file", sorted((EXPERIMENTS / "base").glob("*.yaml")), ids=relative)
def test_a_base_file_is_used_and_holds_nothing_that_is_learnt_by(file: Path) -> None:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert not {"model", "data"} & set(content)
    assert not {"max_steps", "precision", "gradient_clip_val"} & set(content.get("trainer", {}))
    assert len(header(file).splitlines()[0]) >= 30
    assert any(f"../base/{file.name}" in other.read_text(encoding="utf-8") for other in FILES)


def test_latents_are_stored_under_the_names_that_training_asks_for() -> None:
    """Each variant as `luve precompute` names it, and no variant is described anywhere else."""
    definitions = yaml.safe_load((EXPERIMENTS / "base" / "variants.yaml").read_text())["definitions"]
    for name, variant in definitions.items():
        module, _, kind = variant["pixels"]["class_path"].rpartition(".")
        transform = getattr(importlib.import_module(module), kind)(**variant["pixels"].get("init_args", {}))
        word = variant["stored"].partition(" ")[0]
        assert variant_name(word, transform) == variant["stored"]
        assert name.startswith(word)
        for file in FILES:
            assert variant["stored"] == word or variant["stored"] not in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.rglob("*.yaml")), ids=relative)
def test_steps_end_a_run_and_not_the_clock(file: Path) -> None:
    """A limit of time is for clusters, on the command line: with one, a result depends on how fast the machine is."""
    text = file.read_text(encoding="utf-8")
    assert "max_time" not in text
    assert "mini" not in file.name or "budget_seconds" not in text


@pytest.mark.parametrize("folder", ["vluer", "experts"])
def test_the_mini_world_trains_with_a_fixed_number_of_threads(folder: str) -> None:
    for file in FILES:
        if file.parent.name == folder and "mini" in file.name:
            _, files = documented_command(file)
            threads = compose(files)["callbacks"]["threads"]
            assert threads["class_path"] == "luve_lightning.callbacks.CPUThreads", relative(file)


def test_what_trains_at_once_writes_to_folders_of_its_own() -> None:
    """Dense and windowed, 2K and 4K, low and high frequencies."""
    folders: dict[str, Path] = {}
    for file in FILES:
        verb, files = documented_command(file)
        if file.name.endswith(("-2k.yaml", "-4k.yaml", "-windows.yaml")) and file == files[-1] and verb == "fit":
            if file.name.startswith("metrics"):
                continue
            folder = compose(files)["trainer"]["default_root_dir"]
            assert folder not in folders, f"{relative(file)} and {folders[folder]}"
            folders[folder] = file
    assert len(folders) >= 12


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: value for name, each in tree.items() for key, value in flat(each, f"{path}.{name}").items()}


def test_the_released_recipe_differs_from_the_papers_in_what_it_says() -> None:
    """Each choice is one key: what differs is here, and `ours` stands beside it in the paper's file."""
    paper, released = (compose([EXPERIMENTS / "vluer" / f"{name}.yaml"]) for name in ("wan2.1", "wan2.1-released"))
    one, other = flat(paper), flat(released)
    model, data = ".model.init_args", ".data.init_args"
    differs = {key: other.get(key) for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    assert differs.pop(".trainer.default_root_dir") == "runs/wan2.1/vluer-released"
    assert {key: differs.pop(key) for key in list(differs) if key.startswith((".callbacks.", ".loggers."))}.keys() == {
        ".callbacks.ema.class_path", ".callbacks.ema.init_args.decay",
        ".loggers.wandb.init_args.tags", ".callbacks.strips.init_args.output", ".callbacks.comparison.init_args.output",
        ".callbacks.export.init_args.output", ".loggers.csv.init_args.save_dir", ".loggers.wandb.init_args.save_dir",
    }  # fmt: skip
    assert differs == {
        ".trainer.max_steps": 400_000,
        ".trainer.gradient_clip_val": None,
        f"{model}.net.class_path": "luve_lightning.models.vluer.ReleasedVLUer",
        f"{model}.pixel_from_step": 0,
        f"{model}.pixel_frames": "first",
        f"{model}.pixel_clamp": True,
        f"{data}.scales": [1.5, 2.0],
        f"{data}.crop_frames": "first",
        f"{data}.video_crop": [6, 24, 24],
        f"{data}.num_workers": 16,
    }
    for config in (one, other):
        assert (config[f"{model}.lr"], config[f"{model}.min_lr"]) == (2e-4, 1e-7)
        assert config[f"{model}.betas"] == [0.9, 0.999]
        assert {config[f"{model}.losses.{name}.init_args.weight"] for name in ("latent", "pixel", "frame")} == {1.0}
        assert (config[f"{data}.crop"], config[f"{data}.crop_at"]) == ([11, 64, 64], "low")
        assert config[f"{data}.batch_size"] == 2
    assert (one[".trainer.max_steps"], one[f"{model}.pixel_from_step"]) == (135_000, 101_250)


@pytest.mark.parametrize(("name", "grid", "most"), [("2k", (13, 92, 160), 1 / 15), ("4k", (13, 136, 240), 1 / 28)])
def test_windows_leave_the_share_of_the_pairs_that_the_time_allows(
    name: str, grid: tuple[int, int, int], most: float
) -> None:
    """Over Wan2.1-1.3B's 30 layers; at 4K, 80 ms a layer of dense attention's 1893 (one H100)."""
    config = compose([EXPERIMENTS / "experts" / f"adaptation-{name}-windows.yaml"])["model"]["init_args"]["attention"]
    attention = Windows(**config["init_args"])
    dense = 30 * Dense().pairs(grid, 0, 1.0)
    share = sum(attention.pairs(grid, layer, sigma=0.5) for layer in range(30)) / dense
    assert most / 1.5 < share <= most


@pytest.mark.slow
@pytest.mark.parametrize("file", tiny_runs(), ids=relative)
def test_one_step_runs(capsys: pytest.CaptureFixture[str], tiny_environment: Path, file: Path) -> None:
    verb, files = documented_command(file)
    outcome = run_luve(capsys, verb, *as_options([*files, *overlays(verb, files)]))
    assert outcome.code == 0, outcome.err
    if verb == "fit":
        assert (tiny_environment / "provenance.json").is_file()
    assert not list(Path.cwd().iterdir()), "a path does not follow trainer.default_root_dir"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["precompute/mini.yaml", "mini/vae.yaml", "experts/mini-metrics.yaml"])
def test_one_step_runs_in_bfloat16(capsys: pytest.CaptureFixture[str], tiny_environment: Path, name: str) -> None:
    """Lightning converts every batch then, and the default dtype is another."""
    verb, files = documented_command(EXPERIMENTS / name)
    words = [*as_options([*files, *overlays(verb, files)]), "--trainer.precision", "bf16-true"]
    outcome = run_luve(capsys, verb, *words)
    assert outcome.code == 0, outcome.err
