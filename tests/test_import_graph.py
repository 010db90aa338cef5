"""The package keeps the rules of its house: rooms import in one direction, and files stay small."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "luve_lightning"

# A room may import itself and rooms of a lower rank. A file at the top of the package is a room of its own.
RANKS = {
    room: rank
    for rank, rooms in enumerate(
        [
            ["locks"],
            ["config_files", "files", "functional", "machine", "safetensors_window", "terminal"],
            ["model_folders", "revision"],
            ["models"],
            ["losses", "metrics", "data"],
            ["datamodules", "tasks", "cascade"],
            ["evaluation"],
            ["analysis"],
            ["callbacks", "ablations", "reporting"],
            ["cli"],
            ["__main__"],
        ]
    )
    for room in rooms
}
LIGHTNING_ROOMS = {"tasks", "datamodules", "callbacks", "cli", "__main__"}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
MAX_LINES, MAX_FILES, MAX_ROOMS, MAX_MODULES = 400, 25, 14, 208
# A class of a family of backbones, also in a comment.
FAMILY = re.compile(r"\b(Wan[A-Z]|AutoencoderKL|UMT5|LTX[A-Z])\w*")
SAY_NOTHING = {"utils", "util", "helpers", "misc", "common"}  # of what is inside


def imports(file: Path, package: Path = PACKAGE) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of every import, those inside functions too."""
    parents = ("luve_lightning", *file.relative_to(package).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def offences(package: Path) -> list[str]:
    """What breaks a rule, one line each."""
    files = sorted(package.rglob("*.py"))
    return [
        *_offences_of_rooms(files, package),
        *_offences_of_names(files, package),
        *(line for f in files for line in _offences_of_file(f, package)),
    ]


def _offences_of_rooms(files: list[Path], package: Path) -> Iterator[str]:
    for folder in sorted({file.parent for file in files} - {file.parent for file in files if file.stem == "__init__"}):
        yield f"{folder.relative_to(package)}: no __init__.py, so that pip would leave it out"
    rooms = Counter(file.relative_to(package).parts[0] for file in files if file.parent != package)
    if len(rooms) > MAX_ROOMS:
        yield f"{len(rooms)} rooms, at most {MAX_ROOMS}"
    if (modules := sum(file.stem != "__init__" for file in files)) > MAX_MODULES:
        yield f"{modules} modules, at most {MAX_MODULES}"
    for room, count in rooms.items():
        if count > MAX_FILES:
            yield f"{room}: {count} files, at most {MAX_FILES}"


def type_names(file: Path) -> Iterator[str]:
    """The public classes and aliases of types that a module defines."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if isinstance(node, ast.ClassDef):
            names = [node.name]
        yield from (name for name in names if name[0].isupper() and not name.isupper())


def _offences_of_names(files: list[Path], package: Path) -> Iterator[str]:
    """One word, one meaning: what is public has a name of its own in the whole package."""
    places: dict[str, list[str]] = {}
    for file in files:
        for name in type_names(file):
            places.setdefault(name, []).append(str(file.relative_to(package)))
    yield from (f"{' and '.join(where)} define {name}" for name, where in places.items() if len(where) > 1)


def _offences_of_file(file: Path, package: Path) -> Iterator[str]:
    path = file.relative_to(package)
    room = path.parts[0].removesuffix(".py")
    if room not in RANKS and room != "__init__":
        yield f"{path}: {room} is not in the list of rooms"
    if file.stem in SAY_NOTHING:
        yield f"{path}: the name says nothing"
    text = file.read_text(encoding="utf-8")
    if (lines := text.count("\n")) > MAX_LINES:
        yield f"{path}: {lines} lines, at most {MAX_LINES}"
    if path.parts[:2] != ("models", "backbones") and (found := FAMILY.search(text)):
        yield f"{path}: {found.group()}, a class of one family of backbones"
    for line, imported in imports(file, package):
        first, *rest = imported.split(".")
        if first in LIGHTNING and room not in LIGHTNING_ROOMS:
            yield f"{path}:{line}: {room} imports {imported}"
        if rest[-1:] == ["*"]:
            yield f"{path}:{line}: star import of {imported}"
        if first == "luve_lightning" and rest and not _may_import(room, rest[0]):
            yield f"{path}:{line}: {room} imports {imported}"


def _may_import(room: str, other: str) -> bool:
    """Whether a room may import another; the package's own `__init__` imports nothing."""
    return room == other or (RANKS.get(other, len(RANKS)) < RANKS.get(room, 0))


def test_the_package_keeps_the_rules_of_its_house() -> None:
    found = offences(PACKAGE)
    assert not found, "\n".join(found)


def strays(tests: Path, package: Path) -> list[str]:
    """Tests in folders that are named after nothing in the package.

    tests/ROOM/test_NAME.py or test_NAME_MORE.py is of the package's ROOM/NAME.py, or of its folder ROOM/NAME. The
    tests of a GPU lie together, because few machines have one: tests/gpu/test_ROOM.py is of a room, and
    test_ROOM_NAME.py or test_ROOM_NAME_MORE.py as above; where NAME is a folder, MORE may be of a file in it.
    """
    found = []
    for file in sorted(tests.glob("*/**/test_*.py")):
        folder = file.parent.relative_to(tests)
        words = file.stem.removeprefix("test_").split("_")
        if folder == Path("gpu"):
            room, *words = words
            folder = Path(room)
            named = (package / folder).is_dir() and not words
        else:
            named = False
        names = ["_".join(words[:count]) for count in range(1, len(words) + 1)]
        places = [package / folder / name for name in names]
        if not named and not any(place.with_suffix(".py").is_file() or place.is_dir() for place in places):
            found.append(str(file.relative_to(tests)))
    return found


def test_each_test_is_named_after_what_it_tests() -> None:
    found = strays(Path(__file__).parent, PACKAGE)
    assert not found, f"no module for {', '.join(found)}"


def test_a_test_of_nothing_is_found(tmp_path: Path) -> None:
    for name in ("models/vae.py", "models/attention/tiles.py", "losses/terms.py"):
        (tmp_path / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / name).touch()
    good = ["models/test_vae.py", "models/test_vae_more.py", "models/attention/test_tiles.py", "gpu/test_models.py"]
    good += ["gpu/test_models_vae.py", "gpu/test_models_attention_tiles.py", "gpu/test_losses_terms_more.py"]
    bad = ["gpu/attention/test_tiles.py", "gpu/test_attention.py", "gpu/test_losses_more.py", "gpu/test_vae.py"]
    bad += ["losses/test_vae.py", "models/test_more.py"]
    for name in good + bad:
        (tmp_path / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / name).touch()
    assert strays(tmp_path / "tests", tmp_path / "package") == sorted(bad)


def test_every_breach_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules above would be worthless if a form of import were missed."""
    monkeypatch.setattr(sys.modules[__name__], "MAX_FILES", 3)
    monkeypatch.setattr(sys.modules[__name__], "MAX_MODULES", 6)
    files = {
        "__init__.py": "import luve_lightning.functional.y\n",
        **{f"{room}/__init__.py": "" for room in ("functional", "losses", "tasks")},
        "__main__.py": "import luve_lightning\nimport luve_lightning.tasks.vluer\n",
        "attic/z.py": "",
        "functional/y.py": "import torch\n# as WanTransformer3DModel does\n",
        "functional/utils.py": "\n" * 401,
        "functional/x.py": (
            "import lightning.pytorch as pl\nfrom ..tasks import vluer\nfrom . import y\n"
            "def f():\n    from luve_lightning.models.vluer import VLUer\nfrom a import *\n"
        ),
        "losses/w.py": (
            "from luve_lightning import metrics, models\nfrom lightning_fabric import Fabric\nclass Row: ...\n"
        ),
        "tasks/v.py": "from lightning import LightningModule\nimport luve_lightning.losses.w\nRow = dict\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert offences(tmp_path) == [
        "attic: no __init__.py, so that pip would leave it out",
        "7 modules, at most 6",
        "functional: 4 files, at most 3",
        "losses/w.py and tasks/v.py define Row",
        "__init__.py:1: __init__ imports luve_lightning.functional.y",
        "attic/z.py: attic is not in the list of rooms",
        "functional/utils.py: the name says nothing",
        "functional/utils.py: 401 lines, at most 400",
        "functional/x.py:1: functional imports lightning.pytorch",
        "functional/x.py:2: functional imports luve_lightning.tasks.vluer",
        "functional/x.py:6: star import of a.*",
        "functional/x.py:5: functional imports luve_lightning.models.vluer.VLUer",
        "functional/y.py: WanTransformer3DModel, a class of one family of backbones",
        "losses/w.py:1: losses imports luve_lightning.metrics",
        "losses/w.py:2: losses imports lightning_fabric.Fabric",
    ]


def test_the_command_imports_nothing_heavy() -> None:
    program = (
        "import sys, luve_lightning.__main__, luve_lightning.cli\n"
        "print(*sorted({'torch', 'lightning', 'numpy', 'diffusers', 'omegaconf', 'jsonargparse'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def loaded(module: str) -> set[str]:
    """The packages from elsewhere that importing a module of ours imports, ours in between left out."""
    found: set[str] = set()
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        file = next((path for path in (_file(name), _file(f"{name}.__init__")) if path.is_file()), None)
        if not name.startswith("luve_lightning"):
            found.add(name.partition(".")[0])
        elif name not in seen and file is not None:
            seen.add(name)
            waiting += _imported_at_once(file)
            waiting += [name.rpartition(".")[0]]  # Python imports the package first
    return found


def _file(module: str) -> Path:
    return PACKAGE.parent / f"{module.replace('.', '/')}.py"


@cache
def _imported_at_once(file: Path) -> list[str]:
    """What a module imports when it is imported, not in its functions nor for types alone."""
    found: list[str] = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    return found


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        *((f"cli.{verb}", {"torch", "matplotlib"}) for verb in ("report", "ablate", "rehearse")),
        *((f"cli.{verb}", {"diffusers", "torchmetrics", "matplotlib"}) for verb in ("index", "ratings")),
        *((f"cli.{verb}", {"lightning", "torchmetrics"}) for verb in ("generate", "upsample")),
    ],
)
def test_a_verb_imports_nothing_slow_that_it_does_not_need(module: str, unneeded: set[str]) -> None:
    """PyTorch takes one second to import, diffusers three, torchmetrics two, and a GPU's machine several times that."""
    assert "yaml" in loaded("luve_lightning.cli.compose")
    assert {"torch", "lightning"} <= loaded("luve_lightning.cli.training")
    assert not loaded(f"luve_lightning.{module}") & unneeded
