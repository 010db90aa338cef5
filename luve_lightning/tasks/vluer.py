"""Training the VLUer: latent L1 first, then pixels and motion through the VAE's decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from luve_lightning.data.video_index import Split
from luve_lightning.functional.fidelity import psnr
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.losses import Loss
from luve_lightning.machine import gather_mappings
from luve_lightning.models.backbones import load_backbone
from luve_lightning.models.vluer import BaseVLUer, load_vluer
from luve_lightning.tasks.base import TrainingTask


class VLUerTask(TrainingTask):
    """Trains a VLUer on pairs of latents of one clip at two resolutions.

    Phase 1 uses the losses in latent space. From `pixel_from_step` on, phase 2 adds those in pixel space, on a
    crop decoded from both the prediction and the target, so that the decoder's effects at a crop's border are the
    same on both sides. Where the data bring the clip's own pixels (`video_crop` of LatentPairsDataModule), as in the
    released code, those are the target, and `pixel_crop` and `pixel_frames` are not used. The VAE is frozen; gradients
    flow through it.

    Args:
        net: the model.
        backbone: backbone folder or hub id; its VAE decodes the crops.
        losses: losses by name; each says its space.
        pixel_from_step: optimiser step at which phase 2 begins; -1 disables it.
        pixel_crop: latent frames, height and width of the decoded crop (cut to the available size).
        pixel_frames: "random" decodes any frames of the training crop, "first" its first ones.
        pixel_clamp: clamp decoded predictions to [-1, 1], as the VAE's own decoding does: a pixel out of range then
            has no gradient.
        init_from: folder of a saved VLUer of the same class and sizes whose weights to start from.
        codec_dtype: dtype of the VAE's weights, "float32" or "bfloat16".
        seed: seed of the decoded crops' positions.
        lr: see TrainingTask; the released code uses 2e-4.
        min_lr: see TrainingTask.
        weight_decay: see TrainingTask.
        warmup_steps: see TrainingTask.
        betas: see TrainingTask; the released code uses (0.9, 0.999).
    """

    def __init__(
        self,
        net: BaseVLUer,
        backbone: str,
        losses: dict[str, Loss],
        pixel_from_step: int = -1,
        pixel_crop: tuple[int, int, int] = (6, 24, 24),
        pixel_frames: Literal["random", "first"] = "random",
        pixel_clamp: bool = False,
        init_from: str | None = None,
        codec_dtype: str = "float32",
        seed: int = 0,
        lr: float = 2e-4,
        min_lr: float = 1e-7,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        super().__init__(lr, min_lr, weight_decay, warmup_steps, betas)
        if not any(loss.space == "latent" for loss in losses.values()):
            raise ValueError("losses: expected at least one in latent space, phase 1 has nothing else")
        if pixel_from_step < -1:
            raise ValueError(f"pixel_from_step: expected a step, or -1 for never, got {pixel_from_step}")
        if min(pixel_crop) < 1:
            raise ValueError(f"pixel_crop: expected three extents >= 1, got {pixel_crop}")
        if codec_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"codec_dtype: expected float32 or bfloat16, got {codec_dtype!r}")
        self.net = net
        if init_from is not None:
            self.net.load_state_dict(_weights_for(net, init_from))
        self.codec = load_backbone(backbone).latent_space(getattr(torch, codec_dtype))
        if self.codec.channels != net.config.latent_channels:
            raise ValueError(
                f"net has {net.config.latent_channels} latent channels, the VAE of {backbone} has {self.codec.channels}"
            )
        self.losses = torch.nn.ModuleDict(losses)
        self.pixel_from_step, self.pixel_crop, self.seed = pixel_from_step, pixel_crop, seed
        self.pixel_frames, self.pixel_clamp = pixel_frames, pixel_clamp
        self._scores: dict[tuple[float, str], tuple[float, float]] = {}  # from this process's validation clips

    def forward(self, latents: Tensor, size: Size3d) -> Tensor:
        """Upsample normalised latents; see BaseVLUer."""
        return self.net(latents, size)

    def phase(self, step: int) -> int:
        """1 or 2: which losses a step uses."""
        has_pixel = any(loss.space == "pixel" for loss in self.losses.values())
        return 2 if has_pixel and 0 <= self.pixel_from_step <= step else 1

    def crop_window(self, size: Size3d, step: int) -> tuple[slice, slice, slice]:
        """The decoded crop's position in latents of this size: a function of (seed, step) alone."""
        rng = np.random.default_rng([self.seed, step])
        slices = []
        for axis, (n, want) in enumerate(zip(size, self.pixel_crop, strict=True)):
            extent = min(n, want)
            start = 0 if axis == 0 and self.pixel_frames == "first" else int(rng.integers(n - extent + 1))
            slices.append(slice(start, start + extent))
        return slices[0], slices[1], slices[2]

    def decoded_crops(self, prediction: Tensor, batch: Mapping[str, Tensor], step: int) -> tuple[Tensor, Tensor]:
        """Phase 2's pixels: windows of the prediction, decoded, and the same windows of the target.

        Args:
            prediction: B x C x T x h x w.
            batch: "hr", latents of the same shape; perhaps "video" and "window", see LatentPairsDataModule.
            step: optimiser step, which decides the window of a batch without "window".

        Returns:
            The prediction's and the target's, B x 3 x T x H x W; the latter without gradients.
        """
        if "video" in batch:
            pixels = batch["video"]
            windows = [[slice(*axis) for axis in window] for window in batch["window"].tolist()]
            crops = torch.stack([each[:, t, y, x] for each, (t, y, x) in zip(prediction, windows, strict=True)])
        else:
            target = batch["hr"]
            t, y, x = self.crop_window((target.shape[2], target.shape[3], target.shape[4]), step)
            with torch.no_grad():
                pixels = self.codec.decode_differentiable(target[:, :, t, y, x])
            crops = prediction[:, :, t, y, x]
        decoded = self.codec.decode_differentiable(crops)
        return decoded.clamp(-1, 1) if self.pixel_clamp else decoded, pixels

    def on_fit_start(self) -> None:
        """Refuse sizes that the model cannot take, those of held-out clips too, before the first step."""
        super().on_fit_start()
        self.check_data(self.net, "", ("train", "val") if self.trainer.limit_val_batches else ("train",))

    def check_data(self, net: BaseVLUer, what: str, splits: Sequence[Split]) -> None:
        """Refuse sizes of splits that a model cannot take; `what` begins the message."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "grids"):
            return
        for split in splits:
            for low, high in data.grids(split):
                try:
                    net.check_grids(low, high)
                except ValueError as error:
                    of = "crops" if split == "train" else "held-out clips"
                    raise ValueError(f"{what}{of} of {_sides(low)} latents, {_sides(high)} wanted: {error}") from error

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Weighted sum of the active losses."""
        prediction = self(batch["lr"], tuple(batch["hr"].shape[2:]))
        total = torch.stack(self.weighted_terms(prediction, batch)).sum()
        self.log("train/loss", total.detach(), prog_bar=True)
        return total

    def weighted_terms(self, prediction: Tensor, batch: Mapping[str, Any]) -> list[Tensor]:
        """The active losses of a prediction against the batch's own clips, weighted; logs them unweighted."""
        phase = self.phase(self.global_step)
        pixels = self.decoded_crops(prediction, batch, self.global_step) if phase == 2 else None
        terms = {}
        for name, loss in self.losses.items():
            if loss.space == "latent":
                terms[name] = loss(prediction, batch["hr"])
            elif pixels is not None:
                terms[name] = loss(*pixels)
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        self.log("train/phase", float(phase))
        return [self.losses[name].weight * value for name, value in terms.items()]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Latent L1 and PSNR_rgb of each clip against its own latents and pixels."""
        prediction = self(batch["lr"], tuple(batch["hr"].shape[2:])).float()
        distances = (prediction - batch["hr"]).abs().flatten(1).mean(1).tolist()
        fidelities = psnr(self.codec.decode(prediction), batch["video"]).tolist()
        keys = zip(batch["scale"].tolist(), batch["clip_id"], strict=True)
        self._scores.update(zip(keys, zip(distances, fidelities, strict=True), strict=True))

    def on_validation_epoch_end(self) -> None:
        """Means over all clips, per scale and over all.

        Gathered by clip, not logged by batch: a process may not have seen every scale, and Lightning reduces
        logged values by position, whatever their names.
        """
        scores, self._scores = gather_mappings(self._scores), {}
        groups = {"": list(scores.values())}
        for (scale, _), value in scores.items():
            groups.setdefault(f"_x{scale:g}", []).append(value)
        for suffix, values in groups.items():
            for name, column in zip(("latent_l1", "psnr_rgb"), zip(*values, strict=True), strict=True):
                mean = math.fsum(column) / len(column)
                shown = (name, suffix) == ("psnr_rgb", "")
                self.log(f"val/{name}{suffix}", mean, prog_bar=shown, sync_dist=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Nothing: the UpsamplerComparison callback compares with interpolation."""

    def export(self, folder: Path, datamodule: Any) -> None:
        """Save the model for `load_vluer`.

        Args:
            folder: where to.
            datamodule: not needed.
        """
        self.net.save_pretrained(folder)


def _weights_for(net: BaseVLUer, folder: str) -> dict[str, Tensor]:
    """A saved VLUer's weights, if it is of the same class and sizes."""
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(
            f"init_from: {folder}: no config.json there; expected a folder saved by VLUer or `luve convert vluer`"
        )
    given = load_vluer(folder)
    if type(given) is not type(net):
        raise ValueError(f"init_from: {folder} holds a {type(given).__name__}, net is a {type(net).__name__}")
    weights = given.state_dict()
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    differing = sorted(
        name for name in weights.keys() | shapes if name not in weights or weights[name].shape != shapes.get(name)
    )
    if differing:
        raise ValueError(
            f"init_from: {folder} has other sizes than net: {len(differing)} weights, first {differing[0]}"
        )
    return weights


def _sides(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
