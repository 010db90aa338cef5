"""Pictures of what a model makes during training: strips of samples, and spectra of denoising."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from luve_lightning.callbacks.repeatable import undisturbed
from luve_lightning.evaluation.denoising_spectra import (
    DEFAULT_EDGES,
    BandResolution,
    NoSpectrum,
    check_spectra_options,
    generate_spectra,
    suggest_switch,
    write_spectra,
)
from luve_lightning.evaluation.pictures import picture_strip
from luve_lightning.functional.fidelity import psnr
from luve_lightning.functional.interpolation import Size3d, interpolate_latents
from luve_lightning.functional.pixels import video_to_frames
from luve_lightning.models.backbones import LatentSpace, load_backbone
from luve_lightning.tasks.base import TextToVideo, Upsampling, keeps
from luve_lightning.terminal import amount


class NowAndThen(L.Callback):
    """A callback that records something in a validation of a training run, every so many optimiser steps.

    Args:
        output: folder of its records.
        every_n_steps: optimiser steps; a validation records when a multiple has passed since the last recording.
    """

    def __init__(self, output: Path, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps: expected at least 1, got {every_n_steps}")
        self.output, self.every_n_steps = Path(output), every_n_steps
        self._last_step, self._restored = 0, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from where the run begins, or from the checkpoint's step.

        If a kill cut a validation short, record now what it would have recorded.
        """
        if not self._restored:
            self._last_step = trainer.global_step
        self._restored = False

    @property
    def state_key(self) -> str:
        """A key per folder."""
        return self._generate_state_key(output=self.output.name)

    def state_dict(self) -> dict[str, Any]:
        """The last recorded step."""
        return {"last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self._last_step, self._restored = int(state_dict["last_step"]), True

    def due(self, trainer: L.Trainer) -> str | None:
        """The name of this validation's recording; None when none is due."""
        step, every = trainer.global_step, self.every_n_steps
        if trainer.state.fn != "fit" or trainer.sanity_checking or step // every <= self._last_step // every:
            return None
        self._last_step = step
        return f"step-{step:06d}"


class SampleStrips(NowAndThen):
    """Draws the middle frame of a few clips: low resolution, bilinear, VLUer, and the clip itself.

    A detail is enlarged under each; labels give the frame's PSNR. The strips go to `output/step-<optimiser
    step>/<clip>_x<scale>.png` in a validation inside `fit`, to `output/test/` under `trainer.test`, and to wandb
    as images when that is a logger. Rank zero draws, without random numbers.

    Args:
        output: folder of the pictures.
        every_n_steps: optimiser steps; a validation draws when a multiple has passed since the last drawing.
        clips: number of clips to draw, rank zero's first, at every scale; 0 draws nothing.
    """

    def __init__(self, output: Path, every_n_steps: int, clips: int = 2) -> None:
        super().__init__(output, every_n_steps)
        if clips < 0:
            raise ValueError(f"clips: expected at least 0, got {clips}")
        self.clips = clips
        self._folder: Path | None = None
        self._seen: list[str] = []
        self._drawn: dict[str, list[Path]] = {}

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decide whether this validation draws."""
        self._begin(trainer, self.due(trainer))

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw in every test."""
        self._begin(trainer, "test")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the clips of a batch."""
        self._draw(trainer, pl_module, batch)

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what was drawn."""
        self._log(trainer)

    on_test_end = on_validation_end

    def _begin(self, trainer: L.Trainer, folder: str | None) -> None:
        self._folder = self.output / folder if folder and trainer.is_global_zero else None
        self._seen, self._drawn = [], {}

    @torch.no_grad()
    def _draw(self, trainer: L.Trainer, pl_module: Any, batch: Mapping[str, Any]) -> None:
        if self._folder is None:
            return
        task: Upsampling = pl_module
        for i, clip_id in enumerate(batch["clip_id"]):
            if clip_id not in self._seen and len(self._seen) < self.clips:
                self._seen.append(clip_id)
            if clip_id not in self._seen:
                continue
            low, high, video = (batch[key][i : i + 1] for key in ("lr", "hr", "video"))
            with trainer.precision_plugin.forward_context():
                upsampled = task.net(low, tuple(high.shape[2:]))
            frames = _compared(task.codec, low, upsampled, video)
            scale = f"x{float(batch['scale'][i]):g}"
            # UltraVideo's ids are 40 hexadecimal digits; other ids may not be valid file names.
            path = self._folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', clip_id)}_{scale}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture_strip(frames).save(path)
            self._drawn.setdefault(scale, []).append(path)

    def _log(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                for scale, paths in self._drawn.items():
                    captions = [path.stem for path in paths]
                    images: list[Any] = [str(path) for path in paths]
                    logger.log_image(f"samples/{scale}", images, step=trainer.global_step, caption=captions)
        self._folder, self._drawn = None, {}


def _compared(codec: LatentSpace, low: Tensor, upsampled: Tensor, video: Tensor) -> dict[str, np.ndarray]:
    """One clip's middle frame four times, by label."""
    size: Size3d = (upsampled.shape[2], upsampled.shape[3], upsampled.shape[4])
    middle = video.shape[2] // 2
    original = video[:, :, middle : middle + 1].float()
    frame = _middle_frame(codec, low)
    frames = {f"low resolution, {_shape(frame)}": _pixels(frame)}
    for name, latents in (("bilinear", interpolate_latents(low, size)), ("VLUer", upsampled)):
        frame = _middle_frame(codec, latents)
        frames[f"{name}, {psnr(frame, original).item():.2f} dB"] = _pixels(frame)
    return frames | {f"original, {_shape(original)}": _pixels(original)}


def _middle_frame(codec: LatentSpace, latents: Tensor) -> Tensor:
    """The decoded middle frame, 1 x 3 x 1 x H x W; the VAE is causal, so later latents are not decoded."""
    middle = codec.pixel_size(latents.shape[2], 1, 1)[0] // 2
    needed = next(n for n in range(1, latents.shape[2] + 1) if codec.pixel_size(n, 1, 1)[0] > middle)
    return codec.decode(latents[:, :, :needed])[:, :, middle : middle + 1]


def _shape(frame: Tensor) -> str:
    return f"{frame.shape[3]}x{frame.shape[4]}"


def _pixels(frame: Tensor) -> np.ndarray:
    # A diverged model must not end the run here: values that are not numbers are drawn black.
    pixels: np.ndarray = video_to_frames(frame.nan_to_num(-1))[0, 0].cpu().numpy()
    return pixels


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
        if not keeps(pl_module, TextToVideo):
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
        title = f"step {trainer.global_step}, {amount(spectra.videos, 'video')}, guidance {self.guidance:g}"
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
