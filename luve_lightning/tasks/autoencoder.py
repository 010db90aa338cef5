"""Training a small VAE, for the mini backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from luve_lightning.functional.fidelity import psnr
from luve_lightning.losses import Loss
from luve_lightning.models.backbones import LatentSpace, family_named, load_backbone
from luve_lightning.tasks.base import TrainingTask


class AutoencoderTask(TrainingTask):
    """Trains a backbone's VAE on video clips: reconstruction in pixels plus a small KL term.

    Args:
        vae: sizes of a new VAE, see the family's `build_vae`; ignored with `init_from`.
        losses: pixel losses by name.
        kl_weight: weight of the mean KL divergence of the posterior from a unit Gaussian.
        init_from: backbone folder whose `vae/` to continue from.
        family: family of a new VAE.
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
        family: str = "wan",
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
            self.family = family_named(family)
            self.vae = self.family.build_vae(vae)
        else:
            if not (Path(init_from) / "vae" / "config.json").is_file():
                raise FileNotFoundError(f"init_from: {init_from} has no vae/config.json")
            backbone = load_backbone(init_from)
            self.family, self.vae = type(backbone), backbone.vae()
        self.losses = torch.nn.ModuleDict(losses)
        self.kl_weight = kl_weight

    @property
    def space(self) -> type[LatentSpace]:
        """The latent space of the VAE in training."""
        return self.family.latent_space_class

    def forward(self, video: Tensor, sample: bool = False) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruct a video (B x 3 x T x H x W in [-1, 1]) from its posterior's mode or a sample."""
        posterior = DiagonalGaussianDistribution(self.space.moments(self.vae, video))
        latents = posterior.sample() if sample else posterior.mode()
        return self.space.pixels(self.vae, latents), posterior

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
            video = batch["video"].to(self.device, self.vae.dtype)  # bfloat16 if that is the run's precision
            z = self.space.moments(self.vae, video).chunk(2, dim=1)[0].double()
            z = z.permute(1, 0, 2, 3, 4).flatten(1)
            count += z.shape[1]
            total = z.sum(1) if total is None else total + z.sum(1)
            square = z.square().sum(1) if square is None else square + z.square().sum(1)
        if total is None or square is None:
            raise ValueError("no batch to measure latent statistics on")
        mean = total / count
        std = (square / count - mean.square()).clamp_min(1e-12).sqrt()
        rounded = ([round(value, 6) for value in values.tolist()] for values in (mean, std))
        self.space.set_statistics(self.vae, *rounded)

    def export(self, folder: Path, datamodule: Any) -> None:
        """Save a backbone folder's `vae/` in fp16, with the latent statistics of the training split.

        Args:
            folder: the backbone folder.
            datamodule: needs `statistics_dataloader()`, the training clips.
        """
        state = {k: v.clone() for k, v in self.vae.state_dict().items()}
        # Round the weights first: the statistics must describe the saved ones.
        self.vae.load_state_dict({k: v.half().float() for k, v in state.items()})
        self.measure_latents(datamodule.statistics_dataloader())
        self.family.save_vae(self.vae, Path(folder), torch.float16)
        self.vae.load_state_dict(state)
