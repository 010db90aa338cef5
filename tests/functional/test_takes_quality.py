"""How well a clip was taken: measures tell each flaw from its absence, on photographs that set no limit."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from luve_lightning.data.mini_world.paint import paint_take
from luve_lightning.data.mini_world.stage import FLAWS, FlawedScene, StagedScene, draw_stage
from luve_lightning.functional.takes import LIMITS, take_measures, take_quality

# The measure that each flaw moves across its limit.
TELLS = {
    "blurred": "focus",
    "noisy": "noise",
    "blocky": "blocks",
    "dark": "bright",
    "blown": "dark",
    "shaky": "shake",
    "frozen": "still",
    "stuttering": "still",
}


def is_bad(name: str, value: float) -> bool:
    limit, distance = LIMITS[name]
    return (value - limit) / distance < 0


@pytest.fixture(scope="module")
def scenes() -> list[StagedScene]:
    """Of photographs held out whole, with three motions; the limits were set on other photographs."""
    drawn = list(draw_stage("photographs", 3, "test", 3, 17, 192, 16))
    assert len({scene.url for scene in drawn}) == 3
    return drawn


def taken(scene: StagedScene, flaw: str, amount: float) -> Tensor:
    return paint_take(FlawedScene(**{f.name: getattr(scene, f.name) for f in fields(scene)}, flaw=flaw, amount=amount))


def test_a_good_take_is_good(scenes: list[StagedScene]) -> None:
    for scene in scenes:
        frames = paint_take(scene)
        measures = take_measures(frames)
        assert not [name for name in LIMITS if is_bad(name, measures[name])]
        assert take_quality(frames) > 0.7


def test_frames_with_more_changes_than_pytorch_finds_quantiles_of_are_measured_on_a_part(
    scenes: list[StagedScene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As frames wider than 4K are, which are too slow to try here."""
    frames = paint_take(scenes[0])
    expected = take_measures(frames)
    monkeypatch.setattr("luve_lightning.functional.takes._LONGEST", 2**14)
    asked = []
    quantile = Tensor.quantile

    def counting(values: Tensor, share: float, dim: int) -> Tensor:
        asked.append(values.shape[dim])
        return quantile(values, share, dim=dim)

    monkeypatch.setattr(Tensor, "quantile", counting)
    measures = take_measures(frames)
    assert 2**13 < max(asked) <= 2**14
    for name in ("focus", "noise", "bright", "dark"):
        assert measures[name] == pytest.approx(expected[name], rel=0.1)


@pytest.mark.parametrize("flaw", list(FLAWS))
def test_the_smallest_flaw_is_told_by_its_measure(scenes: list[StagedScene], flaw: str) -> None:
    for scene in scenes:
        frames = taken(scene, flaw, FLAWS[flaw][1])
        assert is_bad(TELLS[flaw], take_measures(frames)[TELLS[flaw]])
        assert take_quality(frames) < 0.3


def test_more_of_a_flaw_is_worse(scenes: list[StagedScene]) -> None:
    for flaw in ("blurred", "noisy"):
        values = [take_quality(taken(scenes[0], flaw, share * FLAWS[flaw][1])) for share in (0.2, 0.6, 1.0)]
        assert values == sorted(values, reverse=True)


def test_quality_is_the_product_that_the_docstring_says(scenes: list[StagedScene]) -> None:
    frames = taken(scenes[0], "noisy", 12.0)
    odds = [(value - LIMITS[name][0]) / LIMITS[name][1] for name, value in take_measures(frames).items()]
    assert take_quality(frames) == pytest.approx(math.prod(1 / (1 + math.exp(-value)) for value in odds), rel=1e-5)


def test_measures_are_what_they_are_called() -> None:
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.normal(128, 10, (3, 64, 64, 1)).repeat(3, -1).clip(0, 255).astype(np.uint8))
    assert take_measures(noise)["noise"] == pytest.approx(10, rel=0.4)
    edge = torch.zeros(3, 64, 64, 3, dtype=torch.uint8)
    edge[:, :, 32:] = 200
    measures = take_measures(edge)
    assert measures["focus"] == pytest.approx(1)
    assert measures["bright"] == pytest.approx(200 / 255)
    assert (measures["dark"], measures["still"], measures["shake"]) == (0, 1, 0)
    assert take_measures(torch.full((3, 64, 64, 3), 90, dtype=torch.uint8))["focus"] == 0


@pytest.mark.parametrize(
    "frames", [torch.zeros(2, 64, 64, 3).byte(), torch.zeros(3, 16, 64, 3).byte(), torch.zeros(3, 64, 64, 3)]
)
def test_what_cannot_be_measured_is_refused(frames: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^frames: expected .*, got .*64"):
        take_measures(frames)
