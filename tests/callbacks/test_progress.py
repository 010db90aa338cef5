"""What `TrainingProgress` says in a log, and what it shows on a terminal."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.utilities import rank_zero_info

from luve_lightning.callbacks import TrainingProgress
from luve_lightning.callbacks.progress import number
from tests.helpers.tiny import TinyData, TinyModule
from tools.terminal_picture import Terminal


class Talkative(TinyModule):
    """Logs many losses, and says something in the middle."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", 0.25, prog_bar=True)
        self.log_dict({f"train/term{n}": n / 8 for n in range(1, 8)})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/other", 3.0)
        self.log("val/psnr", 21.5, prog_bar=True)


class Ends(L.Callback):
    """Ends a run after its first batch."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = True


def run(
    folder: Path,
    verb: str = "fit",
    *,
    every: int | None = 2,
    ckpt: Any = None,
    callbacks: Sequence[L.Callback] = (),
    **options: Any,
) -> L.Trainer:
    defaults = {"max_steps": 6, "accelerator": "cpu", "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(
        **(defaults | options),
        callbacks=[TrainingProgress(every), *callbacks],
        default_root_dir=folder,
        log_every_n_steps=1,
    )
    getattr(trainer, verb)(Talkative(), datamodule=TinyData(), ckpt_path=ckpt)
    return trainer


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    return out.splitlines()


def counts(lines: list[str]) -> list[str]:
    return [line.partition(",")[0] for line in lines]


def test_a_log_gets_plain_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(tmp_path, val_check_interval=4, num_sanity_val_steps=1)
    lines = said(capsys)
    assert counts(lines) == ["step 2/6", "step 4/6", "step 4", "step 6/6"]
    terms = ", ".join(f"term{n} {number(n / 8)}" for n in range(1, 8))
    assert re.fullmatch(
        rf"step 2/6, \d:\d\d elapsed, \d:\d\d left: loss 0.2500, (loss \S+, )?{terms}.*, lr 1.0e-03", lines[0]
    )
    assert re.fullmatch(r"step 4, validation in \d:\d\d: psnr 21.50, other 3", lines[2])


def test_a_resumed_run_goes_on_at_its_step(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(tmp_path, limit_val_batches=0).save_checkpoint(tmp_path / "a.ckpt")
    said(capsys)
    run(tmp_path, limit_val_batches=0, max_steps=9, every=1, ckpt=tmp_path / "a.ckpt")
    assert counts(said(capsys)) == ["step 7/9", "step 8/9", "step 9/9"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_steps": -1, "max_epochs": 2}, ["step 3/8", "step 6/8", "step 8/8"]),  # four batches an epoch
        ({"max_steps": -1, "max_epochs": 4, "accumulate_grad_batches": 4}, ["step 3/4", "step 4/4"]),
        ({"max_steps": 5, "max_epochs": -1}, ["step 3/5", "step 5/5"]),
    ],
)
def test_steps_of_the_whole_run_are_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: dict[str, Any], expected: list[str]
) -> None:
    run(tmp_path, limit_val_batches=0, every=3, **options)
    assert counts(said(capsys)) == expected


@pytest.mark.slow
def test_a_run_without_an_end_is_timed_by_max_time(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    endless = {"max_steps": -1, "max_epochs": -1, "max_time": {"minutes": 60}}
    run(tmp_path, limit_val_batches=0, every=1, callbacks=[Ends()], **endless)
    first, *_ = said(capsys)
    assert re.match(r"step 1, \d:\d\d elapsed, (1:00:00|59:\d\d) left: loss 0.2500", first)


@pytest.mark.parametrize(("verb", "label"), [("validate", "validation"), ("test", "test"), ("predict", "predict")])
def test_the_other_verbs_count_batches(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str, label: str
) -> None:
    run(tmp_path, verb)
    assert [line for line in counts(said(capsys)) if line.startswith(label)] == [f"{label} 2/4", f"{label} 4/4"]


def test_a_run_of_steps_has_at_least_ten_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(tmp_path, limit_val_batches=0, max_steps=30, every=None)
    assert counts(said(capsys)) == [f"step {step}/30" for step in range(3, 31, 3)]


def test_numbers_keep_four_digits() -> None:
    values = (0.20414, 21.3, 1234.25, 5.0, 0.0, 1e-5, float("nan"), float("inf"))
    assert [number(v) for v in values] == [
        "0.2041", "21.30", "1234", "5", "0", "1.000e-05", "nan", "inf",
    ]  # fmt: skip


# On a terminal: the command itself


# Loading the package takes longer than both runs: one process makes them, and waits for a key in between.
TWO_RUNS = """
import sys
from luve_lightning.__main__ import main
first, second = sys.argv[1:]
assert main(["fit", "--config", first]) == 0
input()
sys.exit(main(["fit", "--config", second]))
"""


def written(folder: Path, steps: int) -> Path:
    """A configuration, in a folder of its own beside what it makes."""
    folder.mkdir()
    config = {
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "max_steps": steps,
            "max_epochs": -1,
            "accelerator": "cpu",
            "val_check_interval": 500,
            "check_val_every_n_epoch": None,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
        },
        "model": {"class_path": "tests.callbacks.test_progress.Interrupting"},
        "data": {"class_path": "tests.helpers.tiny.TinyData"},
        "callbacks": {
            "checkpoints": {"class_path": "luve_lightning.callbacks.Checkpoints"},
            "stop": {"class_path": "luve_lightning.callbacks.GracefulStop"},
            "progress": {"class_path": "luve_lightning.callbacks.TrainingProgress"},
        },
        "loggers": {
            "wandb": {
                "class_path": "lightning.pytorch.loggers.WandbLogger",
                "init_args": {"save_dir": str(folder / "run"), "offline": True},
            }
        },
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder / "tiny.yaml"


class Interrupting(Talkative):
    """Lets others speak while the bar is there."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 20:
            rank_zero_info("said by the log")
            warnings.warn("a warning", stacklevel=1)
            self.print("printed")


@pytest.mark.slow
def test_a_terminal_shows_one_bar_and_then_where_everything_is_also_after_ctrl_c(
    repository: Path, tmp_path: Path
) -> None:
    files = [str(written(tmp_path / "whole", 1200)), str(written(tmp_path / "stopped", 10**6))]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
    terminal = Terminal([sys.executable, "-c", TWO_RUNS, *files], 80, environment=environment, folder=repository)
    moving = re.compile(r"step +\d+/1200 [━╸╺]{10,} \d:\d\d  \d:\d\d left  loss 0.2500")

    def all_there(lines: list[str]) -> bool:
        """The bar in motion below what the run said, which arrives on three ways."""
        # A warning begins with a path of any length, and wraps where that is long.
        said = "said by the log" in lines and "awarning" in "".join(lines).replace(" ", "")
        return said and "printed" in lines and any(map(moving.match, lines))

    assert terminal.wait_for(all_there), terminal.shown()
    shown = terminal.shown()
    (bar,) = _bars(shown)
    assert shown.index(bar) == len([line for line in shown if line]) - 1  # nothing below it, no line wrapped
    assert any(re.match(r"  model +Interrupting, 5 parameters trained, 0 frozen", line) for line in shown)

    next_line = re.compile(r"^  next +luve test .*--ckpt_path last$", re.M | re.S)
    assert terminal.wait_for(lambda lines: next_line.search("\n".join(lines))), terminal.shown()
    everything = terminal.everything()
    assert not _bars(everything)
    for unwanted in ("Epoch", "v_num", "TPU", "FLOPs", "Trainer.fit", "wandb"):
        assert not any(unwanted in line for line in everything), unwanted
    assert [line.partition(" in ")[0] for line in everything if "validation" in line][:2] == [
        "step 500, validation",
        "step 1000, validation",
    ]
    end = "\n".join(terminal.shown())
    assert re.search(r"^luve fit: 1200 of 1200 steps, \d:\d\d, train/loss 0.2500, val/psnr 21.50$", end, re.M)
    assert "run/checkpoints/last.ckpt" in "".join(terminal.shown())  # a path of any length

    terminal.resize(60)
    terminal.type("\n")
    assert terminal.wait_for(lambda lines: re.search(r"^step +[1-9]\d*/1000000 ━*", "\n".join(lines), re.M)), (
        terminal.shown()
    )
    (bar,) = _bars(terminal.shown())
    assert len(bar) <= 58  # ^C is shown behind it
    terminal.type("\x03")
    assert terminal.finish() == 130
    end = "\n".join(terminal.shown())
    assert not _bars(terminal.everything())
    assert "stopped after step" in end
    assert re.search(r"^  next +luve fit .*--ckpt_path last$", end, re.M | re.S)


def _bars(lines: list[str]) -> list[str]:
    return [line for line in lines if "━" in line]
