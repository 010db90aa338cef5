"""The VLUer's losses in pixel space: their windows, their target and their gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luve_lightning.datamodules import LatentPairsDataModule
from luve_lightning.losses import FrameDifferenceL1, LatentL1, Loss, PixelL1
from luve_lightning.models.backbones import latent_space_of
from luve_lightning.models.vluer import BaseVLUer
from luve_lightning.tasks import VLUerTask
from tests.helpers.released import small_released
from tests.helpers.resumable import Run, train
from tests.helpers.tiny_luve import noise
from tests.helpers.tiny_wan import in_float64
from tests.helpers.upsampling import tiny_vluer


def task(backbone: Path, net: BaseVLUer | None = None, **changes: object) -> VLUerTask:
    losses: dict[str, Loss] = {"latent": LatentL1(), "pixel": PixelL1(), "frame": FrameDifferenceL1()}
    options = {"pixel_from_step": 0, "pixel_crop": (2, 3, 3), "lr": 1e-3} | changes
    return VLUerTask(net or tiny_vluer(), str(backbone), losses, **options)  # type: ignore[arg-type]


def test_the_windows_frames_are_the_first_or_any(tiny_backbone: Path) -> None:
    windows = {
        frames: {task(tiny_backbone, pixel_frames=frames).crop_window((5, 8, 8), step)[0].start for step in range(40)}
        for frames in ("first", "random")
    }
    assert windows == {"first": {0}, "random": {0, 1, 2, 3}}


def test_the_target_is_what_the_data_bring(tiny_backbone: Path) -> None:
    own, prediction, target = task(tiny_backbone), noise(2, 16, 3, 6, 6), noise(2, 16, 3, 6, 6, seed=1)
    own.codec = latent_space_of(in_float64(own.codec.vae))
    windows = torch.tensor([[[0, 2], [0, 3], [3, 6]], [[0, 2], [2, 5], [1, 4]]])
    video = noise(2, 3, 5, 24, 24, seed=2).clamp(-1, 1)
    batch = {"hr": target, "video": video, "window": windows}
    with torch.no_grad():
        got, pixels = own.decoded_crops(prediction, batch, step=0)
        assert pixels is video
        for i, (t, y, x) in enumerate(windows.tolist()):
            crop = prediction[i : i + 1, :, slice(*t), slice(*y), slice(*x)]
            torch.testing.assert_close(got[i : i + 1], own.codec.decode_differentiable(crop), rtol=1e-10, atol=1e-10)
        got, pixels = own.decoded_crops(prediction, {"hr": target}, step=3)
        t, y, x = own.crop_window((3, 6, 6), 3)
        assert torch.equal(pixels, own.codec.decode_differentiable(target[:, :, t, y, x]))
        assert torch.equal(got, own.codec.decode_differentiable(prediction[:, :, t, y, x]))


@pytest.mark.parametrize("clamp", [False, True])
def test_clamped_pixels_out_of_range_have_no_gradient(tiny_backbone: Path, clamp: bool) -> None:
    own = task(tiny_backbone, pixel_clamp=clamp)
    # The VAE with random weights gives grey; the bias takes every pixel out of range.
    own.codec.vae.decoder.conv_out.bias.data += 5
    prediction = noise(1, 16, 3, 6, 6).requires_grad_()
    pixels, _ = own.decoded_crops(prediction, {"hr": noise(1, 16, 3, 6, 6)}, step=0)
    pixels.sum().backward()
    assert (pixels.min() > 1.5) != clamp
    assert prediction.grad is not None
    assert prediction.grad.any() != clamp


def data(clips: Path, latents: Path, backbone: Path, **changes: object) -> LatentPairsDataModule:
    options = {"scales": [2.0], "frames": 9, "crop": (3, 2, 2), "crop_at": "low", "batch_size": 1} | changes
    return LatentPairsDataModule(clips / "clips.csv", latents, str(backbone), (48, 48), **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_training_takes_the_pixels_and_the_betas(
    tmp_path: Path, tiny_backbone: Path, tiny_clips: Path, tiny_latents: Path
) -> None:
    own = task(tiny_backbone, betas=(0.8, 0.999))
    pairs = data(tiny_clips, tiny_latents, tiny_backbone, crop_frames="first", video_crop=(2, 2, 2))
    targets = []
    pairs.on_after_batch_transfer = lambda batch, _: targets.append(batch["video"]) or batch  # type: ignore[func-returns-value]
    seen = []
    own.losses["pixel"].register_forward_pre_hook(lambda _, pixels: seen.append(pixels[1]))
    trainer = train(Run(tmp_path, steps=2), own, pairs)
    assert [group["betas"] for group in trainer.optimizers[0].param_groups] == [(0.8, 0.999)] * 2
    assert len(seen) == 2
    assert all(a is b for a, b in zip(seen, targets, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("validation", [0, 1])
def test_sizes_that_the_network_refuses_end_the_run_before_its_first_step(
    tmp_path: Path, tiny_backbone: Path, tiny_clips: Path, tiny_latents: Path, validation: int
) -> None:
    run = Run(tmp_path, steps=1, trainer={"limit_val_batches": validation})
    with pytest.raises(ValueError, match=r"^crops of 3 x 2 x 2 latents, 3 x 4 x 4 wanted: .* at least 2 latent frames"):
        train(run, task(tiny_backbone, small_released()), data(tiny_clips, tiny_latents, tiny_backbone))
    net = tiny_vluer()

    def no_threes(given: tuple[int, int, int], wanted: tuple[int, int, int]) -> None:
        if given[1] == 3:
            raise ValueError(f"3 rows for {wanted}")

    net.check_grids = no_threes  # type: ignore[method-assign]
    if validation:
        with pytest.raises(ValueError, match=r"^held-out clips of 3 x 3 x 3 latents, 3 x 6 x 6 wanted: 3 rows for"):
            train(run, task(tiny_backbone, net), data(tiny_clips, tiny_latents, tiny_backbone))
    else:
        trainer = train(run, task(tiny_backbone, net), data(tiny_clips, tiny_latents, tiny_backbone))
        assert trainer.global_step == 1
