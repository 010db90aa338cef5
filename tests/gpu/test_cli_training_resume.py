"""Runs on a GPU end at a signal and go on: one GPU as if nothing had been; two GPUs with sharded weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luve_lightning.__main__ import main
from luve_lightning.callbacks import AtomicCheckpointIO
from luve_lightning.models.backbones import load_backbone
from tests.helpers.gpu import error
from tests.helpers.gpu_runs import REPOSITORY, GpuWorld, losses, make_world
from tests.helpers.luve_process import LuveProcess, finish_together
from tests.helpers.processes import free_port
from tests.helpers.run_luve import Outcome

STOP = "--callbacks.signal={class_path: tests.helpers.resumable.SendSignal, init_args: {name: SIGTERM, at_step: %d}}"
PARTS = "{class_path: luve_lightning.callbacks.StepParts, init_args: {after: 1}}"
SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
}

# Of gradients' streams and strides, of norms that leave their fused kernel, and of a process group's device and end.
WARNINGS = ("AccumulateGrad", "bucket view", "fused implementation", "ProcessGroup", "process_group", "barrier()")


@pytest.fixture(scope="module")
def gpu_world(tmp_path_factory: pytest.TempPathFactory, tiny_clips: Path) -> GpuWorld:
    """Made by `luve precompute` and `luve embed` in bfloat16."""
    return make_world(tmp_path_factory.mktemp("gpu"), tiny_clips, lambda *words: Outcome(main(list(words)), "", ""))


def checkpoint(run: Path) -> dict[str, Any]:
    return dict(AtomicCheckpointIO().load_checkpoint(run / "checkpoints" / "last.ckpt"))


def new_weights(run: Path) -> list[Tensor]:
    """Those of the expert that start at zero, so that all they are was learnt."""
    found = [x for name, x in sorted(checkpoint(run)["state_dict"].items()) if "lora_B" in name]
    assert found
    return found


def one_command(world: GpuWorld, code: int, *words: str) -> None:
    """Run `luve` as one command, which starts the second process itself; PyTorch and NCCL warn of nothing."""
    places = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | world.environment | {"PYTHONPATH": os.pathsep.join(places), "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-m", "luve_lightning", *words]
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **output) as program:
        try:
            told, _ = program.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            os.killpg(program.pid, signal.SIGABRT)  # each of its processes prints where its threads are
            told, _ = program.communicate()
    assert program.returncode == code, told[-8000:]
    assert warned(told) == []


def two_commands(world: GpuWorld, folder: Path, *words: str) -> None:
    """Run `luve` as torchrun does, in two processes, which import nothing anew; PyTorch and NCCL warn of nothing."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    processes = []
    for rank in ("0", "1"):
        environment = world.environment | common | {"RANK": rank, "LOCAL_RANK": rank}
        processes.append(LuveProcess(folder / f"log-{rank}", *words, environment=environment))
    assert [warned(told) for told in finish_together(processes)] == [[], []]


def warned(text: str) -> list[str]:
    return [line for line in text.splitlines() if any(word in line for word in WARNINGS)]


def test_a_stopped_run_ends_where_an_unbroken_one_does(tmp_path: Path, gpu_world: GpuWorld) -> None:
    common = {"precision": "bf16-mixed", "max_steps": 4, "val_check_interval": 4}
    words = {
        name: gpu_world.words("lfe", tmp_path / f"{name}.yaml", default_root_dir=str(tmp_path / name), **common)
        for name in ("whole", "stopped")
    }
    log, environment = tmp_path / "log", gpu_world.environment
    whole = LuveProcess(log, *words["whole"], environment=environment)
    LuveProcess(tmp_path / "stopped.log", *words["stopped"], STOP % 1, environment=environment).finish(143)
    whole.finish()
    stopped = tmp_path / "stopped"
    assert checkpoint(stopped)["global_step"] == 2
    shutil.rmtree(stopped / "logs")
    LuveProcess(log, *words["stopped"], "--ckpt_path=last", environment=environment).finish()
    assert checkpoint(stopped)["global_step"] == 4
    # Attention's gradients add up in any order, by which AdamW turns the signs of gradients near zero.
    assert error(new_weights(stopped), new_weights(tmp_path / "whole")) < 0.05
    assert losses(stopped) == pytest.approx(losses(tmp_path / "whole")[2:], rel=1e-3)


@pytest.mark.two_gpus
def test_sharded_over_two_gpus(tmp_path: Path, gpu_world: GpuWorld) -> None:
    """The adaptation as one command, which starts the second process itself, goes on as two; its export is whole."""
    run = tmp_path / "run"
    options: dict[str, Any] = {"devices": 2, "strategy": SHARDED, "default_root_dir": str(run)}
    words = gpu_world.words("adaptation", tmp_path / "two.yaml", precision="bf16-mixed", max_steps=3, **options)
    words += ["--model.init_args.recompute=all_but_attention", "--data.init_args.batch_size=1", "--callbacks.ema=null"]

    one_command(gpu_world, 143, *words, STOP % 1)
    assert checkpoint(run)["global_step"] == 2
    two_commands(gpu_world, tmp_path, *words, "--ckpt_path=last")
    assert checkpoint(run)["global_step"] == 3
    exported = load_backbone(run / "export").denoiser().module.state_dict()
    trained = {name.removeprefix("transformer."): x for name, x in checkpoint(run)["state_dict"].items()}
    assert exported.keys() == trained.keys()
    before = load_backbone(gpu_world.environment["TINY_BACKBONE"]).denoiser(torch.float32).module.state_dict()
    assert error(list(trained.values()), [before[name] for name in trained]) > 1e-4


@pytest.mark.two_gpus
@pytest.mark.parametrize("task", ["vluer", "lfe"])
def test_data_parallel_on_two_gpus(tmp_path: Path, gpu_world: GpuWorld, task: str) -> None:
    """Its last step's time is told by its parts: the profiler sees what the processes tell each other."""
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "default_root_dir": str(tmp_path / "run")}
    words = gpu_world.words(task, tmp_path / "two.yaml", precision="bf16-mixed", max_steps=3, **options)
    words += ["--data.init_args.batch_size=1", "--callbacks.ema=null", f"--callbacks.parts={PARTS}"]
    if task == "lfe":
        one_command(gpu_world, 0, *words)  # to the end of its interpreter, where process groups warn, too
    else:
        two_commands(gpu_world, tmp_path, *words)
    assert checkpoint(tmp_path / "run")["global_step"] == 3
    found = json.loads((tmp_path / "run/measured.json").read_text())
    assert found["done"] == 1
    for own in found["parts"]["ranks"]:
        assert own["communication"] + own["waiting"] + own["hidden"] > 0
        parts = ("data", "compute", "communication", "waiting", "optimizer")
        assert sum(own[name] for name in parts) == pytest.approx(own["seconds"], abs=1e-4)
        assert min(own[name] for name in (*parts, "hidden")) >= 0
