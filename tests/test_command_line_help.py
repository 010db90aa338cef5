"""What `luve` says before it does anything: the overview, help, and what it answers without PyTorch."""

from __future__ import annotations

import importlib
import inspect
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from luve_lightning.cli import examples_of, function_name, overview, verbs
from tests.helpers.run_luve import run_luve


def test_overview_lists_every_verb_and_needs_no_torch(repository: Path) -> None:
    program = (
        "import sys; from luve_lightning.__main__ import main\n"
        "code = main(['--help'])\n"
        "heavy = {'torch', 'lightning', 'numpy', 'omegaconf', 'jsonargparse'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        # Set before PyTorch is loaded, or OpenMP does not see it: its threads are not to spin while they wait.
        "import os; assert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'\n"
        "assert os.environ['PYTORCH_CUDA_ALLOC_CONF'] == 'expandable_segments:True'\n"
        "sys.exit(code)"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=False, env=own
    )
    assert done.returncode == 0, done.stderr
    for name, verb in verbs().items():
        assert f"  {name}" in done.stdout
        assert verb.summary in done.stdout
    assert max(map(len, overview().splitlines())) <= 80


def test_a_reader_that_leaves_early_is_no_error(repository: Path) -> None:
    command = f"{sys.executable} -m luve_lightning --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository), "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[0].startswith("usage: luve VERB")
    assert done.stdout.splitlines()[1] in ("0", "141")  # 0 when everything fitted into the pipe


@pytest.mark.parametrize("name", [name for name, verb in verbs().items() if not verb.trainer])
def test_each_function_verb_is_typed_and_documented(name: str) -> None:
    verb = verbs()[name]
    function = getattr(importlib.import_module(verb.module), function_name(name))
    documentation = inspect.getdoc(function) or ""
    assert documentation.partition("\n")[0].endswith(".")
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
        assert f"{parameter.name}: " in documentation


def test_closed_streams_are_not_given_to_files(repository: Path, tmp_path: Path) -> None:
    """With `>&- 2>&-` the first files that are opened would be standard output and error."""
    program = (
        "import sys\n"
        "from luve_lightning.__main__ import main\n"
        "code = main(['fit', '--config', 'nowhere.yaml'])\n"
        "with open(sys.argv[1], 'w') as file:\n"
        "    print(code, file.fileno() > 2, sys.stderr.isatty(), file=file)\n"
    )
    told = tmp_path / "told.txt"
    words = shlex.join([sys.executable, "-c", program, str(told)])
    subprocess.run(["sh", "-c", f"exec {words} <&- >&- 2>&-"], cwd=repository, check=True)
    assert told.read_text() == "2 True False\n"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("mkdir gone; cd gone; rmdir ../gone; {luve} --help", "the current folder no longer exists; change to"),
        ("{luve} --help > /dev/full", "standard output cannot be written: No space left on device"),
    ],
)
def test_neither_a_folder_nor_a_place_to_print(repository: Path, tmp_path: Path, script: str, message: str) -> None:
    if "/dev/full" in script and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    luve = shlex.join([sys.executable, "-m", "luve_lightning"])
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        ["sh", "-c", script.format(luve=luve)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"luve: error: {message}")


def test_help_of_fit_is_short_and_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_luve(capsys, "help", "fit")
    assert outcome.code == 0
    assert outcome.out.startswith("usage: luve fit [--config FILE]... [--key value]...\n\nTrain a model.")
    for expected in ("--ckpt_path", "--callbacks.NAME", "--loggers.NAME", "--seed_everything", "--trainer.help"):
        assert expected in outcome.out
    assert "known subclasses" not in outcome.out
    assert "gradient_clip_val" not in outcome.out
    assert len(outcome.out.splitlines()) < 90
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert run_luve(capsys, "fit", "--help").out == outcome.out


@pytest.mark.parametrize("verb", ["test", "predict", "plan", "bench"])
def test_help_fits_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = run_luve(capsys, verb, "--help")
    assert outcome.code == 0
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_help_of_the_trainer_lists_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_luve(capsys, "fit", "--trainer.help")
    assert outcome.code == 0
    assert "--trainer.max_steps" in outcome.out
    assert "--trainer.gradient_clip_val" in outcome.out
    assert "--trainer.logger" not in outcome.out  # loggers is a dictionary at the top


def test_help_of_verbs_of_two_words(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_luve(capsys, "study", "--help")
    assert outcome.code == 0
    assert "study build" in outcome.out
    assert "study tally" in outcome.out
    assert run_luve(capsys, "help", "study").out == outcome.out
    assert run_luve(capsys, "help").out == overview() + "\n"


def test_the_overview_names_configurations_only_where_they_are(
    monkeypatch: pytest.MonkeyPatch, repository: Path, tmp_path: Path
) -> None:
    monkeypatch.chdir(repository)
    assert "  luve fit --config experiments/vluer/mini.yaml" in overview()
    monkeypatch.chdir(tmp_path)
    assert f"Start here, in {repository}:" in overview()
    monkeypatch.setattr("luve_lightning.cli.PACKAGE_ROOT", tmp_path)  # as pip installs it
    assert ".yaml" not in overview()
    assert "clone the repository" in overview()
    assert ".yaml" not in examples_of("fit")
    assert "in the folder experiments of the repository" in examples_of("fit")


def test_a_wrong_key_is_told_before_pytorch_is_imported(repository: Path) -> None:
    program = (
        "import sys; from luve_lightning.__main__ import main\n"
        "codes = [main(['fit', '--config', 'experiments/vluer/mini.yaml', '--model.lrr', '1']),\n"
        "         main(['generate', 'a boat', '--hieght', '3'])]\n"
        "assert codes == [2, 2], codes\n"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "luve fit: error: model.init_args.lrr: unknown key; did you mean 'lr'?",
        "luve generate: error: hieght: unknown key; did you mean 'height'?",
    ]


def test_a_terminal_is_told_at_once_that_something_loads(repository: Path) -> None:
    program = (
        "import sys; from luve_lightning.cli import run_verb\n"
        "run_verb._say_loading('fit'); run_verb._say_loading('completion')"
    )
    for terminal in (True, False):
        reader, writer = pty.openpty() if terminal else os.pipe()
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=repository, stdout=subprocess.PIPE, stderr=writer, check=True
        )
        os.write(writer, b".")  # something to read, whatever was printed
        printed = os.read(reader, 1000).decode()
        os.close(reader)
        os.close(writer)
        assert printed.splitlines()[0] == ("luve fit: loading ..." if terminal else ".")
        assert done.stdout == b""


def test_help_of_a_class_lists_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_luve(capsys, "fit", "--model.help", "tests.helpers.tiny.TinyModule")
    assert outcome.code == 0
    assert "Step size, > 0. (type: float, default: 0.001)" in outcome.out
    assert run_luve(capsys, "fit", "--model.help", "tests.nope.X").code == 2
