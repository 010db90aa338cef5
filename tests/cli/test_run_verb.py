"""What is silenced, and what is not."""

from __future__ import annotations

import gc
import importlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from luve_lightning.cli import run_verb
from luve_lightning.cli.run_verb import quieten
from tests.helpers.run_luve import run_luve

LOADING = """
import sys, time
from luve_lightning.cli.run_verb import quieten
quieten()
assert not {"torch", "lightning", "transformers", "diffusers", "wandb", "tqdm"} & set(sys.modules)
from tqdm.auto import tqdm
bar = tqdm(total=2, desc="Loading weights")
bar.start_t -= float(sys.argv[1])  # so many seconds ago
bar.update(2)
bar.close()
"""


@pytest.mark.parametrize(("seconds", "shown"), [(1, False), (60, True)])
def test_a_library_shows_a_bar_when_something_is_slow(repository: Path, seconds: int, shown: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(seconds)], cwd=repository, capture_output=True, text=True, check=True
    )
    assert ("Loading weights" in done.stderr) == shown


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("TPU available: False, using: 0 TPU cores", False),
        ("[rank: 1] Seed set to 0", False),
        ("`Trainer.fit` stopped: `max_steps=12` reached.", False),
        ("Initializing distributed: GLOBAL_RANK: 1, MEMBER: 2/2", False),
        (f"{'-' * 100}\ndistributed_backend=gloo\nAll distributed processes registered.", False),
        ("`Trainer(limit_val_batches=1)` was configured so 1 batch will be used.", False),
        ("You are using a CUDA device ('NVIDIA H100') that has Tensor Cores. To properly utilize them, you", False),
        ("Using bfloat16 Automatic Mixed Precision (AMP)", False),
        ("Time limit reached. Elapsed time is 0:08:00. Signaling Trainer to stop.", True),
        ("train: 3 clips have no latents, first abc", True),
    ],
)
def test_lightning_says_what_matters(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, message: str, kept: bool
) -> None:
    monkeypatch.setenv("TQDM_DELAY", "10")  # undone afterwards
    quieten()
    with caplog.at_level("INFO"):
        for name in ("pytorch.utilities.rank_zero", "pytorch.accelerators.cuda", "fabric.utilities.seed"):
            logging.getLogger(f"lightning.{name}").info(message)
    assert caplog.messages == [message] * 3 * kept


def test_garbage_is_not_collected_while_a_verb_is_imported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    collecting: dict[str, bool] = {}
    real = importlib.import_module

    def look(name: str) -> object:
        collecting.setdefault(name, gc.isenabled())
        return real(name)

    monkeypatch.setattr(run_verb.importlib, "import_module", look)
    assert run_luve(capsys, "completion", "bash").code == 0
    assert collecting["luve_lightning.cli.parsing"] is False
    assert gc.isenabled()
