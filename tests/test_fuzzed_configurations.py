"""Configurations with mistakes end with one line, not with a traceback; see tests/fuzz_configurations.py."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

from luve_lightning.commands import VERBS
from luve_lightning.commands.compose import load, merge
from tests.fuzz_configurations import (
    COUNT_VARIABLE,
    FIRST_VARIABLE,
    REPORT_VARIABLE,
    SEED_VARIABLE,
    Base,
    Outcome,
    fuzz,
    table,
)
from tests.test_experiments import EXPERIMENTS, documented_command, overlays

IN_THE_SUITE = 17
NAMES = (
    "vluer/mini", "experts/mini-adaptation", "experts/mini-lfe", "experts/mini-hfe", "mini/vae", "mini/backbone",
    "precompute/mini", "precompute/mini-variants", "embed/mini", "score/mini", "generate/mini", "upsample/mini",
    "evaluate/mini", "spectra/mini", "report/mini", "dashboards/vluer",
)  # fmt: skip


def bases() -> list[Base]:
    """The mini world's configurations as the overlays make them tiny, and a few verbs without a file."""
    found = []
    for name in NAMES:
        verb, files = documented_command(EXPERIMENTS / f"{name}.yaml")
        tree: dict[str, Any] = {}
        for file in [*files, *overlays(verb, files)]:
            tree = merge(tree, load(file))
        found.append(Base(f"{verb} {name}", verb, without_marks(tree)))
    by_name = {base.name: base for base in found}
    vluer, cascade = by_name["fit vluer/mini"], by_name["generate generate/mini"]
    found += [Base(f"{verb} vluer/mini", verb, vluer.config) for verb in ("validate", "test")]
    keys = (
        "backbone",
        "height",
        "width",
        "num_frames",
        "motion_height",
        "motion_width",
        "scale",
        "steps",
        "shift",
    )
    found.append(Base("plan", "plan", {key: cascade.config[key] for key in keys if key in cascade.config}))
    world = {"output": "${oc.env:TINY_RUN}/world", "train": 1, "val": 1, "test": 1, "frames": 5, "size": 16}
    found.append(Base("mini-world", "mini-world", world | {"processes": 1, "seed": 0, "fps": 16}))
    return found


def without_marks(node: Any) -> Any:
    """A configuration in which what is switched off is null, as a file would have it."""
    if isinstance(node, dict):
        return {key: without_marks(value) for key, value in node.items()}
    if isinstance(node, list):
        return [without_marks(value) for value in node]
    return None if type(node) is object else node


@pytest.mark.timeout(0)  # each case has a limit of its own
def test_mistakes_end_with_one_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_backbone: Path,
    tiny_clips: Path,
    tiny_latents: Path,
    tiny_texts: Path,
    tiny_cascade: Path,
) -> None:
    shared = {"BACKBONE": tiny_backbone, "WORLD": tiny_clips, "LATENTS": tiny_latents, "TEXTS": tiny_texts}
    for name, folder in {**shared, "CASCADE": tiny_cascade}.items():
        monkeypatch.setenv(f"TINY_{name}", str(folder))
    for verb in VERBS.values():  # once here, not in every forked process
        importlib.import_module(verb.module)
    count, seed, first = (
        int(os.environ.get(name, default))
        for name, default in ((COUNT_VARIABLE, IN_THE_SUITE), (SEED_VARIABLE, 0), (FIRST_VARIABLE, 0))
    )
    report = os.environ.get(REPORT_VARIABLE)

    def tell(outcome: Outcome) -> None:
        if report:
            bad = outcome.kind in ("internal", "hang")
            with Path(report).open("a", encoding="utf-8") as file:
                print(outcome if bad else str(outcome).splitlines()[0], file=file)
                if outcome.kind == "refused":
                    print("   ", outcome.text.splitlines()[-1][:400], file=file)

    outcomes = fuzz(bases(), count, seed, first, tmp_path, tell)
    if report:
        with Path(report).open("a", encoding="utf-8") as file:
            print(table(outcomes), file=file)
    bad = [str(outcome) for outcome in outcomes if outcome.kind in ("internal", "hang")]
    assert not bad, "\n\n".join([table(outcomes), *bad])
