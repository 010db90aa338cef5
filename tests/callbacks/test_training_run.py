"""A run folder has one owner, and keeps what an earlier run left."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from luve_lightning.callbacks import training_run
from luve_lightning.callbacks.provenance import Provenance, configuration_changes
from luve_lightning.callbacks.training_run import LOCK, owned, set_aside, use_one_stream
from luve_lightning.cli import training
from luve_lightning.terminal import Phases
from tests.helpers.resumable import CropsTask
from tests.helpers.run_luve import run_luve
from tests.helpers.tiny_flow import FRAMES, LFE, SIZE, World

_HOLDS = """
import sys, time
from pathlib import Path
from luve_lightning.locks import locked
with locked(Path(sys.argv[1]), what="x"):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def held_by_another_process(folder: Path) -> Iterator[int]:
    """As a live run holds its folder; yields its process id."""
    with subprocess.Popen([sys.executable, "-c", _HOLDS, folder / LOCK], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


@pytest.fixture
def config(tmp_path: Path) -> list[str]:
    file = tmp_path / "run.yaml"
    file.write_text(f"""
trainer:
  {{default_root_dir: {tmp_path / "run"}, max_steps: 2, accelerator: cpu, enable_progress_bar: false}}
model: {{class_path: tests.helpers.tiny.TinyModule}}
data: {{class_path: tests.helpers.tiny.TinyData}}
callbacks: {{keep: {{class_path: luve_lightning.callbacks.Checkpoints}}}}
""")
    return ["--config", str(file)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_live_runs_folder_is_refused_untouched_and_may_be_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: list[str]
) -> None:
    run = tmp_path / "run"
    assert run_luve(capsys, "fit", *config).code == 0
    assert not (run / LOCK).exists()
    saved = contents(run)
    with held_by_another_process(run) as pid:
        lock = contents(run).pop(LOCK)
        for resume in ((), ("--ckpt_path", "last")):
            refused = run_luve(capsys, "fit", *config, *resume)
            assert refused.code == 2
            [line] = refused.error_lines
            assert line.startswith(f"luve fit: error: run folder {run} is in use by process {pid} on ")
            assert line.endswith(": wait for that run to end, or choose another trainer.default_root_dir")
        assert contents(run) == saved | {LOCK: lock}
        for verb in ("validate", "test", "predict"):
            outcome = run_luve(capsys, verb, *config, "--ckpt_path", "last")
            assert outcome.code == 0, outcome.err
        assert saved.items() <= contents(run).items()
    assert run_luve(capsys, "fit", *config, "--ckpt_path", "last").code == 0


def test_a_folder_of_checkpoints_elsewhere_is_owned_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: list[str]
) -> None:
    folder = tmp_path / "elsewhere"
    with held_by_another_process(folder) as pid:
        refused = run_luve(capsys, "fit", *config, "--callbacks.keep.folder", folder)
    assert refused.code == 2
    assert f"error: checkpoint folder {folder} is in use by process {pid} on " in refused.error_lines[-1]


def test_a_refused_run_leaves_no_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path, config: list[str]) -> None:
    assert run_luve(capsys, "fit", *config, "--model.lr", "-1").code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variable", ["NODE_RANK", "GROUP_RANK"])
def test_only_the_first_process_of_a_run_holds_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    with owned(tmp_path):
        monkeypatch.setenv(variable, "1")
        with owned(tmp_path):
            assert (tmp_path / LOCK).read_text().startswith(f'{{"pid": {os.getpid()}, ')


def test_an_earlier_runs_checkpoints_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert set_aside(folder) is None
    folder.mkdir()
    assert set_aside(folder) is None
    for number in (1, 2):
        folder.mkdir(exist_ok=True)
        (folder / "last.ckpt").write_bytes(bytes([number]))
        assert set_aside(folder) == tmp_path / f"checkpoints-{number}"
        assert not folder.exists()
    assert (tmp_path / "checkpoints-1" / "last.ckpt").read_bytes() == b"\x01"
    assert (tmp_path / "checkpoints-2" / "last.ckpt").read_bytes() == b"\x02"


@pytest.fixture
def resumable(tmp_path: Path) -> list[str]:
    file = tmp_path / "resumable.yaml"
    file.write_text(f"""
trainer:
  {{default_root_dir: {tmp_path / "run"}, max_steps: 2, accelerator: cpu, enable_progress_bar: false,
  limit_val_batches: 0, use_distributed_sampler: false, num_sanity_val_steps: 0, enable_model_summary: false}}
model: {{class_path: tests.helpers.resumable.CropsTask}}
data: {{class_path: tests.helpers.resumable.CropsDataModule}}
callbacks:
  keep: {{class_path: luve_lightning.callbacks.Checkpoints}}
  random: {{class_path: luve_lightning.callbacks.RandomState}}
  ema: {{class_path: luve_lightning.callbacks.EMA, init_args: {{decay: 0.9}}}}
""")
    return ["--config", str(file)]


@pytest.mark.slow
def test_every_value_that_a_resume_changes_is_told_or_refused(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path, resumable: list[str]
) -> None:
    assert (outcome := run_luve(capsys, "fit", *resumable)).code == 0, outcome.err
    again = ["fit", *resumable, "--ckpt_path", "last"]
    for words, line in (
        (["--seed_everything", "5"], "seed_everything: the checkpoint's random numbers go on from seed 0, got 5: "),
        (["--data.init_args.batch_size", "3"], "(batch_size was 2, is 3): resume with the same values"),
    ):
        refused = run_luve(capsys, *again, *words, "--trainer.max_steps", 3)
        assert refused.code == 2
        assert line in refused.error_lines[-1]
        assert "callbacks.keep" not in refused.error_lines[-1]  # whose function only lies around the Trainer's loop

    def said(*words: str) -> list[str]:
        caplog.clear()
        with caplog.at_level("INFO"):
            outcome = run_luve(capsys, *again, *words)
        assert outcome.code == 0, outcome.err
        return [message for message in caplog.messages if message.startswith("resuming with")]

    assert said() == []
    assert said("--trainer.max_steps", "3", "--callbacks.ema.decay", "0.5", "--model.nan_rank", "1") == [
        "resuming with model.init_args.nan_rank 1 (the checkpoint had 0), callbacks.ema.init_args.decay 0.5 (the "
        "checkpoint had 0.9)",
        "resuming with steps 3 (the checkpoint had 2)",
    ]
    other = tmp_path / "other.yaml"
    other.write_text("callbacks: {random: null, nan: {class_path: luve_lightning.callbacks.NaNGuard}}")
    assert said("--config", str(other), "--trainer.max_steps", "4", "--seed_everything", "5")[0] == (
        "resuming with seed_everything 5 (the checkpoint had 0), model.init_args.nan_rank 0 (the checkpoint had 1), "
        "callbacks.random none (the checkpoint had RandomState), callbacks.ema.init_args.decay 0.9 (the checkpoint had "
        "0.5), callbacks.nan NaNGuard (the checkpoint had none)"
    )


@pytest.mark.slow
def test_another_loss_weight_and_attention_are_told_once(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path, world: World
) -> None:
    expert = {"backbone": str(world.backbone), "expert": asdict(LFE), "name": "lfe"}
    data = {
        "index": str(world.clips / "clips.csv"), "store": str(world.latents), "backbone": str(world.backbone),
        "size": list(SIZE), "frames": FRAMES, "texts": str(world.texts),
    }  # fmt: skip
    file = tmp_path / "expert.yaml"
    config: dict[str, Any] = {
        "trainer": {"default_root_dir": str(tmp_path / "run"), "max_steps": 1, "accelerator": "cpu",
                    "limit_val_batches": 0, "use_distributed_sampler": False},
        "model": {"class_path": "luve_lightning.tasks.ExpertTask", "init_args": expert},
        "data": {"class_path": "luve_lightning.datamodules.CaptionLatentsDataModule", "init_args": data},
        "callbacks": {"keep": {"class_path": "luve_lightning.callbacks.Checkpoints"}},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(config))
    assert (outcome := run_luve(capsys, "fit", "--config", file)).code == 0, outcome.err
    expert["loss_weight"] = {
        "class_path": "luve_lightning.functional.noise_bands.BellLossWeight", "init_args": {"steps": 500},
    }  # fmt: skip
    expert["attention"] = {"class_path": "tests.helpers.attending.FrameAttention"}
    file.write_text(yaml.safe_dump(config))
    with caplog.at_level("INFO"):
        outcome = run_luve(capsys, "fit", "--config", file, "--ckpt_path", "last", "--trainer.max_steps", 2)
    assert outcome.code == 0, outcome.err
    (line,) = [message for message in caplog.messages if message.startswith("resuming with")]
    assert "loss_weight BellLossWeight(steps=500) (the checkpoint had UniformLossWeight())" in line
    assert line.count("loss_weight") == line.count("attention ") == 1


@pytest.mark.slow
def test_what_is_no_checkpoint_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, resumable: list[str]
) -> None:
    path = tmp_path / "other.ckpt"
    for content, line in (
        ({"state_dict": {}, "args": 1}, f"checkpoint {path} is another program's: it holds state_dict, args; "),
        ({"state_dict": os.system}, f"checkpoint {path} is refused: it holds more than weights and plain values: "),
    ):
        torch.save(content, path)
        refused = run_luve(capsys, "fit", *resumable, "--ckpt_path", path)
        assert refused.code == 2
        assert refused.error_lines[-1].startswith(f"luve fit: error: {line}")
        assert "weights_only" not in refused.err
    refused = run_luve(capsys, "validate", *resumable, "--weights_only", "false", "--ckpt_path", path)
    assert refused.code == 2
    assert "weights_only: unknown key" in refused.error_lines[-1]


@pytest.mark.slow
def test_a_checkpoint_from_elsewhere_replaces_no_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, resumable: list[str]
) -> None:
    """Resumed by its path in a folder that holds another run, whose checkpoints are kept."""
    run, other = tmp_path / "run", tmp_path / "other"
    for folder, steps in ((run, 5), (other, 2)):
        words = ("--trainer.default_root_dir", folder, "--trainer.max_steps", steps)
        assert run_luve(capsys, "fit", *resumable, *words).code == 0
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    again = ["fit", *resumable, "--trainer.max_steps", "3", "--ckpt_path"]
    assert run_luve(capsys, *again, other / "checkpoints" / "last.ckpt").code == 0
    assert (run / "checkpoints-1" / "last.ckpt").read_bytes() == before
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    own = run / "checkpoints" / ".." / "checkpoints" / "last.ckpt"
    assert run_luve(capsys, *again, own, "--trainer.max_steps", 4).code == 0
    assert not (run / "checkpoints-2").exists()


def test_a_run_without_an_end_is_refused(capsys: pytest.CaptureFixture[str], resumable: list[str]) -> None:
    refused = run_luve(capsys, "fit", *resumable, "--trainer.max_steps", -1, "--trainer.max_epochs", -1)
    assert refused.code == 2
    assert "give trainer.max_steps or trainer.max_epochs" in refused.error_lines[-1]


def test_one_of_several_processes_does_not_run_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resumable: list[str]
) -> None:
    """Of `srun -n 2 luve fit` with one device each would write the same files."""
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    refused = run_luve(capsys, "fit", *resumable)
    assert refused.code == 2
    assert "trainer.devices: this is process 1 of several" in refused.error_lines[-1]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_folder_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, found in (("file", "a file"), ("link", "a link to nothing")):
        with (
            pytest.raises(ValueError, match=f"run folder {tmp_path / name} is {found}; expected"),
            owned(tmp_path / name),
        ):
            pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_a_failed_save_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, resumable: list[str]) -> None:
    assert run_luve(capsys, "fit", *resumable).code == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        failed = run_luve(capsys, "fit", *resumable, "--ckpt_path", "last", "--trainer.max_steps", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert failed.code == 2
    assert failed.error_lines[-1] == (
        f"luve fit: error: checkpoint {last} cannot be written: File too large; the earlier one is unchanged"
    )
    assert last.read_bytes() == before


def test_a_run_cannot_start_from_other_weights_on_resume() -> None:
    """Its weights are the checkpoint's; null asks for nothing."""
    changes = configuration_changes(
        {"trainer": {"default_root_dir": "/a"}, "ckpt_path": None, "model": {"x": [1], "out": "/a/x"}},
        {"trainer": {"default_root_dir": "/b"}, "ckpt_path": "last", "model": {"x": [2], "out": "/b/x"}},
    )
    assert changes == {"model.x": ([2], [1])}
    before, after = ({"model": {"init_args": {"init_from": folder}}} for folder in ("old", "new"))
    checkpoint = {"configuration": yaml.safe_dump(before)}
    trainer: Any = SimpleNamespace(state=SimpleNamespace(fn="fit"), callbacks=[])
    module: Any = CropsTask()
    with pytest.raises(ValueError, match=r"init_from: the weights are the checkpoint's, those of new would not be"):
        Provenance("fit", yaml.safe_dump(after)).on_load_checkpoint(trainer, module, checkpoint)
    after["model"]["init_args"]["init_from"] = None  # type: ignore[assignment]
    Provenance("fit", yaml.safe_dump(after)).on_load_checkpoint(trainer, module, checkpoint)


def test_luve_fit_tells_its_phases_and_stops_when_one_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, config: list[str]
) -> None:
    begun, made = list[str](), list[Phases]()

    class Told(Phases):
        def __init__(self, tell: Callable[[str], None]) -> None:
            super().__init__(tell, after=3600)
            made.append(self)

        def begin(self, what: str) -> None:
            super().begin(what)
            begun.append(what)
            self.tell(f"{what} ...")

    monkeypatch.setattr(training, "Phases", Told)
    outcome = run_luve(capsys, "fit", *config)
    assert outcome.code == 0
    assert begun[:2] == ["loading the model", "setting up"]
    assert begun[-2:] == ["loading the first batch", "first step"]
    assert [line for line in outcome.err.splitlines() if line.endswith(" ...")] == [f"luve fit: {x} ..." for x in begun]
    begun.clear()
    assert run_luve(capsys, "fit", *config, "--model.init_args.lr", "-1").code == 2
    assert begun == ["loading the model"]
    assert made[-1]._timer is None


def test_ddp_wraps_the_model_on_the_stream_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(strategy="ddp_find_unused_parameters_true", devices=2, accelerator="cpu", logger=False)
    use_one_stream(trainer.strategy)
    monkeypatch.setattr(trainer.strategy, "determine_ddp_device_ids", lambda: [1])  # as on GPUs
    monkeypatch.setattr(training_run, "DistributedDataParallel", lambda **arguments: arguments)

    def no_stream(*args: Any) -> None:
        raise AssertionError("another stream")

    monkeypatch.setattr(torch.cuda, "Stream", no_stream)
    module = torch.nn.Linear(2, 2)
    module.register_buffer("constant", torch.ones(1), persistent=False)
    own = {"device_ids": [1], "find_unused_parameters": True, "gradient_as_bucket_view": True}
    assert trainer.strategy._setup_model(module) == {"module": module, **own, "broadcast_buffers": False}
    counting = torch.nn.BatchNorm1d(2)
    assert trainer.strategy._setup_model(counting) == {"module": counting, **own, "broadcast_buffers": True}
    trainer.strategy._ddp_kwargs["gradient_as_bucket_view"] = False  # `strategy`'s own arguments
    assert trainer.strategy._setup_model(module)["gradient_as_bucket_view"] is False
    alone = Trainer(accelerator="cpu", logger=False).strategy
    use_one_stream(alone)
    assert type(alone) is SingleDeviceStrategy
