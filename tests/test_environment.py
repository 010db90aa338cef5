"""pyproject.toml, constraints.txt, environment.yml and the Makefile agree."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
HPSV3 = yaml.safe_load((REPOSITORY / "environment-hpsv3.yml").read_text())
HPSV3_REQUIREMENTS = [
    Requirement(line) for entry in HPSV3["dependencies"] if isinstance(entry, dict) for line in entry["pip"]
]
# What runs in another environment than ours, and what is installed there.
ELSEWHERE = {Path("luve_lightning/data/scorers.py"): {"hpsv3", "huggingface_hub"}}
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(r) for r in [*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["docs"]]]
# Extras that set-up does not install: what imports them says how to get them where they are missing.
OPTIONAL = [Requirement(r) for extra in ("heic", "iqa", "slurm") for r in EXTRAS[extra]]


def constraints() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def run_tool(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(cwd / "tools" / "make_environment.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_the_tested_version_is_within_each_range(requirement: Requirement) -> None:
    pins = constraints()
    assert Version(pins[canonicalize_name(requirement.name)]) in requirement.specifier


def test_every_installed_dependency_is_pinned() -> None:
    """The whole tree below our requirements, so that a fresh set-up cannot drift."""
    pins = constraints()
    waiting, seen = [(requirement.name, requirement.extras) for requirement in REQUIREMENTS], set()
    while waiting:
        name, extras = waiting.pop()
        if (canonicalize_name(name), frozenset(extras)) in seen:
            continue
        seen.add((canonicalize_name(name), frozenset(extras)))
        assert canonicalize_name(name) in pins, f"{name} is not in constraints.txt"
        for text in metadata.requires(name) or []:
            child = Requirement(text)
            wanted = any(child.marker.evaluate({"extra": extra}) for extra in extras or {""}) if child.marker else True
            # setuptools and pip come with the virtual environment; a constraint on them would bind builds too.
            if wanted and child.name not in ("setuptools", "pip"):
                waiting.append((child.name, child.extras))


def test_every_import_is_declared() -> None:
    """What the package imports is a dependency by itself, not by way of another one."""
    declared = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}
    distributions = metadata.packages_distributions()
    imported: set[str] = set()
    for file in (REPOSITORY / "luve_lightning").rglob("*.py"):
        elsewhere = ELSEWHERE.get(file.relative_to(REPOSITORY), set())
        assert {canonicalize_name(name) for name in elsewhere} <= {
            canonicalize_name(r.name) for r in HPSV3_REQUIREMENTS
        }
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names} - elsewhere
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported |= {(node.module or "").partition(".")[0]} - elsewhere
    third_party = imported - set(sys.stdlib_module_names) - {"luve_lightning"}
    assert {"torch", "lightning", "yaml"} <= third_party
    # They are not installed: a name is all there is to compare.
    third_party -= {requirement.name.replace("-", "_") for requirement in OPTIONAL}
    third_party -= {r.name for r in REQUIREMENTS if r.marker and not r.marker.evaluate()}
    for module in third_party:
        assert {canonicalize_name(name) for name in distributions.get(module, [])} & declared, module


def test_each_dependency_says_why_its_bounds_are_there() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    block = text[text.index("dependencies = [") : text.index("[project.scripts]")]
    lines = [line for line in block.splitlines() if line.strip().startswith('"')]
    assert len(lines) == len(REQUIREMENTS) + len(OPTIONAL)
    assert not [line for line in lines if not re.search(r'",?\s+# \S.{10,}', line)]


def test_environment_yml_is_in_step() -> None:
    assert run_tool("--check").returncode == 0
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert {Requirement(line).name for line in pip if not line.startswith("--")} == {r.name for r in REQUIREMENTS}


def test_hpsv3s_environment_agrees_with_ours_where_both_name_a_package() -> None:
    """`luve score` runs in both. transformers and the hub's client are why there are two; torch is pinned there."""
    ours = {requirement.name: requirement for requirement in REQUIREMENTS}
    apart = ("transformers", "huggingface_hub")
    shared = [r for r in HPSV3_REQUIREMENTS if r.name in ours and r.name not in apart]
    assert {"jsonargparse", "pyarrow", "torch", "decord", "av"} <= {requirement.name for requirement in shared}
    for requirement in shared:
        exact = next((s.version for s in requirement.specifier if s.operator == "=="), None)
        same = requirement.specifier == ours[requirement.name].specifier
        assert same or (exact and exact in ours[requirement.name].specifier), requirement


def test_the_check_notices_a_change(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    for name in ("tools/make_environment.py", "environment.yml"):
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    changed = (REPOSITORY / "pyproject.toml").read_text().replace('"peft>=0.21', '"peft>=0.20')
    (tmp_path / "pyproject.toml").write_text(changed)
    checked = run_tool("--check", cwd=tmp_path)
    assert checked.returncode == 1
    assert "environment.yml is out of step" in checked.stderr
    assert run_tool(cwd=tmp_path).returncode == 0
    assert run_tool("--check", cwd=tmp_path).returncode == 0


def test_make_help_lists_every_target() -> None:
    done = subprocess.run(["make", "--no-print-directory"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    makefile = (REPOSITORY / "Makefile").read_text()
    phony = {name for line in re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE) for name in line.split()}
    assert {"help", "setup", "test", "lint", "train-vluer", "evaluate-vluer"} <= phony
    for target in phony:
        assert re.search(rf"^\s+{target}\s+\S", re.sub(r"\x1b\[\d*m", "", done.stdout), re.MULTILINE), target


def test_make_ablations_names_the_tables_before_it_makes_data() -> None:
    make = ["make", "--no-print-directory", "--dry-run", "ablations"]
    wrong = subprocess.run([*make, "TABLE=expert"], cwd=REPOSITORY, capture_output=True, text=True)
    assert wrong.returncode == 2
    tables = sorted(path.parent.name for path in (REPOSITORY / "experiments" / "ablations").glob("*/table.yaml"))
    assert f"TABLE=expert: expected all, or some of {' '.join(tables)}." in wrong.stderr
    assert not wrong.stdout
    right = subprocess.run([*make, "TABLE=experts"], cwd=REPOSITORY, capture_output=True, text=True)
    assert "luve ablate 'experts'" in right.stdout
    several = subprocess.run([*make, "TABLE=experts multi_scale"], cwd=REPOSITORY, capture_output=True, text=True)
    assert "luve ablate 'experts' 'multi_scale'" in several.stdout
    assert "luve score" in several.stdout, "the data of the one and of the other"
    assert "luve precompute --config experiments/precompute/mini.yaml " in several.stdout
    for bad in ("experts expert", ""):
        wrong = subprocess.run([*make, f"TABLE={bad}"], cwd=REPOSITORY, capture_output=True, text=True)
        assert (wrong.returncode, wrong.stdout) == (2, ""), bad


def test_the_floors_are_the_lowest_versions_of_every_range() -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "floors.py")], capture_output=True, text=True, check=True
    )
    pins = {pin.name: pin for pin in map(Requirement, done.stdout.splitlines())}
    assert pins.keys() == {requirement.name for requirement in REQUIREMENTS}
    for requirement in REQUIREMENTS:
        pin = pins[requirement.name]
        lowest = next(s.version for s in requirement.specifier if s.operator == ">=")
        assert str(pin.specifier) == f"=={lowest}"
        assert pin.extras == requirement.extras
        assert pin.marker == requirement.marker


def test_a_requirement_without_a_floor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "floors.py").write_bytes((REPOSITORY / "tools" / "floors.py").read_bytes())
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["numpy<3"]\n[project.optional-dependencies]\ndev = []\ndocs = []\n'
    )
    command = [sys.executable, str(tmp_path / "tools" / "floors.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "pyproject.toml: 'numpy<3': expected a lower bound such as >=1.2\n"


STUB = """#!{python}
import json, os, sys
with open("called.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""
NASTY = '$(shell touch a)`touch b`$(touch c); touch d \' "$(touch e)" ${HOME} # \\ $5 \n--x'


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder in which every target has what it needs, and `luve` only writes down how it was called."""
    (tmp_path / "Makefile").write_bytes((REPOSITORY / "Makefile").read_bytes())
    (tmp_path / "experiments").symlink_to(REPOSITORY / "experiments")
    for name in ("pyproject.toml", "constraints.txt", "data/mini/world/MANIFEST.json", ".venv/.set-up"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    luve = tmp_path / ".venv/bin/luve"
    luve.parent.mkdir()
    luve.write_text(STUB.format(python=sys.executable))
    luve.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("target", "variable", "word"),
    [
        ("generate", "PROMPT", "--prompt="),
        ("evaluate-vluer", "CHECKPOINT", ""),
        ("train-vluer", "CONFIG", ""),
        ("bench", "SUBJECT", ""),
        ("sweep", "TABLE", ""),
        ("help", "PROMPT", None),
        ("spectra", "PROMPT", None),
        ("spectra", "TABLE", None),
    ],
)
@pytest.mark.parametrize("by", ["command line", "environment"])
def test_make_passes_a_text_on_and_runs_nothing_in_it(
    made: Path, target: str, variable: str, word: str | None, by: str
) -> None:
    text = NASTY if variable == "PROMPT" else NASTY.replace("\n", " ")
    before = set(made.iterdir())
    given = f"{variable}={text}"
    words, environment = ([given], {}) if by == "command line" else ([], {variable: text})
    done = subprocess.run(
        ["make", target, *words], cwd=made, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(made.iterdir()) - before <= {made / "called.jsonl"}
    if word is not None:
        calls = [json.loads(line) for line in (made / "called.jsonl").read_text().splitlines()]
        assert f"{word}{text}" in calls[-1]


def test_make_leaves_args_to_the_shell(made: Path) -> None:
    arguments = """--a "b  c" '$HOME' --d=$((1 + 1))"""
    subprocess.run(["make", "spectra", f"ARGS={arguments}"], cwd=made, capture_output=True, check=True)
    called = json.loads((made / "called.jsonl").read_text())
    assert called[-4:] == ["--a", "b  c", "$HOME", "--d=2"]
