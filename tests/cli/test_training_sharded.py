"""`luve fit` of a sharded model (FSDP2) stops on one number of processes and goes on with another."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from luve_lightning.callbacks import AtomicCheckpointIO
from tests.helpers.luve_process import LuveProcess, finish_together
from tests.helpers.processes import free_port
from tests.helpers.resumable import difference

REPOSITORY = Path(__file__).resolve().parents[2]
FILE = "experts/adaptation-2k.yaml"
WHOLE = "--trainer.strategy=auto"  # weights that are not sharded
STOP = "--callbacks.signal={class_path: tests.helpers.resumable.SendSignal, init_args: {name: SIGTERM, at_step: %d}}"
LOADED = "--callbacks.loaded={class_path: tests.helpers.resumable.KeepLoaded, init_args: {path: %s}}"


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The adaptation of the recipe, sharded as it is there: four clips, which two processes see in two steps."""
    experiment = yaml.safe_load((REPOSITORY / "experiments" / FILE).read_text())
    trainer = {"strategy": experiment["trainer"]["strategy"], "max_steps": 20, "limit_train_batches": 1.0}
    trainer |= {"limit_val_batches": 0, "default_root_dir": "${oc.env:TINY_RUN}"}
    nothing = {"callbacks": {"record": None}, "loggers": {"wandb": None}}
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": trainer, **nothing}))
    files = [REPOSITORY / "experiments" / FILE, *(REPOSITORY / "tests/conf" / name for name in ("one_step.yaml", FILE))]
    return ["fit", *(f"--config={file}" for file in (*files, overlay))]


def fit(folder: Path, places: Mapping[str, str], processes: int, *words: str, code: int = 143) -> str:
    """Run `luve fit` as torchrun starts it; returns what the first process printed, which ends with `code`."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    common |= {"WORLD_SIZE": str(processes), "TINY_RUN": str(folder), "TORCHDYNAMO_DISABLE": "1", **places}
    folder.parent.mkdir(exist_ok=True)
    logs = [folder.with_name(f"{folder.name}-{rank}.log") for rank in range(processes)]
    options = [*words, f"--trainer.devices={processes}"]
    running = [
        LuveProcess(log, *options, environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, log in enumerate(logs)
    ]
    return finish_together(running, [code] + [0] * (processes - 1))[0]


def checkpoint(file: Path) -> dict[str, Any]:
    return dict(AtomicCheckpointIO().load_checkpoint(file))


def state(file: Path) -> dict[str, Any]:
    """The weights and AdamW's state in a checkpoint."""
    content = checkpoint(file)
    return {"weights": content["state_dict"], "moments": content["optimizer_states"][0]["state"]}


@pytest.mark.slow
def test_on_another_number_of_processes_it_is_refused_in_an_epoch_and_goes_on_at_its_end(
    tmp_path: Path, tiny_places: dict[str, str], words: list[str]
) -> None:
    """Two processes, then one: to the bit what the two had, and steps as one process takes them without sharding."""
    two, last = tmp_path / "two", tmp_path / "two/checkpoints/last.ckpt"
    fit(two, tiny_places, 2, *words, STOP % 0)
    told = fit(two, tiny_places, 1, *words, "--ckpt_path=last", code=2)
    refusal = r"luve fit: error: data: the checkpoint is 1 batch into epoch 0 .*\(processes was 2, is 1\): resume with"
    assert re.search(refusal, told)
    assert "Traceback" not in told
    fit(two, tiny_places, 2, *words, "--ckpt_path=last", STOP % 1)
    for name, more in {"one": [], "whole": [WHOLE]}.items():
        loaded = tmp_path / f"{name}.ckpt"
        told = fit(tmp_path / name, tiny_places, 1, *words, *more, f"--ckpt_path={last}", LOADED % loaded, STOP % 2)
        assert "2 process(es), this run has 1: random numbers start afresh" in told
        assert difference(state(loaded), state(last)) is None
    one, unsharded = (state(tmp_path / name / "checkpoints/last.ckpt") for name in ("one", "whole"))
    assert difference(one, state(last)) is not None
    torch.testing.assert_close(one, unsharded, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "whole"])
def test_one_process_goes_on_as_two(
    tmp_path: Path, tiny_places: dict[str, str], words: list[str], sharded: bool
) -> None:
    """After an epoch, also where the weights of the one were not sharded."""
    last, loaded = tmp_path / "one/checkpoints/last.ckpt", tmp_path / "loaded.ckpt"
    fit(tmp_path / "one", tiny_places, 1, *words, *([] if sharded else [WHOLE]), STOP % 3)
    fit(tmp_path / "two", tiny_places, 2, *words, f"--ckpt_path={last}", LOADED % loaded, STOP % 4)
    assert difference(state(loaded), state(last)) is None
    assert checkpoint(tmp_path / "two/checkpoints/last.ckpt")["global_step"] == 5


@pytest.mark.slow
def test_an_unsharded_checkpoint_of_an_earlier_version_is_refused_with_what_to_do(
    tmp_path: Path, tiny_places: dict[str, str], words: list[str]
) -> None:
    """It numbered AdamW's state by the groups; unsharded it goes on, and from there sharded."""
    last, old = tmp_path / "one/checkpoints/last.ckpt", tmp_path / "old.ckpt"
    fit(tmp_path / "one", tiny_places, 1, *words, WHOLE, STOP % 3)
    content = checkpoint(last)
    [found] = content["optimizer_states"]
    numbers = {
        place: number for number, place in enumerate(n for group in found["param_groups"] for n in group["params"])
    }
    found["state"] = {numbers[place]: own for place, own in found["state"].items()}
    for group in found["param_groups"]:
        group["params"] = [numbers[place] for place in group["params"]]
    torch.save(content, old)
    told = fit(tmp_path / "two", tiny_places, 1, *words, f"--ckpt_path={old}", code=2)
    assert f"luve fit: error: checkpoint {old} cannot be resumed with sharded weights: " in told
    assert "Traceback" not in told
    loaded = tmp_path / "loaded.ckpt"
    fit(tmp_path / "three", tiny_places, 1, *words, WHOLE, f"--ckpt_path={old}", LOADED % loaded, STOP % 4)
    assert difference(state(loaded), state(last)) is None
