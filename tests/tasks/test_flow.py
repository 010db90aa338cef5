"""What the flow matching tasks share: which noise levels and noise come up, and what is logged of them."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from luve_lightning.functional.noise_bands import BellLossWeight, LogitNormalWeighting, SigmaBand
from luve_lightning.losses import Loss, PixelL1, VelocityLoss, VelocityMSE
from luve_lightning.models.experts import ExpertConfig
from luve_lightning.tasks import FlowMatchingTask
from luve_lightning.tasks.flow import clip_noise, sigma_edges
from tests.helpers.processes import run_processes
from tests.helpers.resumable import Run
from tests.helpers.tiny_flow import Draws, World, make_trainer, read_draws, sigmas, train_expert, validate_and_train
from tests.helpers.tiny_wan import load_transformer, tiny_transformer

TINY = tiny_transformer()


def task(**changes: Any) -> FlowMatchingTask:
    options: dict[str, Any] = {"band": SigmaBand(), "shift": 5.0, "weighting": None, "bins": 5, "seed": 0}
    options |= {"lr": 1e-3, "min_lr": 0.0, "weight_decay": 0.0, "warmup_steps": 0}
    return FlowMatchingTask(TINY, **(options | changes))


@settings(max_examples=60, deadline=None)
@given(
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).filter(lambda b: b[1] - b[0] > 1e-4),
    shift=st.floats(0.5, 20),
    seed=st.integers(0, 2**40),
    step=st.integers(0, 10**6),
    weighted=st.booleans(),
)
def test_no_noise_level_outside_the_band(
    bounds: list[float], shift: float, seed: int, step: int, weighted: bool
) -> None:
    band = SigmaBand(*bounds)
    model = task(band=band, shift=shift, seed=seed, weighting=LogitNormalWeighting() if weighted else None)
    sigma = model.band.sample(200, shift, model.generator(step, 0), weighting=model.weighting)
    assert band.contains(sigma).all()
    assert (sigma >= model.edges[0]).all()
    assert (sigma <= model.edges[-1]).all()


@settings(max_examples=60, deadline=None)
@given(
    one=st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 3)),
    other=st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 3)),
)
def test_noise_follows_from_seed_step_and_part_alone(one: tuple[int, int, int], other: tuple[int, int, int]) -> None:
    def drawn(seed: int, step: int, part: int) -> list[float]:
        return torch.randn(4, generator=task(seed=seed).generator(step, part)).tolist()

    assert drawn(*one) == drawn(*one)
    assert (drawn(*one) == drawn(*other)) == (one == other)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_edges_are_equally_long_in_the_schedule(shift: float) -> None:
    low, high = 0.3, 0.875
    edges = sigma_edges(SigmaBand(low, high), shift, 4).double().numpy()
    unshifted = edges / (edges + (1 - edges) * shift)
    np.testing.assert_allclose(np.diff(unshifted), np.diff(unshifted).mean(), rtol=1e-4)
    np.testing.assert_allclose(edges[[0, -1]], [low, high], rtol=1e-6)


def reference_validation(world: World, band: SigmaBand, shift: float, bins: int) -> dict[str, float]:
    """Mean over clips of |v - (noise - x0)|^2 at the middle of each part, one sample at a time."""
    net = load_transformer(world.backbone)
    data = world.data(batch_size=1)
    data.setup("validate")
    top, bottom = (sigma / (sigma + (1 - sigma) * shift) for sigma in (band.high, band.low))
    losses = defaultdict(list)
    for batch in data.val_dataloader():
        (clip,), x0 = batch["clip_id"], batch["latents"].float()
        for part in range(bins):
            s = bottom + (top - bottom) * (part + 0.5) / bins
            sigma = shift * s / (1 + (shift - 1) * s)
            noise = clip_noise(clip, part, x0.shape[1:])[None]
            with torch.no_grad():
                mixed = (1 - sigma) * x0 + sigma * noise
                v = net(mixed, torch.tensor([1000 * sigma]), batch["text"], return_dict=False)[0]
            losses[part].append((v - (noise - x0)).square().mean().item())
    found = {str(part): float(np.mean(values)) for part, values in losses.items()}
    return found | {"all": float(np.mean(list(losses.values())))}


@pytest.mark.slow
def test_runs_in_one_and_two_processes(world: World, tmp_path: Path) -> None:
    """The same validation whatever the batch size and the processes; each process draws its own noise."""
    world = world.resplit(tmp_path / "world", train="val", val="train", test="test")
    folders = {}
    for name, processes, batch_size in (("one", 1, 3), ("two", 2, 1)):
        options = {"accumulate_grad_batches": 2}
        run = Run(tmp_path / name, steps=2, processes=processes, trainer=options)
        run = run.with_(task={"world": world, "batch_size": batch_size})
        assert run_processes(run, validate_and_train) == [0] * processes, run.folder
        folders[name] = run.folder
    one, two = (json.loads((folder / "validation.json").read_text()) for folder in folders.values())
    want = reference_validation(world, SigmaBand(0.875, 1.0), 5.0, 5)
    parts = [value for name, value in sorted(one.items()) if "sigma" in name]
    assert one == pytest.approx(two, rel=1e-5)
    assert parts == pytest.approx([want[str(part)] for part in range(5)], rel=1e-4)
    assert one["val/loss"] == pytest.approx(want["all"], rel=1e-4)

    draws = [read_draws(folders["two"], rank) for rank in (0, 1)]
    assert [[draw["step"] for draw in rank] for rank in draws] == [[0, 0, 1, 1]] * 2, "two parts a step"
    single = read_draws(folders["one"])
    every = [*single, *draws[0], *draws[1]]
    assert all(0.875 <= sigma <= 1 for sigma in sigmas(every))
    noise = [value for draw in draws[0] + draws[1] for value in draw["noise"]]
    assert len(set(noise)) == len(noise), "a process, step or part repeats another's noise"
    assert len(set(sigmas(draws[0] + draws[1]))) == 8
    # Of rank 0's stream the first number is the first sample's level, whatever comes behind it.
    assert [draw["sigma"][0] for draw in single] == [draw["sigma"][0] for draw in draws[0]]


def bell(sigma: float) -> float:
    """DiffSynth-Studio's weight of a level at shift 5, in plain numbers."""
    x = [5000 * (1 - i / 1000) / (1 + 4 * (1 - i / 1000)) for i in range(1000)]
    y = [float(np.exp(-2 * ((t - 500) / 1000) ** 2)) for t in (*x, 1000 * sigma)]
    return (y[-1] - min(y)) * 1000 / sum(value - min(y) for value in y[:-1])


@pytest.mark.parametrize(
    ("interval", "accumulate", "weighted"), [(1, 1, False), (2, 1, False), (2, 2, False), (1, 1, True), (2, 2, True)]
)
def test_losses_by_noise_level_are_those_since_the_last_line(
    world: World, tmp_path: Path, interval: int, accumulate: int, weighted: bool
) -> None:
    """Unweighted; the weight's mean stands beside them, and only where it is not 1."""
    draws, logger = Draws(tmp_path), CSVLogger(tmp_path, name="", version="")
    trainer = make_trainer(
        tmp_path,
        max_steps=4,
        logger=logger,
        log_every_n_steps=interval,
        accumulate_grad_batches=accumulate,
        callbacks=[draws],
    )
    expert = ExpertConfig("attention", 2, 2, None, SigmaBand(0.0, 1.0))
    model = world.expert(expert, bins=3, lr=1e-2, loss_weight=BellLossWeight() if weighted else None)
    trainer.fit(model, world.data(passes=4))
    logger.save()
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    assert any("weight" in name for name in names) == weighted
    logged = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
    assert len(logged) == 4 // interval
    for row, line in enumerate(logged):
        steps = range(row * interval, (row + 1) * interval)
        since = [draw for draw in draws.seen if draw["step"] in steps]
        assert len(since) == interval * accumulate
        pairs = [p for draw in since for p in zip(draw["sigma"], draw["losses"], strict=True)]
        edges = model.edges.tolist()
        total = 0.0
        for part in range(3):
            inside = [loss for sigma, loss in pairs if edges[part] < sigma <= edges[part + 1]]
            shown = float(line[f"train/loss_sigma_{edges[part]:.3f}-{edges[part + 1]:.3f}"])
            assert shown == pytest.approx(np.mean(inside) if inside else np.nan, rel=1e-5, nan_ok=True)
            total += shown * len(inside) if inside else 0
            if weighted:
                own = [bell(sigma) for sigma, _ in pairs if edges[part] < sigma <= edges[part + 1]]
                shown = float(line[f"train/weight_sigma_{edges[part]:.3f}-{edges[part + 1]:.3f}"])
                assert shown == pytest.approx(np.mean(own) if own else np.nan, rel=1e-4, nan_ok=True)
        assert total / len(pairs) == pytest.approx(np.mean([loss for _, loss in pairs]), rel=1e-5)
        if accumulate == 1:
            weights = [bell(sigma) if weighted else 1.0 for sigma in since[-1]["sigma"]]
            assert float(line["train/loss"]) == pytest.approx(
                np.mean(weights * np.array(since[-1]["losses"])), rel=1e-4
            )


def test_the_weight_is_in_the_gradient_and_not_in_validation(world: World, tmp_path: Path) -> None:
    model, plain = world.expert(loss_weight=BellLossWeight()), world.expert()
    data = world.data()
    data.setup("validate")
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        assert model.fixed_losses(batch) == plain.fixed_losses(batch)
    gradients, draws = {}, Draws(tmp_path)
    for name, chosen in (("weighted", model), ("plain", plain)):
        chosen.load_state_dict(plain.state_dict())
        trainer = make_trainer(tmp_path, max_steps=1, callbacks=[draws] if name == "plain" else [])

        def keep(optimizer: torch.optim.Optimizer, name: str = name, chosen: Any = chosen) -> None:
            del optimizer
            gradients[name] = [p.grad.clone() for p in chosen.parameters() if p.grad is not None]

        chosen.on_before_optimizer_step = keep
        trainer.fit(chosen, world.data(batch_size=1))
    [sigma] = sigmas(draws.seen)
    assert any(gradient.any() for gradient in gradients["plain"])
    for got, want in zip(gradients["weighted"], gradients["plain"], strict=True):
        torch.testing.assert_close(got, bell(sigma) * want, rtol=1e-4, atol=1e-9)


def test_a_resumed_run_says_that_the_weight_differs(world: World) -> None:
    assert world.expert()._schedule()["loss_weight"] == "UniformLossWeight()"
    assert world.expert(loss_weight=BellLossWeight(500))._schedule()["loss_weight"] == "BellLossWeight(steps=500)"


def test_a_run_without_logging(world: World, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, log_every_n_steps=0)
    trainer.fit(world.expert(), world.data())
    assert trainer.global_step == 2


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(world: World, tmp_path: Path) -> None:
    from tests.helpers.resumable import SendSignal, difference, load_final

    whole = Run(tmp_path / "whole", steps=6, every_n_steps=2, accumulate=2, task={"world": world})
    assert run_processes(whole, train_expert) == [0]
    run = whole.with_(folder=tmp_path / "killed")
    assert run_processes(run.with_(callbacks=(SendSignal("SIGKILL", 3),)), train_expert) == [-9]
    assert run_processes(run.with_(resume="last"), train_expert) == [0]
    assert difference(load_final(run), load_final(whole)) is None
    assert load_final(whole)["step"] == 6


def test_mistakes(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected bins >= 1 and seed >= 0, got 0 and 0"):
        task(bins=0)
    with pytest.raises(ValueError, match="expected bins >= 1 and seed >= 0, got 5 and -1"):
        task(seed=-1)
    with pytest.raises(ValueError, match=r"data.texts: expected a store of caption embeddings .* got none"):
        make_trainer(tmp_path, max_steps=1).fit(world.expert(), world.data(texts=None))
    with pytest.raises(ValueError, match="latent height 3: the transformer takes multiples of 2"):
        make_trainer(tmp_path, max_steps=1).fit(world.expert(), world.data(scale=2))


class Absolute(VelocityLoss):
    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).abs().flatten(1).mean(1)


def test_losses_are_a_weighted_sum_sample_by_sample() -> None:
    noise = torch.Generator().manual_seed(0)
    latents, noised = (torch.randn(2, 4, 2, 4, 6, generator=noise) for _ in range(2))
    arguments = latents, torch.randn(2, 3, 8, generator=noise), torch.tensor([0.2, 0.9]), noised
    with torch.no_grad():
        own = task().losses_of(*arguments)
        assert own.shape == (2,)
        assert torch.equal(own, task(losses={"any name": VelocityMSE()}).losses_of(*arguments))
        error = task()((1 - 0.2) * latents[:1] + 0.2 * noised[:1], arguments[2][:1], arguments[1][:1]) - (
            noised[:1] - latents[:1]
        )
        torch.testing.assert_close(own[0], error.square().mean())
        both = task(losses={"square": VelocityMSE(0.5), "absolute": Absolute(2.0)}).losses_of(*arguments)
        torch.testing.assert_close(both[0], 0.5 * error.square().mean() + 2 * error.abs().mean())


@pytest.mark.parametrize(("losses", "wrong"), [({}, "none given"), ({"l1": PixelL1()}, "['l1']")])
def test_losses_of_other_spaces_are_refused(losses: dict[str, Loss], wrong: str) -> None:
    message = f"losses: expected at least one, all in velocity space; wrong: {wrong}"
    with pytest.raises(ValueError, match=re.escape(message)):
        task(losses=losses)


def test_latents_of_other_channels_are_refused() -> None:
    model = task()
    n = model.transformer.config.in_channels
    expected = rf"^the transformer takes {n} latent channels, the latents have 7$"
    with pytest.raises(ValueError, match=expected):
        model(torch.zeros(1, 7, 1, 2, 2), torch.ones(1), torch.zeros(1, 4, 16))
