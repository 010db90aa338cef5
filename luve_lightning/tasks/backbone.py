"""Training a small backbone from scratch: its VAE first, then the transformer with its text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from luve_lightning.data.video_index import VideoIndex
from luve_lightning.files import text_digest
from luve_lightning.functional.fidelity import psnr
from luve_lightning.functional.noise_bands import LossWeight, SigmaBand, Weighting
from luve_lightning.losses import Loss
from luve_lightning.models.attention import Attention
from luve_lightning.models.backbones import LatentSpace, family_named, load_backbone
from luve_lightning.tasks.base import TrainingTask
from luve_lightning.tasks.flow import FlowMatchingTask


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
            raise ValueError(f"losses: expected at least one, all in pixel space; wrong: {wrong or 'none given'}")
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


class BackboneTask(FlowMatchingTask):
    """Trains a text-to-video transformer with its text encoder on captioned latents, at all noise levels.

    The tokenizer has one token for each word of the index's captions.

    Args:
        backbone: folder whose `vae/` made the latents; it becomes part of the export and determines the family.
        index: CSV whose captions give the vocabulary.
        transformer: sizes of the transformer, see the family's `build_denoiser`: for Wan2.1 arguments of
            diffusers' class; the text embeddings' width is added.
        text_encoder: sizes of the text encoder, see the family's `build_text`; the vocabulary's size is added.
        length: tokens per caption, padding included.
        compile: torch.compile backend for the transformer's blocks, such as "inductor"; None compiles nothing. A
            small model's step on a GPU mostly launches kernels, which compiling reduces.
        init_from: folder exported by this task to continue from, instead of `transformer`, `text_encoder` and
            `length`.
        shift: see FlowMatchingTask; the exported scheduler has it, too.
        weighting: see FlowMatchingTask.
        bins: see FlowMatchingTask.
        seed: see FlowMatchingTask.
        lr: see TrainingTask.
        min_lr: see TrainingTask.
        weight_decay: see TrainingTask.
        warmup_steps: see TrainingTask.
        losses: see FlowMatchingTask.
        loss_weight: see FlowMatchingTask.
        attention: replaces the blocks' self-attention, also where the export is loaded; None is the family's own, or
            that of `init_from`.
        decay_steps: see TrainingTask.
    """

    def __init__(
        self,
        backbone: Path,
        index: Path,
        transformer: dict[str, Any],
        text_encoder: dict[str, Any],
        length: int = 64,
        compile: str | None = None,
        init_from: str | None = None,
        shift: float = 5.0,
        weighting: Weighting | None = None,
        bins: int = 5,
        seed: int = 0,
        lr: float = 1e-3,
        min_lr: float = 1e-5,
        weight_decay: float = 0.01,
        warmup_steps: int = 200,
        losses: dict[str, Loss] | None = None,
        loss_weight: LossWeight | None = None,
        attention: Attention | None = None,
        decay_steps: int | None = None,
    ) -> None:
        if not (Path(backbone) / "vae" / "config.json").is_file():
            raise FileNotFoundError(f"backbone: {backbone} has no vae/config.json")
        if init_from is None:
            captions = [text for entry in VideoIndex.open(index).entries for text in entry.captions.values()]
            family = load_backbone(backbone)
            with torch.device("meta"):  # the transformer needs its width, and is the first to draw weights
                width = family.build_text(captions, length, text_encoder).dim
            net = family.build_denoiser(transformer, width)
            encoder = family.build_text(captions, length, text_encoder)
        else:
            start = load_backbone(init_from)
            net, encoder = start.denoiser(), start.text()
        if attention is not None:
            net.use_attention(attention)
        super().__init__(
            net.module, SigmaBand(), shift, weighting, bins, seed, lr, min_lr, weight_decay, warmup_steps, losses,
            loss_weight, decay_steps,
        )  # fmt: skip
        # Loaded modules come frozen and in evaluation mode.
        self.transformer.train()
        if compile is not None:
            self.denoiser.compile_blocks(compile)
        self.text_encoder = encoder.requires_grad_(True).train()
        self.backbone = Path(backbone)
        self._tokens: dict[str, Tensor] = {}  # ids and mask, 2 x 1 x length
        self._told = False

    def text(self, batch: dict[str, Any]) -> Tensor:
        """Embeddings of the batch's captions, with gradients.

        Raises:
            ValueError: when the data gives embeddings.
        """
        if "caption" not in batch:
            raise ValueError("data.texts: expected none, the backbone's own text encoder embeds the captions")
        new = set(batch["caption"]) - self._tokens.keys()
        if not self._told:  # once: a data set's captions are alike
            self._told = self.text_encoder.warn_of_cuts(sorted(new))
        for caption in new:
            self._tokens[caption] = torch.stack(self.text_encoder.tokenize([caption]))
        ids, mask = self._moved(torch.cat([self._tokens[caption] for caption in batch["caption"]], dim=1))
        return self.text_encoder.embed(ids, mask)

    def _moved(self, tokens: Tensor) -> Tensor:
        """On the task's device, in one copy, for which a GPU is not waited for."""
        return tokens.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tokens

    def _vocabulary(self) -> str:
        words = dict(self.text_encoder.vocabulary())
        return text_digest(json.dumps(words, sort_keys=True))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save which words the embeddings belong to: those of other words have the same shapes."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["vocabulary"] = self._vocabulary()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose embeddings belong to other words."""
        super().on_load_checkpoint(checkpoint)
        if checkpoint.get("vocabulary", self._vocabulary()) != self._vocabulary():
            raise ValueError("index: its captions have other words than those that the checkpoint was trained with")

    def export(self, folder: Path, datamodule: Any) -> None:
        """Save a whole backbone folder, weights in fp16.

        Args:
            folder: where to.
            datamodule: not needed.
        """
        family = load_backbone(self.backbone)
        schedule = family.build_schedule(self.shift)
        family.save(Path(folder), self.denoiser, self.text_encoder, schedule, self.backbone, torch.float16)
