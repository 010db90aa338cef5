"""`luve bench`: its subjects, their options, and what it refuses."""

from __future__ import annotations

import importlib
import inspect
import json

import pytest
import torch

from luve_lightning.cli import verbs
from luve_lightning.cli.costs import bench
from tests.helpers.run_luve import run_luve

SUBJECTS = verbs()["bench"].modules()


def test_each_subject_is_one_module_with_one_typed_function() -> None:
    assert {"vluer", "experts-train", "generate", "unsharp"} <= set(SUBJECTS)
    for module in SUBJECTS.values():
        measure = importlib.import_module(module).measure
        first, second, *options = inspect.signature(measure).parameters.values()
        assert (first.name, second.name) == ("device", "repeats")
        assert second.default >= 1
        assert all(option.default is not inspect.Parameter.empty for option in options)
        assert all(f"{option.name}: " in (inspect.getdoc(measure) or "") for option in (first, second, *options))


def test_help_lists_the_options_of_every_subject(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run_luve(capsys, "bench", "--help").out
    for option in ("subject", "device", "repeats", "output", "batch_size", "videos", "sizes", "vae_dtype", "prompt"):
        assert f"--{option} " in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "subject: required, but not given"),
        (["--subject", "vluers"], "subject: expected one of attention, evaluate, experts, experts-train, "),
        (["--subject", "unsharp", "--vidoes", "3"], "vidoes: unknown key; did you mean 'videos'?"),
        (["--subject", "unsharp", "--videos", "3", "--device", "cpu"], "videos"),
        (["--subject", "vluer-train", "--device", "cpu"], "device: expected a CUDA device"),
        (["--subject", "unsharp", "--device", "cpu", "--repeats", "0"], "repeats: expected at least 1, got 0"),
        (["--subject", "generate", "--device", "cpu", "--vae_dtype", "int8"], "vae_dtype"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    outcome = run_luve(capsys, "bench", *words)
    assert outcome.code == 2, outcome.err
    (line,) = outcome.error_lines
    assert message in line


@pytest.mark.slow
def test_an_option_reaches_its_subject(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_luve(capsys, "bench", "--subject", "experts", "--device", "cpu", "--repeats", 1)
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in outcome.out.splitlines()]
    assert {row["repeats"] for row in rows} == {1}
    outcome = run_luve(capsys, "bench", "--subject", "generate", "--device", "cpu", "--sizes", "8k")
    assert outcome.error_lines[-1].endswith("sizes: expected some of 720p, 2k, 4k, got 8k")


@pytest.mark.parametrize("device", ["0", "xla", "meta"])
def test_refuses_devices_that_are_not_here(device: str) -> None:
    with pytest.raises(ValueError, match=r"^device: .*expected auto, cpu, cuda or cuda:N"):
        bench("unsharp", device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is visible: its absence was not tried")
def test_says_that_there_is_no_gpu() -> None:
    with pytest.raises(ValueError, match="--device cuda: no CUDA device is visible here"):
        bench("experts")
