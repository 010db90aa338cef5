"""Training and generation give the same numbers, to the bit: twice in one checkout, and in two checkouts.

A refactoring must not change a number. Write them down before it and compare after it, on one machine:

    pytest tests/test_same_numbers.py --numbers /tmp/numbers.json     # the file is missing: written
    pytest tests/test_same_numbers.py --numbers /tmp/numbers.json     # it is there: compared

They are kept in no file of the repository, since a processor with other vector instructions rounds otherwise.
"""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.run_luve import run_luve

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS, FEW = 10, 3  # two checkouts are compared over the first; once more in one, three pass the end of an epoch

# The numbers of before were written at shift 5, where the experts meet at 0.875.
AT_SHIFT_5 = ("--model.init_args.shift", "5.0")
# The configuration files of each task, and what differs from its overlays in tests/conf.
TASKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vluer, phase 1": (("vluer/mini.yaml",), ("--model.init_args.pixel_from_step", "1000")),
    "vluer, phase 2": (("vluer/mini.yaml",), ()),
    "adaptation": (("experts/mini-adaptation.yaml",), AT_SHIFT_5),
    "lfe": (("experts/mini-lfe.yaml",), (*AT_SHIFT_5, "--model.init_args.expert.band.low", "0.875")),
    "hfe": (
        ("experts/mini-lfe.yaml", "experts/mini-hfe.yaml"),
        (*AT_SHIFT_5, "--model.init_args.expert.band.high", "0.875"),
    ),
    "vae": (("mini/vae.yaml",), ()),
    "backbone": (("mini/backbone.yaml",), ("--callbacks.samples", "null")),
}

Numbers = dict[str, Any]


@pytest.fixture
def kept(request: pytest.FixtureRequest) -> Path | None:
    """The file of `--numbers`."""
    path = request.config.getoption("--numbers")
    return Path(path) if path else None


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_places: dict[str, str]) -> Path:
    """Sets what the overlays refer to; returns a folder for runs."""
    for name, place in tiny_places.items():
        monkeypatch.setenv(name, place)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb"))
    monkeypatch.chdir(REPOSITORY)
    return tmp_path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def configurations(files: tuple[str, ...], common: tuple[str, ...] = ()) -> list[str]:
    """`--config` for each experiment, then for what makes it tiny."""
    overlays = [Path("tests/conf") / name for name in (*common, *files)]
    paths = [Path("experiments") / name for name in files] + [path for path in overlays if path.is_file()]
    return [word for path in paths for word in ("--config", str(path))]


def trained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, task: str, steps: int
) -> Numbers:
    """Every number that the steps of a task log but times, as hexadecimal, and a digest of what it exports."""
    files, options = TASKS[task]
    monkeypatch.setenv("TINY_RUN", str(folder))
    limits = ("--trainer.max_steps", steps, "--trainer.limit_train_batches", "1.0")
    words = [*configurations(files, ("one_step.yaml",)), "--loggers.wandb", "null", *limits, *options]
    outcome = run_luve(capsys, "fit", *words)
    assert outcome.code == 0, outcome.err
    rows = []
    for log in sorted(folder.rglob("metrics.csv")):
        with log.open(newline="") as file:
            rows += [
                {k: float(v).hex() for k, v in row.items() if v and "time" not in k} for row in csv.DictReader(file)
            ]
    assert len([row for row in rows if any(key.startswith("train/") for key in row)]) >= steps
    weights = [p for p in sorted(folder.rglob("*.safetensors")) if "wandb" not in p.parts]
    return {"logged": rows, "exported": {str(p.relative_to(folder)): digest(p) for p in weights}}


def generated(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> Numbers:
    """Digests of the video and of the stages' latents, whose names depend on where the models lie."""
    monkeypatch.setenv("TINY_RUN", str(folder))
    outcome = run_luve(capsys, "generate", *configurations(("generate/mini.yaml",)), "--shift", "null")
    assert outcome.code == 0, outcome.err
    files = [p for p in sorted(folder.rglob("*")) if p.suffix in (".mp4", ".safetensors")]
    assert files
    return {suffix: sorted(digest(p) for p in files if p.suffix == suffix) for suffix in (".mp4", ".safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("what", [*TASKS, "generate"])
def test_the_numbers_are_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, world: Path, kept: Path | None, what: str
) -> None:
    def once(name: str) -> Numbers:
        if what == "generate":
            return generated(capsys, monkeypatch, world / name)
        return trained(capsys, monkeypatch, world / name, what, FEW if kept is None else STEPS)

    numbers = once("first")
    if kept is None:
        assert once("second") == numbers
        return
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    assert known.setdefault(what, numbers) == numbers
    kept.write_text(json.dumps(known, indent=1))
