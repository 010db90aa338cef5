"""`luve bench --subject vluer`: all networks take the sizes that are timed, and a CPU counts what they take."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from luve_lightning.analysis.benchmarks.vluer import DISTILLED, LOW, TARGETS, measure
from luve_lightning.config_files import read_config
from luve_lightning.models.vluer import ReleasedVLUer, VLUer
from tests.helpers.released import small_released

REPOSITORY = Path(__file__).resolve().parents[3]


def test_both_networks_take_the_sizes() -> None:
    with torch.device("meta"):
        nets = [VLUer(), ReleasedVLUer(crop=True)]
    for net, size in itertools.product(nets, TARGETS.values()):
        net.check_grids(LOW, size)
    with pytest.raises(ValueError, match="got 90 x 160"):
        small_released().check_grids(LOW, TARGETS["2K"])


def multiply_adds(net: VLUer, size: tuple[int, int, int]) -> int:
    """Of a VLUer, by its weights: all but the coordinates' are used at every position of one resolution."""
    weights: dict[str, int] = {name: x.numel() for name, x in net.named_parameters() if name.endswith("weight")}
    weights.pop("upsampler.coordinates.weight")
    low = sum(count for name, count in weights.items() if name.startswith(("encoder.", "upsampler.first.")))
    return low * math.prod(LOW) + (sum(weights.values()) - low) * math.prod(size)


def test_a_cpu_counts_what_the_distilled_one_saves() -> None:
    # The released network's rows come last, and take most of the time.
    rows = {(row["role"], row["target"]): row for row in itertools.islice(measure(torch.device("cpu")), 4)}
    with torch.device("meta"):
        nets = {"base": VLUer(), "distilled": VLUer(**DISTILLED)}
    assert rows.keys() == set(itertools.product(nets, TARGETS))
    for (name, net), (target, size) in itertools.product(nets.items(), TARGETS.items()):
        row = rows[name, target]
        assert row["parameters"] == net.num_parameters()
        assert row["tflop"] == pytest.approx(2 * multiply_adds(net, size) / 1e12, rel=1e-3)
        assert ("cheaper" in row) == (name == "distilled")
    for target in TARGETS:
        ratio = rows["base", target]["tflop"] / rows["distilled", target]["tflop"]
        assert rows["distilled", target]["cheaper"] == pytest.approx(ratio, abs=0.01)
        assert ratio >= 5
    assert rows["distilled", "2K"]["parameters"] <= 1_500_000


def test_a_folders_numbers_take_the_place_of_the_usual_ones(tmp_path: Path) -> None:
    VLUer(**DISTILLED | {"pairs": 1}).save_config(tmp_path)
    found = itertools.islice(measure(torch.device("cpu"), distilled=tmp_path), 4)
    rows: dict[Any, Any] = {(row["role"], row["target"]): row for row in found}
    with torch.device("meta"):
        assert rows["distilled", "2K"]["parameters"] == VLUer(**DISTILLED | {"pairs": 1}).num_parameters()
        assert rows["base", "2K"]["parameters"] == VLUer().num_parameters()


@pytest.mark.parametrize("name", ["mini-distilled", "wan2.1-distilled"])
def test_the_distilled_one_is_that_of_the_experiments(name: str) -> None:
    config = read_config(REPOSITORY / "experiments" / "vluer" / f"{name}.yaml")
    assert config["model"]["init_args"]["net"]["init_args"] == DISTILLED
