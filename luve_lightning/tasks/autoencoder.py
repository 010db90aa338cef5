"""Training a small Wan VAE: what makes the mini backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from luve_lightning.functional.fidelity import psnr
from luve_lightning.losses import Loss
from luve_lightning.models.backbone import load_vae
from luve_lightning.models.building import build
from luve_lightning.models.folders import saving
from luve_lightning.models.wan_whole_clip import decode_whole_clip, encode_whole_clip
from luve_lightning.tasks.base import TrainingTask


class AutoencoderTask(TrainingTask):
    """Trains an `AutoencoderKLWan` on video clips: reconstruction in pixels plus a small KL term.

    Args:
        vae: arguments of `diffusers.AutoencoderKLWan` for a new VAE; ignored with `init_from`.
        losses: pixel losses by name.
        kl_weight: weight of the mean KL divergence of the posterior from a unit Gaussian.
        init_from: a backbone folder whose `vae/` to continue from.
        lr: see TrainingTask.
        min_lr: see TrainingTask.
        weight_decay: see TrainingTask.
        warmup_steps: see TrainingTask.
    """

    def __init__(
        self,
        vae: dict[str, Any],
        losses: dict[str, Loss],
        kl_weight: float = 1e-6,
        init_from: str | None = None,
        lr: float = 1e-3,
        min_lr: float = 1e-5,
        weight_decay: float = 0.0,
        warmup_steps: int = 200,
    ) -> None:
        super().__init__(lr, min_lr, weight_decay, warmup_steps)
        wrong = [name for name, loss in losses.items() if loss.space != "pixel"]
        if wrong or not losses:
            raise ValueError(
                f"losses: expected at least one, all in pixel space; wrong: {wrong or 'none given'}"
            )
        if init_from is None:
            self.vae = build("vae", AutoencoderKLWan, vae)
            _check_colours(self.vae)
        else:
            if not (Path(init_from) / "vae" / "config.json").is_file():
                raise FileNotFoundError(f"init_from: {init_from} has no vae/config.json")
            self.vae = load_vae(init_from)
        self.losses = torch.nn.ModuleDict(losses)
        self.kl_weight = kl_weight

    def forward(self, video: Tensor, sample: bool = False) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruct a video (B x 3 x T x H x W in [-1, 1]) from its posterior's mode or a sample."""
        posterior = DiagonalGaussianDistribution(encode_whole_clip(self.vae, video))
        latents = posterior.sample() if sample else posterior.mode()
        return decode_whole_clip(self.vae, latents), posterior

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Weighted losses plus KL."""
        del batch_idx
        video = batch["video"]
        reconstruction, posterior = self(video, sample=True)
        terms = {name: loss(reconstruction, video) for name, loss in self.losses.items()}
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        total = sum(self.losses[name].weight * value for name, value in terms.items()) + self.kl_weight * kl
        self.log_dict({f"train/{k}": v.detach() for k, v in terms.items()} | {"train/kl": kl.detach()})
        self.log("train/loss", total.detach(), prog_bar=True)
        return total

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """PSNR of the clamped reconstruction in dB, averaged over clips."""
        del batch_idx
        video = batch["video"]
        reconstruction, _ = self(video)
        score = psnr(reconstruction.float().clamp(-1, 1), video)
        self.log("val/psnr", score.mean(), batch_size=len(video), prog_bar=True, sync_dist=True)

    @torch.no_grad()
    def measure_latents(self, videos: Any) -> None:
        """Write the per-channel mean and deviation of the posterior's mode into the VAE's config.

        Args:
            videos: an iterable of batches with "video", from the training split.
        """
        count, total, square = 0, None, None
        for batch in videos:
            video = batch["video"].to(
                self.device, self.vae.dtype
            )  # bfloat16 where that is the run's precision
            z = encode_whole_clip(self.vae, video).chunk(2, dim=1)[0].double()
            z = z.permute(1, 0, 2, 3, 4).flatten(1)
            count += z.shape[1]
            total = z.sum(1) if total is None else total + z.sum(1)
            square = z.square().sum(1) if square is None else square + z.square().sum(1)
        if total is None or square is None:
            raise ValueError("no batch to measure latent statistics on")
        mean = total / count
        std = (square / count - mean.square()).clamp_min(1e-12).sqrt()
        self.vae.register_to_config(
            latents_mean=[round(v, 6) for v in mean.tolist()], latents_std=[round(v, 6) for v in std.tolist()]
        )

    def export(self, folder: Path, datamodule: Any) -> None:
        """Save a backbone folder's `vae/` in fp16, with the latent statistics of the training split.

        Args:
            folder: the backbone folder.
            datamodule: has `statistics_dataloader()`, the training clips.
        """
        state = {k: v.clone() for k, v in self.vae.state_dict().items()}
        # Round the weights first: the statistics must be those of the file.
        self.vae.load_state_dict({k: v.half().float() for k, v in state.items()})
        self.measure_latents(datamodule.statistics_dataloader())
        # Not `from_config`: it puts the class's defaults back for whatever was not given when the VAE was made.
        exported = AutoencoderKLWan(**{k: v for k, v in self.vae.config.items() if not k.startswith("_")})
        exported.load_state_dict(self.vae.state_dict())
        with saving(Path(folder) / "vae") as new:
            exported.half().save_pretrained(new)
        self.vae.load_state_dict(state)


def _check_colours(vae: AutoencoderKLWan) -> None:
    """Refuse other channels than those of three colours, whose pixels `patch_size` folds into more of them."""
    patch = vae.config.patch_size or 1
    for key in ("in_channels", "out_channels"):
        if vae.config[key] != 3 * patch**2:
            raise ValueError(
                f"vae.{key}: expected {3 * patch**2}, three colours in patches of {patch}x{patch}, "
                f"got {vae.config[key]}"
            )
