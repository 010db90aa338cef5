"""Pictures of what a text-to-video backbone generates while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger

from luve_lightning.callbacks.ema import averaged_weights
from luve_lightning.evaluation.sample_grid import CaptionedVideo, sample_grid
from luve_lightning.models.text import warn_of_cuts


class GeneratedSamples(L.Callback):
    """Generates fixed prompts with the task's `pipeline()` and draws their frames in a grid.

    Drawn by rank zero with the averaged weights, from generators of its own: training's random numbers stay as they
    are. The grids go to `output/step-<optimiser step>.png` after a validation inside `fit`, to `output/test.png` under
    `trainer.test`, and to wandb when that is a logger.

    Args:
        output: folder of the pictures.
        prompts: captions to generate.
        height: of the videos, pixels.
        width: of the videos, pixels.
        frames: of the videos, 4k + 1.
        steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 is none.
        seed: of the first prompt; the next takes the next.
        per_row: videos side by side.
    """

    def __init__(
        self,
        output: Path,
        prompts: list[str],
        height: int,
        width: int,
        frames: int,
        steps: int = 50,
        guidance: float = 5.0,
        seed: int = 0,
        per_row: int = 2,
    ) -> None:
        if not prompts:
            raise ValueError("prompts: expected at least one")
        self.output, self.prompts, self.size = Path(output), list(prompts), (frames, height, width)
        self.steps, self.guidance, self.seed, self.per_row = steps, guidance, seed, per_row

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Draw after a validation inside fit."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._draw(trainer, pl_module, f"step-{trainer.global_step:06d}")

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """A test always draws."""
        self._draw(trainer, pl_module, "test")

    @torch.no_grad()
    def _draw(self, trainer: L.Trainer, pl_module: Any, name: str) -> None:
        if not trainer.is_global_zero:
            return
        frames, height, width = self.size
        with averaged_weights(trainer, pl_module):
            pipeline = pl_module.pipeline()
            pipeline.set_progress_bar_config(disable=True)
            text = pl_module.text_encoder
            warn_of_cuts(text.tokenizer, self.prompts, text.length)
            generators = [torch.Generator("cpu").manual_seed(self.seed + i) for i in range(len(self.prompts))]
            with trainer.precision_plugin.forward_context():
                videos = pipeline(
                    prompt=self.prompts,
                    height=height,
                    width=width,
                    num_frames=frames,
                    num_inference_steps=self.steps,
                    guidance_scale=self.guidance,
                    generator=generators,
                    max_sequence_length=text.length,
                    output_type="np",
                ).frames
        drawn = [
            CaptionedVideo(prompt, (video * 255).round().clip(0, 255).astype(np.uint8))
            for prompt, video in zip(self.prompts, videos, strict=True)
        ]
        path = self.output / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sample_grid(drawn, per_row=self.per_row).save(path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples/generated", [str(path)], step=trainer.global_step)
