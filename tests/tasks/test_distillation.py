"""A small VLUer trained on a large one's outputs and features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from luve_lightning.callbacks import AtomicCheckpointIO, StopRequested
from luve_lightning.datamodules import LatentPairsDataModule
from luve_lightning.functional.interpolation import interpolate_latents
from luve_lightning.losses import LatentL1, PixelL1
from luve_lightning.models.vluer import BaseVLUer, VLUer, load_vluer
from luve_lightning.tasks import VLUerDistillationTask
from tests.helpers.released import small_released
from tests.helpers.resumable import Run, SendSignal, difference, load_final, train
from tests.helpers.tiny_luve import noise
from tests.helpers.upsampling import tiny_vluer

FEATURES = {"encoder": "encoder", "encoder.pairs.0": "encoder.pairs.1"}


def large_vluer(latent_channels: int = 16) -> VLUer:
    torch.manual_seed(3)
    net = VLUer(latent_channels, channels=12, pairs=2, hidden=12, layers=1, query_channels=10, decoder_layers=1)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    large_vluer().save_pretrained(folder)
    return folder


def task(backbone: Path, teacher: Path, net: BaseVLUer | None = None, **changes: Any) -> VLUerDistillationTask:
    losses: Any = {"latent": LatentL1(0.25)}
    options: dict[str, Any] = {"teacher_losses": {"output": LatentL1(2.0)}, "feature_weight": 0.1, "samples": 2}
    options |= {"features": FEATURES, "lr": 1e-3}
    return VLUerDistillationTask(net or tiny_vluer(), str(backbone), losses, str(teacher), **(options | changes))


def data(clips: Path, latents: Path, backbone: Path) -> LatentPairsDataModule:
    return LatentPairsDataModule(
        clips / "clips.csv", latents, str(backbone), (48, 48), [1.5, 2.0], 9, crop=(3, 6, 6), batch_size=1, passes=2
    )


def encoder_features(net: Any, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The encoder's output and that of each pair."""
    x, after = net.encoder.conv_in(latents), []
    for pair in net.encoder.pairs:
        after.append(x := pair(x))
    return x, after


def test_the_loss_is_that_of_a_plain_sum(tiny_backbone: Path, teacher: Path) -> None:
    own: Any = task(tiny_backbone, teacher)
    own.log = own.log_dict = lambda *args, **options: None
    low, high = noise(2, 16, 3, 4, 5), noise(2, 16, 3, 6, 8, seed=1)
    with torch.no_grad():
        loss = own.training_step({"lr": low, "hr": high}, 0)
        student, taught = own.net(low, (3, 6, 8)), large_vluer()(low, (3, 6, 8))
        (all_s, after_s), (all_t, after_t) = encoder_features(own.net, low), encoder_features(large_vluer(), low)
        errors = []
        for projection, mine, theirs in zip(own.projections, (all_s, after_s[0]), (all_t, after_t[1]), strict=True):
            weight, bias = projection.weight[:, :, 0, 0, 0], projection.bias
            difference = torch.einsum("oc,bcthw->bothw", weight, mine) + bias[:, None, None, None] - theirs
            errors.append(difference.square().sum() / theirs.square().sum())
        features = (errors[0] + errors[1]) / 2
        wanted = 0.25 * (student - high).abs().mean() + 2 * (student - taught).abs().mean() + 0.1 * features
    torch.testing.assert_close(loss, wanted)


def test_the_features_move_the_student_and_its_projections_alone(tiny_backbone: Path, teacher: Path) -> None:
    own: Any = task(tiny_backbone, teacher, feature_weight=1.0, teacher_losses={})
    own.losses["latent"].weight = 0.0
    own.log = own.log_dict = lambda *args, **options: None
    own.training_step({"lr": noise(1, 16, 3, 4, 5), "hr": noise(1, 16, 3, 6, 8)}, 0).backward()
    assert own.net.encoder.conv_in.weight.grad.any()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in own.projections.parameters())
    assert all(parameter.grad is None for parameter in own.teacher.parameters())
    assert not own.train().teacher.training


def test_the_start_is_nearer_than_chance_and_interpolation(tiny_backbone: Path, teacher: Path) -> None:
    """On latents that the student was not narrowed for; the projections are those of plain least squares."""
    low, size = noise(1, 16, 3, 4, 5, seed=7), (3, 6, 8)
    own: Any = task(tiny_backbone, teacher)
    samples = [(noise(2, 16, 3, 4, 5, seed=s), size) for s in range(4)]
    with torch.no_grad():
        wanted = own.teacher(low, size)
        before = (own.net(low, size) - wanted).square().mean()
        own.begin(samples)
        after = (own.net(low, size) - wanted).square().mean()
        plain = (interpolate_latents(low, size, "bilinear") - wanted).square().mean()
        assert after < 0.8 * min(before, plain)
        seen = [own.features_of(latents, size) for latents, _ in samples]
        for i, projection in enumerate(own.projections):
            mine, theirs = (torch.cat([pairs[i][j] for pairs in seen]).movedim(1, -1).flatten(0, -2) for j in (0, 1))
            known = torch.cat([mine, torch.ones(len(mine), 1)], 1).double()
            solution = torch.linalg.lstsq(known, theirs.double()).solution.float()
            weight = torch.cat([projection.weight[:, :, 0, 0, 0].T, projection.bias[None]])
            torch.testing.assert_close(weight, solution, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_a_run_leaves_the_teacher_alone_and_exports_a_plain_vluer(
    tmp_path: Path, tiny_backbone: Path, tiny_clips: Path, tiny_latents: Path, teacher: Path
) -> None:
    """Also: stopped and resumed, it ends where the whole run does, to the bit."""

    def fit(run: Run) -> VLUerDistillationTask:
        L.seed_everything(0, verbose=False)
        own: Any = task(tiny_backbone, teacher)
        train(run, own, data(tiny_clips, tiny_latents, tiny_backbone))
        return own

    whole = Run(tmp_path / "whole", steps=4, every_n_steps=100)
    own = fit(whole)
    weights = large_vluer().state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in own.teacher.state_dict().items())
    own.export(tmp_path / "vluer", None)
    exported = load_vluer(tmp_path / "vluer")
    assert type(exported) is VLUer
    assert difference(dict(exported.state_dict()), dict(own.net.state_dict())) is None
    numbers = {name: x for name, x in tiny_vluer().config.items() if not name.startswith("_")}
    assert {name: x for name, x in exported.config.items() if not name.startswith("_")} == numbers

    run = whole.with_(folder=tmp_path / "stopped")
    with pytest.raises(StopRequested):
        fit(run.with_(callbacks=(SendSignal("SIGTERM", 1),)))
    saved = AtomicCheckpointIO().load_checkpoint(run.last)
    assert saved["global_step"] == 2
    assert {name.partition(".")[0] for name in saved["state_dict"]} == {"net", "projections"}
    fit(run.with_(resume="last"))
    assert difference(load_final(run), load_final(whole)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"net": tiny_vluer(latent_channels=4)}, r"^net has 4 latent channels, the VAE of .* has 16$"),
        ({"net": small_released()}, r"^net: only a VLUer can be narrowed, got a ReleasedVLUer$"),
        ({"init_from": "here"}, r"^init_from: here: the net starts from its teacher; give start: net to use it$"),
        ({"teacher_losses": {"pixel": PixelL1()}}, r"^teacher_losses: expected losses in latent space.* in pixel$"),
        ({"feature_weight": -1.0}, r"^expected samples >= 1 and feature_weight >= 0, got 2 and -1.0$"),
        ({"features": {"encoder": "brain"}}, r"^features: the teacher has no module 'brain'$"),
        (
            {"features": {"upsampler.last": "encoder"}},
            r"^features: 'upsampler.last' of the net: expected a module that",
        ),
        ({"features": {"upsampler": "encoder"}}, r"^features: 'upsampler' of the net and 'encoder' .* unlike resolut"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny_backbone: Path, teacher: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        task(tiny_backbone, teacher, **changes)


def test_a_teacher_of_other_latents_or_none_is_refused(tmp_path: Path, tiny_backbone: Path) -> None:
    large_vluer(latent_channels=4).save_pretrained(tmp_path / "four")
    with pytest.raises(ValueError, match=r"^teacher: .*/four takes 4 latent channels, net takes 16$"):
        task(tiny_backbone, tmp_path / "four")
    with pytest.raises(FileNotFoundError, match=r"^teacher: .*/none: no config.json there; expected the folder"):
        task(tiny_backbone, tmp_path / "none")


def test_a_released_network_can_teach_crops_that_it_takes(
    tmp_path: Path, tiny_backbone: Path, tiny_clips: Path, tiny_latents: Path
) -> None:
    released = small_released()
    released.save_pretrained(tmp_path / "released")
    own: Any = task(tiny_backbone, tmp_path / "released", start="net", features={"encoder": "encoder.conv_first"})
    assert [projection.weight.shape[:2] for projection in own.projections] == [(12, 8)]
    with pytest.raises(ValueError, match=r"^teacher: crops of 3 x 4 x 4 latents, 3 x 6 x 6 wanted: the released VLUer"):
        train(Run(tmp_path, steps=1), own, data(tiny_clips, tiny_latents, tiny_backbone))
