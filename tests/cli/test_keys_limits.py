"""Sizes that no machine, or not this one, can serve are refused in one line before anything is loaded or started."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from luve_lightning.cli.errors import UsageError
from luve_lightning.cli.generate import generate
from luve_lightning.cli.keys import MOST, check_groups, check_limits, check_trainer
from luve_lightning.machine import MANY_WORKERS, check_memory, check_workers, choose_device, cores, memory
from tests.helpers.run_luve import run_luve
from tests.test_command_line import CONFIG


@pytest.mark.parametrize("key", sorted(MOST))
def test_each_size_has_a_most_that_is_named(key: str) -> None:
    check_limits({"data": {"init_args": {key: MOST[key]}}, key: [MOST[key], 1]})
    with pytest.raises(UsageError, match=rf"^data\.init_args\.{key}: expected at most {MOST[key]}, got"):
        check_limits({"data": {"init_args": {key: [1, MOST[key] + 1]}}})


def test_what_is_no_number_is_none_anywhere() -> None:
    with pytest.raises(UsageError, match=r"^model\.init_args\.lr: expected a number, got nan"):
        check_limits({"model": {"init_args": {"lr": float("nan")}}})
    check_limits({"fps_range": [0, float("inf")]})


@pytest.mark.parametrize("value", [5, [1], True, "five"])
@pytest.mark.parametrize("key", ["guidance", "refine_guidance", "speed"])
def test_a_value_where_keys_belong_is_refused(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^{key}: expected keys inside, such as --{key}\.KEY VALUE, or a file"):
        check_groups({key: value}, generate)
    check_groups({key: {"scale": 3}, "refine_guidance": None, "experts": Path("x")}, generate)


@pytest.mark.parametrize("key", ["num_workers", "processes", "slots"])
def test_processes_follow_the_cores(key: str) -> None:
    most = max(MANY_WORKERS, 4 * cores())
    check_limits({key: most})
    with pytest.raises(UsageError, match=f"^x.{key}: expected . to {most} on a machine of {cores()} core"):
        check_limits({"x": {key: most + 1}})


def test_what_is_no_size_may_be_large() -> None:
    check_limits({"trainer": {"max_steps": 10**9}, "frames": None, "size": True, "name": "1" * 30})


def test_no_documented_command_asks_for_more(repository: Path) -> None:
    """In the headers of experiments and on the pages."""
    pages = [file for name in ("experiments", "docs", "data") for file in (repository / name).rglob("*.*")]
    pages = [file for file in pages if file.suffix in (".md", ".yaml")]
    found = 0
    for page in pages:
        for line in re.findall(r"\bluve [a-z-]+ .*", page.read_text(encoding="utf-8")):
            for key, value in re.findall(r" --([\w.]+)[ =](\d+)\b", line):
                if (name := key.rpartition(".")[2]) in MOST:
                    assert int(value) <= MOST[name], line
                    found += 1
    assert found > 20


def test_memory_is_refused_by_arithmetic() -> None:
    assert 2**20 < memory() < 2**60
    check_memory("a", memory())
    with pytest.raises(ValueError, match=r"^height and width would take at least 1.02e\+03 GiB of memory, there are"):
        check_memory("height and width", 1023 * 2**30, 1022 * 2**30)
    with pytest.raises(ValueError, match="expected 1 to"):
        check_workers("num_workers", 0, 1)


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("gradient_clip_val", -1.0, 0.0),  # it would turn the gradients around
        ("gradient_clip_val", float("nan"), None),
        ("log_every_n_steps", -3, 0),
    ],
)
def test_numbers_that_the_trainer_takes_and_cannot_use(name: str, wrong: float, right: float | None) -> None:
    check_trainer({name: right})
    with pytest.raises(ValueError, match=rf"^trainer\.{name}: expected at least 0, got {wrong}"):
        check_trainer({name: wrong})


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"accelerator": "gpu"}, "trainer.accelerator: there is no gpu here; expected cpu or auto"),
        ({"accelerator": "cuda", "devices": 8}, "trainer.accelerator: there is no cuda here"),
        ({"accelerator": "tpu"}, "trainer.accelerator: there is no tpu here"),
        ({"accelerator": "cpu", "devices": 10**9}, "a device of the CPU is a process; got 1000000000"),
        ({"devices": "4096"}, "a device of the CPU is a process; got 4096"),
    ],
)
def test_the_trainers_devices_must_be_here(options: Mapping[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_trainer(options)


@pytest.mark.parametrize("name", ["meta", "vulkan", "xla:0", "hpu", "0,1", "CPU", ""])
def test_devices_that_are_not_here(name: str) -> None:
    with pytest.raises(ValueError, match=r"^device: .*expected auto, cpu, cuda or cuda:N"):
        choose_device(name)


@pytest.mark.parametrize("key", ["accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch"])
def test_no_interval_of_the_trainer_is_0(key: str) -> None:
    for number in (0, -1, 0.0):
        with pytest.raises(ValueError, match=rf"^trainer\.{key}: expected a number greater than 0, got {number}"):
            check_trainer({key: number})
    check_trainer({key: None})
    check_trainer({key: 1})


def test_what_the_trainer_judges_itself_passes() -> None:
    for options in ({}, {"devices": "auto"}, {"accelerator": "cpu", "devices": 2}, {"accelerator": "banana"}):
        check_trainer(options)
    check_trainer({"devices": -1})
    check_trainer({"devices": [0]})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--trainer.devices", 10**9], "trainer.devices: this machine has"),
        (["--seed_everything", 2**32], "seed_everything: expected at most 4294967295, got 4294967296"),
        (["--seed_everything", -1], "seed_everything: expected 0 to 4294967295, got -1"),
        (["--data.batch_size", 10**9], "data.init_args.batch_size: expected at most 65536, got 1000000000"),
        (["--trainer.num_nodes", 10**9], "trainer.num_nodes: expected at most 10000, got 1000000000"),
    ],
)
def test_fit_refuses_them_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[object], expected: str
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    outcome = run_luve(capsys, "fit", "--config", file, "--trainer.default_root_dir", tmp_path / "run", *words)
    assert outcome.code == 2
    (line,) = outcome.error_lines
    assert line.startswith("luve fit: error: ")
    assert expected in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["generate", "spectra", "mini-world"])
def test_a_video_beyond_memory_is_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, repository: Path, verb: str
) -> None:
    """Each number is allowed by itself; all together are more than any machine has."""
    backbone, output = repository / "data" / "mini" / "wan", tmp_path / "output"
    sizes = ["--height", 65_536, "--width", 65_536]
    words = {
        "generate": ["a boat", "--backbone", backbone, "--num_frames", 99_997, "--scale", 2, *sizes],
        "spectra": ["--prompts", "[a boat]", "--backbone", backbone, "--frames", 99_997, *sizes],
        "mini-world": ["--size", 65_536, "--frames", 99_997],
    }
    outcome = run_luve(capsys, verb, *words[verb], "--output", output)
    assert outcome.code == 2, outcome.err
    assert outcome.error_lines[-1].startswith(
        f"luve {verb}: error: frames, height and width: the pixels of 99997 frames of 65536x65536 would take at least"
    )
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.lr", "null"], "model.init_args.lr: expected float, got null"),
        (["--data.batch_size", "null"], "data.init_args.batch_size: expected int, got null"),
        (["--seed_everything", "null"], "seed_everything: expected 0 to 4294967295, got null"),
    ],
)
def test_null_is_refused_where_it_is_no_value(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], expected: str
) -> None:
    """jsonargparse lets it through, and a loader takes None for a batch size."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    run = ["--trainer.default_root_dir", tmp_path / "run"]
    outcome = run_luve(capsys, "fit", "--config", file, *run, *words)
    assert outcome.code == 2
    assert outcome.error_lines == [f"luve fit: error: {expected}"]
    assert run_luve(capsys, "fit", "--config", file, *run, "--model.backbone", "null").code == 0


def test_null_is_refused_for_a_functions_parameter(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    outcome = run_luve(capsys, "mini-world", "--output", tmp_path / "world", "--seed", "null")
    assert outcome.code == 2
    assert outcome.error_lines == ["luve mini-world: error: seed: expected int, got null"]
