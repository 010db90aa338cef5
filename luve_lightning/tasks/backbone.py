"""Training a small Wan transformer and its text encoder from nothing: what completes the mini backbone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from luve_lightning.data.video_index import VideoIndex
from luve_lightning.files import text_digest
from luve_lightning.functional.noise_bands import SigmaBand, Weighting
from luve_lightning.models.backbones import load_backbone
from luve_lightning.models.backbones.wan_text import WanText, word_tokenizer
from luve_lightning.models.building import build
from luve_lightning.models.transformer import flow_scheduler, load_transformer, save_transformer
from luve_lightning.tasks.flow import FlowMatchingTask


class BackboneTask(FlowMatchingTask):
    """Trains a text-to-video transformer with its text encoder on captioned latents, at all noise levels.

    The tokenizer has one token for each word of the index's captions.

    Args:
        backbone: folder whose `vae/` made the latents; it becomes part of what is exported.
        index: CSV whose captions give the vocabulary.
        transformer: arguments of `diffusers.WanTransformer3DModel`; `text_dim` is the text encoder's `d_model`.
        text_encoder: arguments of `transformers.UMT5Config`; the vocabulary's size is added.
        length: tokens of every caption, padding included.
        compile: backend of torch.compile for the transformer's blocks, such as "inductor"; None compiles nothing. A
            small model's step on a GPU is mostly the time to start its kernels, which compiling cuts.
        init_from: a folder exported by this task to continue from, in place of `transformer`, `text_encoder` and
            `length`.
        shift: see FlowMatchingTask; the exported scheduler has it too.
        weighting: see FlowMatchingTask.
        bins: see FlowMatchingTask.
        seed: see FlowMatchingTask.
        lr: see TrainingTask.
        min_lr: see TrainingTask.
        weight_decay: see TrainingTask.
        warmup_steps: see TrainingTask.
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
    ) -> None:
        if not (Path(backbone) / "vae" / "config.json").is_file():
            raise FileNotFoundError(f"backbone: {backbone} has no vae/config.json")
        if init_from is None:
            captions = [
                text for entry in VideoIndex.from_csv(index).entries for text in entry.captions.values()
            ]
            tokenizer = word_tokenizer(captions, length)
            config = build(
                "text_encoder",
                UMT5Config,
                text_encoder,
                vocab_size=len(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            net = build("transformer", WanTransformer3DModel, transformer, text_dim=config.d_model)
            encoder = WanText(tokenizer, build("text_encoder", UMT5EncoderModel, {}, config=config))
        else:
            net, encoder = load_transformer(init_from), load_backbone(init_from).text()
        super().__init__(
            net, SigmaBand(), shift, weighting, bins, seed, lr, min_lr, weight_decay, warmup_steps
        )
        # What was loaded comes frozen and in eval mode.
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
        if not self._told:  # once: the captions of a data set are alike
            self._told = self.text_encoder.warn_of_cuts(sorted(new))
        for caption in new:
            ids, mask = self.text_encoder.tokenize([caption])
            self._tokens[caption] = ids.to(self.device), mask.to(self.device)
        ids, mask = (
            torch.cat(parts) for parts in zip(*map(self._tokens.__getitem__, batch["caption"]), strict=True)
        )
        return self.text_encoder.embed(ids, mask)

    def _vocabulary(self) -> str:
        words = self.text_encoder.tokenizer.get_vocab()
        return text_digest(json.dumps(words, sort_keys=True))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which words the embeddings are of: others have the same shapes."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["vocabulary"] = self._vocabulary()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose embeddings are of other words."""
        super().on_load_checkpoint(checkpoint)
        if checkpoint.get("vocabulary", self._vocabulary()) != self._vocabulary():
            raise ValueError(
                "index: its captions have other words than those that the checkpoint was trained with"
            )

    def pipeline(self) -> WanPipeline:
        """A pipeline of the modules as they are."""
        return WanPipeline(
            tokenizer=self.text_encoder.tokenizer,
            text_encoder=self.text_encoder.encoder,
            vae=load_backbone(self.backbone).vae().to(self.device),
            scheduler=flow_scheduler(self.shift),
            transformer=self.transformer,
        )

    def export(self, folder: Path, datamodule: Any) -> None:
        """Save a whole backbone folder for `WanPipeline.from_pretrained`, weights in fp16.

        Args:
            folder: where to.
            datamodule: not needed.
        """
        del datamodule
        half, folder = torch.float16, Path(folder)
        config = {k: v for k, v in self.transformer.config.items() if not k.startswith("_")}
        net = WanTransformer3DModel(**config)
        net.load_state_dict(self.transformer.state_dict())
        encoder = UMT5EncoderModel(self.text_encoder.encoder.config)
        encoder.load_state_dict(self.text_encoder.encoder.state_dict())
        pipeline = self.pipeline()
        save_transformer(net, folder / "transformer", half)
        encoder.to(half).save_pretrained(folder / "text_encoder")
        self.text_encoder.tokenizer.save_pretrained(folder / "tokenizer")
        pipeline.scheduler.save_pretrained(folder / "scheduler")
        pipeline.save_config(folder)
        # Copied as it is: loaded and saved again it would have other bytes.
        if (folder / "vae").resolve() != (self.backbone / "vae").resolve():
            shutil.copytree(self.backbone / "vae", folder / "vae", dirs_exist_ok=True)
