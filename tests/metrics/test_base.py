"""What holds for every metric of a video."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from luve_lightning.callbacks.sample_metrics import SampleMeter
from luve_lightning.metrics import VideoMetric
from tests.helpers.evaluation_metrics import Fitness
from tests.helpers.processes import run_processes
from tests.helpers.resumable import Run
from tests.helpers.video_metrics import all_metrics, means, measure, random_video


class Layered(VideoMetric):
    """The mean of what a layer says, in the precision it finds."""

    name = "layered"
    resolution = "native"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        nn.init.constant_(self.layer.weight, 1 / 3)
        nn.init.zeros_(self.layer.bias)

    def measure(self, frames: Tensor, reference: Tensor | None) -> Tensor:
        score: Tensor = self.layer(frames.float()).mean()
        assert score.dtype == torch.float32
        assert not score.requires_grad
        return score


@pytest.mark.parametrize("cast", ["to", "half", "bfloat16", "set_dtype"])
def test_neither_the_sums_nor_the_networks_are_cast(cast: str) -> None:
    metric = Layered()
    one, other = random_video(seed=1), random_video(seed=2)
    metric.update(one)
    if cast in ("to", "set_dtype"):
        getattr(metric, cast)(torch.bfloat16)
    else:
        getattr(metric, cast)()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(other)
    assert metric.total.dtype == metric.count.dtype == torch.float64
    assert metric.layer.weight.dtype == torch.float32
    expected = (one.double().mean() + other.double().mean()) / 2
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_device_is_followed() -> None:
    metric = Layered().to("meta")
    assert metric.layer.weight.device.type == metric.total.device.type == "meta"


def test_networks_stay_in_evaluation_mode_and_a_metric_can_be_copied() -> None:
    metric = all_metrics()["subject_consistency"].train()
    assert not metric.training
    assert not any(parameter.requires_grad for parameter in metric.parameters())
    video = random_video()
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert other.score(video) == metric.score(video)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("name", sorted(all_metrics()))
def test_bad_input_is_one_line(name: str) -> None:
    metric, good = all_metrics()[name], random_video()
    for bad in (good.float(), good[0], good.permute(0, 3, 1, 2), good[:0], good.numpy()):
        with pytest.raises(ValueError, match=rf"^{name}: [^\n]+$"):
            metric.score(bad, good)  # type: ignore[arg-type]
    if metric.least_frames > 1:
        with pytest.raises(ValueError, match=rf"^{name}: needs at least 2 frames of a video, got 1 of 40x60$"):
            metric.score(good[:1], good[:1])
    if metric.full_reference:
        with pytest.raises(ValueError, match=rf"^{name}: compares with the original's frames, and none were given$"):
            metric.score(good)
        for wrong in (good[:-1], good.float()):
            with pytest.raises(ValueError, match=rf"^{name}: the original must be uint8 3 x 40 x 60 x 3 [^\n]+$"):
                metric.score(good, wrong)
    with pytest.raises(ValueError, match=rf"^{name}: no video was measured$"):
        metric.compute()


def test_a_metric_of_prompts_needs_one() -> None:
    metric, video = Fitness(), random_video()
    metric.update(video, prompt="number 7")
    assert metric.compute().item() == pytest.approx(video[..., 0].double().mean().item() + 7)
    with pytest.raises(ValueError, match=r"^fitness: depends on the video's prompt, and none was given$"):
        metric.score(video)
    with pytest.raises(ValueError, match=r"^metrics: fit needs each video's prompt: measure it with luve"):
        SampleMeter({"fit": metric}, has_reference=True)


@pytest.mark.slow
def test_two_processes_have_the_means_of_one(tmp_path: Path) -> None:
    run = Run(tmp_path, processes=2, task={"uneven": [[3, 1, 0], [2]], "empty": [[2, 3, 0, 1], []]})
    assert run_processes(run, measure) == [0, 0], (tmp_path / "output-0.txt").read_text()
    measured = json.loads((tmp_path / "means.json").read_text())
    one = means([0, 1, 2, 3])
    assert len(set(one.values())) == len(all_metrics())
    for name in ("uneven", "empty"):
        assert measured[name] == pytest.approx(one, rel=1e-12)
