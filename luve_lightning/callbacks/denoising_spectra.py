"""When a text-to-video backbone's frequency bands resolve, recorded while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from luve_lightning.analysis.denoising_spectra import (
    DEFAULT_EDGES,
    BandResolution,
    NoSpectrum,
    check_spectra_options,
    generate_spectra,
    suggest_switch,
    write_spectra,
)
from luve_lightning.callbacks.repeatable import undisturbed
from luve_lightning.callbacks.sample_strips import NowAndThen
from luve_lightning.models.backbones import load_backbone
from luve_lightning.tasks.contracts import TextToVideo


class DenoisingSpectra(NowAndThen):
    """Records how much of each frequency band has appeared at each denoising step of a text-to-video task.

    See `evaluation.denoising_spectra` for the meaning, and for the switch between experts that follows from it.
    Rank zero generates with the averaged weights and generators of its own, so training's random numbers are
    unchanged. A table and a plot go to `output/step-<optimiser step>.csv` and `.png` after a validation inside
    `fit`, and to `output/test.csv` and `.png` under `trainer.test`. The plot also goes to wandb when that is a
    logger, the suggested switch to every logger as `spectra/sigma_switch`.

    Args:
        output: folder of the tables and plots.
        prompts: captions to generate.
        height: height of the videos, pixels.
        width: width of the videos, pixels.
        frames: frames of the videos, 4k + 1.
        every_n_steps: optimiser steps; a validation records when a multiple has passed since the last recording.
        steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 is none.
        seed: seed of the first prompt; each further prompt takes the next.
        edges: edges of the bands, rising fractions of Nyquist; default four equal bands.
        share: share of a band that counts as settled, see `suggest_switch`.
    """

    def __init__(
        self,
        output: Path,
        prompts: list[str],
        height: int,
        width: int,
        frames: int,
        every_n_steps: int,
        steps: int = 50,
        guidance: float = 5.0,
        seed: int = 0,
        edges: list[float] | None = None,
        share: float = 0.5,
    ) -> None:
        self.edges = list(DEFAULT_EDGES) if edges is None else list(edges)
        check_spectra_options(prompts, steps, self.edges, share)
        super().__init__(output, every_n_steps)
        self.prompts, self.size = list(prompts), (frames, height, width)
        self.steps, self.guidance, self.seed, self.share = steps, guidance, seed, share

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a task that cannot generate.

        Raises:
            ValueError: when it is not a TextToVideo.
        """
        if not isinstance(pl_module, TextToVideo):
            raise ValueError(
                f"DenoisingSpectra: {type(pl_module).__name__} cannot generate from a text; BackboneTask can, and "
                "`luve spectra` measures a backbone folder"
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record after a validation inside fit, when one is due."""
        if name := self.due(trainer):
            self._record(trainer, pl_module, name)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record after every test."""
        self._record(trainer, pl_module, "test")

    def _record(self, trainer: L.Trainer, pl_module: Any, name: str) -> None:
        if not trainer.is_global_zero:
            return
        try:
            spectra = self._generate(trainer, pl_module)
        except NoSpectrum as reason:  # a plot must not end the run
            rank_zero_warn(f"no spectra at step {trainer.global_step}: {reason}")
            return
        switch = suggest_switch(spectra, self.share)
        title = f"step {trainer.global_step}, {spectra.videos} videos, guidance {self.guidance:g}"
        _, plot = write_spectra(spectra, switch, self.output, name, title)
        for logger in trainer.loggers:
            logger.log_metrics({"spectra/sigma_switch": switch.sigma}, step=trainer.global_step)
            if isinstance(logger, WandbLogger):
                logger.log_image("spectra/resolved", [str(plot)], step=trainer.global_step)

    def _generate(self, trainer: L.Trainer, pl_module: Any) -> BandResolution:
        task: TextToVideo = pl_module
        with undisturbed(trainer, pl_module):
            backbone = load_backbone(task.backbone)
            schedule = backbone.build_schedule(task.shift)
            with trainer.precision_plugin.forward_context():
                return generate_spectra(
                    task.denoiser,
                    task.text_encoder,
                    schedule,
                    backbone.latent_space(),
                    self.prompts,
                    self.size,
                    self.steps,
                    self.guidance,
                    self.seed,
                    self.edges,
                )
