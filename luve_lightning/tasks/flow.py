"""Flow matching on latents: the base of training the backbone, the adaptation and the experts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luve_lightning.functional.noise_bands import (
    LossWeight,
    SigmaBand,
    UniformLossWeight,
    Weighting,
    noised,
    sigma_of_index_fraction,
    velocity,
)
from luve_lightning.losses import Loss, VelocityLoss, VelocityMSE
from luve_lightning.machine import gather_mappings
from luve_lightning.models.backbones import denoiser_of, family_of
from luve_lightning.tasks.base import TrainingTask


class FlowMatchingTask(TrainingTask):
    """Trains (parts of) a backbone's transformer to predict velocities at noise levels of one band.

    Batches hold "latents" (B x C x t x h x w, normalised), "clip_id" (unique), and "text" (B x L x D) or what
    `text` turns into it. Noise levels and noise of a training step are functions of (seed, step, process) alone.
    Validation uses fixed noise levels, evenly spaced in the band's part of the schedule, and noise that depends
    only on the clip, so that two models are compared on the same samples. Its losses are unweighted, like those
    logged for parts of the band.

    Args:
        transformer: the model.
        band: noise levels to train on.
        shift: shift of the schedule in which noise levels are drawn; Wan trains and samples with 5 (3 at 480p).
        weighting: density over the schedule's index, see `SigmaBand.sample`; None is uniform, as in LuVe.
        bins: number of equal parts of the band's schedule for which the loss is logged separately; validation uses
            their middles.
        seed: seed of noise levels and noise.
        lr: see TrainingTask.
        min_lr: see TrainingTask.
        weight_decay: see TrainingTask.
        warmup_steps: see TrainingTask.
        losses: losses in velocity space by name; None is flow matching's own, the mean squared error.
        loss_weight: factor of a sample's loss by its noise level, in training alone; None is uniform.
        decay_steps: see TrainingTask.
    """

    def __init__(
        self,
        transformer: nn.Module,
        band: SigmaBand,
        shift: float,
        weighting: Weighting | None,
        bins: int,
        seed: int,
        lr: float,
        min_lr: float,
        weight_decay: float,
        warmup_steps: int,
        losses: dict[str, Loss] | None = None,
        loss_weight: LossWeight | None = None,
        decay_steps: int | None = None,
    ) -> None:
        super().__init__(lr, min_lr, weight_decay, warmup_steps, decay_steps=decay_steps)
        if bins < 1 or seed < 0:
            raise ValueError(f"expected bins >= 1 and seed >= 0, got {bins} and {seed}")
        chosen = {"velocity": VelocityMSE()} if losses is None else losses
        wrong = [name for name, loss in chosen.items() if not isinstance(loss, VelocityLoss)]
        if wrong or not chosen:
            raise ValueError(f"losses: expected at least one, all in velocity space; wrong: {wrong or 'none given'}")
        self.transformer: Any = transformer
        self.denoiser = denoiser_of(transformer)
        self.band, self.shift, self.weighting = band, shift, weighting
        self.bins, self.seed = bins, seed
        self.loss_weight = UniformLossWeight() if loss_weight is None else loss_weight
        self.losses = nn.ModuleDict(chosen)
        self.edges = sigma_edges(band, shift, bins)
        self.schedule = family_of(transformer).build_schedule(shift)
        self._sums = torch.zeros(3, bins, dtype=torch.float64)
        self._between = self.edges[1:-1]
        self._scores: dict[tuple[str, int], float] = {}

    def _schedule(self) -> dict[str, Any]:
        """What a resumed run says when it differs: also the attention and the loss weight."""
        own = {"attention": str(self.denoiser.attention_in_force), "loss_weight": str(self.loss_weight)}
        return super()._schedule() | own

    def text(self, batch: dict[str, Any]) -> Tensor:
        """Caption embeddings of a batch, B x L x D.

        Raises:
            ValueError: when the data gives captions as text.
        """
        if "text" not in batch:
            raise ValueError("data.texts: expected a store of caption embeddings (`luve embed` makes it), got none")
        embeddings: Tensor = batch["text"]
        return embeddings

    def forward(self, latents: Tensor, sigma: Tensor, text: Tensor, condition: Tensor | None = None) -> Tensor:
        """Velocity of noised latents.

        Args:
            latents: B x C x t x h x w at noise levels `sigma`.
            sigma: shape (B,), float32.
            text: B x L x D.
            condition: see `Denoiser.velocity`.

        Raises:
            ValueError: for a size whose last row or column the transformer would drop, or a wrong number of
                channels.
        """
        _, channels, t, h, w = latents.shape
        if self.denoiser.channels != channels:
            raise ValueError(
                f"the transformer takes {self.denoiser.channels} latent channels, the latents have {channels}"
            )
        self.denoiser.token_grid((t, h, w))
        # Embeddings may be stored in another dtype, and a frozen base may be bfloat16.
        dtype = self.denoiser.dtype
        beside = None if condition is None else condition.to(dtype)
        return self.denoiser.velocity(
            latents.to(dtype), self.schedule.timestep_of(sigma), text.to(dtype), condition=beside
        )

    def generator(self, step: int, part: int) -> torch.Generator:
        """Random numbers of one batch: a function of (seed, step, part of an accumulated step, process)."""
        state = np.random.SeedSequence([self.seed, step, part, self.global_rank]).generate_state(2, np.uint32)
        return torch.Generator(self.device).manual_seed((int(state[0]) << 20) ^ int(state[1]))

    def path_of(
        self, batch: dict[str, Any], noise: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Where the straight path that begins at the clean latents ends, and what else the transformer takes.

        A point of the path is (1 - sigma) * clean + sigma * end, and its velocity end - clean; here the end is noise.

        Args:
            batch: a batch.
            noise: standard normal, B x C x t x h x w.
            generator: draws what else is random in training; None in validation, where everything is fixed.

        Returns:
            The path's end, B x C x t x h x w, and further arguments of `forward` by name.
        """
        del batch, generator
        return noise, {}

    def losses_of(self, latents: Tensor, text: Tensor, sigma: Tensor, noise: Tensor, **given: Tensor) -> Tensor:
        """Weighted sum of the losses of each sample at its noise level, shape (B,).

        `noise` is where the path from `latents` ends, `given` what else `forward` takes; see `path_of`.
        """
        prediction, target = self(noised(latents, noise, sigma), sigma, text, **given), velocity(latents, noise)
        losses: Any = self.losses.values()
        return torch.stack([loss.weight * loss.per_sample(prediction, target) for loss in losses]).sum(0)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean weighted loss at random noise levels of the band."""
        latents = batch["latents"].float()
        parts = int(getattr(self.trainer, "accumulate_grad_batches", 1))
        generator = self.generator(self.global_step, batch_idx % parts)
        sigma = self.band.sample(len(latents), self.shift, generator, weighting=self.weighting)
        noise = torch.randn(latents.shape, generator=generator, device=self.device)
        end, given = self.path_of(batch, noise, generator)
        losses = self.losses_of(latents, self.text(batch), sigma, end, **given)
        weights = self.loss_weight(sigma, self.shift)
        self._count(sigma, losses.detach(), weights, ends_step=(batch_idx + 1) % parts == 0)
        loss = (losses * weights).mean()
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def _count(self, sigma: Tensor, losses: Tensor, weights: Tensor, ends_step: bool) -> None:
        """Add to the sums of the band's parts; log and reset them as often as the Trainer logs.

        Losses are logged unweighted, and where the weight is not uniform its mean beside them.
        """
        # Moved once: a copy to a GPU waits until it has done what it was given, which is the forward pass.
        self._between, self._sums = self._between.to(sigma.device), self._sums.to(sigma.device)
        part, sums = torch.bucketize(sigma, self._between), self._sums
        sums[0].index_add_(0, part, losses.double())
        sums[1].index_add_(0, part, torch.ones_like(losses, dtype=torch.float64))
        sums[2].index_add_(0, part, weights.double())
        interval = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        # Lightning keeps what the last part of an accumulated step logs; an interval of 0 disables logging.
        if not ends_step or not interval or (self.global_step + 1) % interval:
            return
        total, count, weight = sums.tolist()
        logged = {"loss": total}
        if not isinstance(self.loss_weight, UniformLossWeight):
            logged["weight"] = weight
        for name, values in logged.items():
            # nan where there was no sample: Lightning would repeat an earlier value.
            means = [value / n if n else math.nan for value, n in zip(values, count, strict=True)]
            self.log_dict({f"train/{name}_{self._name(part)}": mean for part, mean in enumerate(means)})
        self._sums = torch.zeros_like(sums)

    def _name(self, part: int) -> str:
        return f"sigma_{self.edges[part]:.3f}-{self.edges[part + 1]:.3f}"

    def fixed_losses(self, batch: dict[str, Any]) -> dict[tuple[str, int], float]:
        """Losses at the middle of each part of the band, with the clip's own noise, by (clip, part)."""
        latents, text = batch["latents"].float(), self.text(batch)
        found: dict[tuple[str, int], float] = {}
        for part, sigma in enumerate(self.band.levels(self.bins, self.shift).flip(0).tolist()):
            noise = torch.stack([clip_noise(clip, part, latents.shape[1:]) for clip in batch["clip_id"]])
            levels = torch.full((len(latents),), sigma, device=latents.device)
            end, given = self.path_of(batch, noise.to(latents.device), None)
            values = self.losses_of(latents, text, levels, end, **given).tolist()
            found |= {(clip, part): value for clip, value in zip(batch["clip_id"], values, strict=True)}
        return found

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Losses of held-out clips at fixed noise levels with fixed noise."""
        self._scores |= self.fixed_losses(batch)

    def on_validation_epoch_end(self) -> None:
        """Mean over clips and parts, and over clips for each part; gathered by clip."""
        scores, self._scores = gather_mappings(self._scores), {}
        self.log("val/loss", math.fsum(scores.values()) / len(scores), prog_bar=True, sync_dist=True)
        for part in range(self.bins):
            values = [value for (_, p), value in scores.items() if p == part]
            self.log(f"val/loss_{self._name(part)}", math.fsum(values) / len(values), sync_dist=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Nothing: callbacks compare."""


def sigma_edges(band: SigmaBand, shift: float, bins: int) -> Tensor:
    """Edges of parts of the band with equal length in the schedule, rising, shape (bins + 1,)."""
    most, least = band.index_fractions(shift)
    return torch.tensor([sigma_of_index_fraction(float(f), shift) for f in np.linspace(least, most, bins + 1)])


def clip_noise(clip_id: str, part: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise that depends only on its arguments, float32 on the CPU."""
    seed = int.from_bytes(hashlib.sha256(f"{clip_id} {part}".encode()).digest()[:7], "big")
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
