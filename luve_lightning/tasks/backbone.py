"""Training a small transformer and its text encoder from scratch, for the mini backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luve_lightning.data.video_index import VideoIndex
from luve_lightning.files import text_digest
from luve_lightning.functional.noise_bands import SigmaBand, Weighting
from luve_lightning.losses import Loss
from luve_lightning.models.backbones import load_backbone
from luve_lightning.tasks.flow import FlowMatchingTask


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
    ) -> None:
        if not (Path(backbone) / "vae" / "config.json").is_file():
            raise FileNotFoundError(f"backbone: {backbone} has no vae/config.json")
        if init_from is None:
            captions = [
                text for entry in VideoIndex.from_csv(index).entries for text in entry.captions.values()
            ]
            family = load_backbone(backbone)
            with torch.device("meta"):  # the transformer needs its width, and is the first to draw weights
                width = family.build_text(captions, length, text_encoder).dim
            net = family.build_denoiser(transformer, width)
            encoder = family.build_text(captions, length, text_encoder)
        else:
            start = load_backbone(init_from)
            net, encoder = start.denoiser(), start.text()
        super().__init__(
            net.module,
            SigmaBand(),
            shift,
            weighting,
            bins,
            seed,
            lr,
            min_lr,
            weight_decay,
            warmup_steps,
            losses,
        )
        # Loaded modules come frozen and in evaluation mode.
        self.transformer.train()
        if compile is not None:
            self.transformer.compile_repeated_blocks(backend=compile)
        self.text_encoder = encoder.requires_grad_(True).train()
        self.backbone = Path(backbone)
        self._tokens: dict[str, tuple[Tensor, Tensor]] = {}
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
            ids, mask = self.text_encoder.tokenize([caption])
            self._tokens[caption] = ids.to(self.device), mask.to(self.device)
        ids, mask = (
            torch.cat(parts) for parts in zip(*map(self._tokens.__getitem__, batch["caption"]), strict=True)
        )
        return self.text_encoder.embed(ids, mask)

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
            raise ValueError(
                "index: its captions have other words than those that the checkpoint was trained with"
            )

    def export(self, folder: Path, datamodule: Any) -> None:
        """Save a whole backbone folder, weights in fp16.

        Args:
            folder: where to.
            datamodule: not needed.
        """
        del datamodule
        family = load_backbone(self.backbone)
        schedule = family.build_schedule(self.shift)
        family.save(Path(folder), self.denoiser, self.text_encoder, schedule, self.backbone, torch.float16)
