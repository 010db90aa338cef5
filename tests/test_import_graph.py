"""The rooms of the package import each other in one direction only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "luve_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import itself and rooms of a lower rank.
RANKS = {
    "checkout": 0,
    "files": 0,
    "functional": 0,
    "machine": 0,
    "terminal": 0,
    "pages": 0,
    "losses": 1,
    "metrics": 1,
    "models": 1,
    "datasets": 2,
    "scoring": 3,
    "datamodules": 3,
    "tasks": 4,
    "pipelines": 4,
    "evaluation": 5,
    "callbacks": 6,
    "ablations": 7,
    "dashboards": 7,
    "reports": 7,
    "studies": 7,
    "commands": 8,
    "__main__": 9,
}
LIGHTNING_ROOMS = {"tasks", "datamodules", "callbacks", "commands", "__main__"}
MAX_LINES = 400


def room_of(file: Path) -> str:
    """The folder under the package, or the module's name for a file at its top."""
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of every import, those inside functions too."""
    package = ("luve_lightning", *file.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def name(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_flow_one_way(file: Path) -> None:
    room = room_of(file)
    assert room in RANKS or room == "__init__", f"{room} is not in the list of rooms"
    for line, imported in imports(file):
        parts = imported.split(".")
        if parts[0] != "luve_lightning" or len(parts) < 2:
            continue
        assert room != "__init__", f"{file}:{line}: the package itself imports nothing"
        assert parts[1] == room or RANKS[parts[1]] < RANKS[room], f"{file}:{line}: {room} imports {imported}"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_only_some_rooms_import_lightning(file: Path) -> None:
    for line, imported in imports(file):
        if imported.split(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric"):
            assert room_of(file) in LIGHTNING_ROOMS, f"{file}:{line} imports {imported}"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_house_rules_of_files(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES
    assert file.stem not in ("utils", "util", "helpers", "misc", "common")
    assert not [line for line, imported in imports(file) if imported.endswith(".*")], "star import"


def test_the_checks_see_a_violation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules above would be worthless if `imports` missed a form of import."""
    folder = tmp_path / "luve_lightning" / "functional"
    folder.mkdir(parents=True)
    file = folder / "x.py"
    file.write_text(
        "import lightning.pytorch as pl\nfrom ..tasks import vluer\nfrom . import y\n"
        "def f():\n    from luve_lightning.models.backbone import LatentCodec\nfrom a import *\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "luve_lightning")
    assert {imported for _, imported in imports(file)} == {
        "lightning.pytorch",
        "luve_lightning.tasks.vluer",
        "luve_lightning.functional.y",
        "luve_lightning.models.backbone.LatentCodec",
        "a.*",
    }


def test_the_command_imports_nothing_heavy() -> None:
    program = (
        "import sys, luve_lightning.__main__, luve_lightning.commands\n"
        "print(*sorted({'torch', 'lightning', 'numpy', 'diffusers', 'omegaconf', 'jsonargparse'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
