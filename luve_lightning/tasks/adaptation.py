"""Adapting the transformer to a higher resolution: LuVe's "UHR scaling" row, and the base of the experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from luve_lightning.functional.noise_bands import SigmaBand, Weighting
from luve_lightning.losses import Loss
from luve_lightning.models.attention import Attention
from luve_lightning.models.backbones import Recompute, load_backbone
from luve_lightning.tasks.flow import FlowMatchingTask

_LORA_NAME = "adaptation"


class AdaptationTask(FlowMatchingTask):
    """Fine-tunes the transformer at a higher resolution, all of it or by a plain LoRA, at all noise levels.

    With Lightning's `ModelParallelStrategy` parameters, gradients and optimiser are sharded (FSDP2) block by
    block.

    Args:
        backbone: backbone folder or hub id.
        lora_rank: rank of a LoRA in every linear layer of the blocks; 0 trains all weights.
        recompute: see `Denoiser.set_recompute`.
        keep_attention: see `Denoiser.set_recompute`.
        export_dtype: dtype of the exported transformer, "float32", "float16" or "bfloat16".
        shift: see FlowMatchingTask.
        weighting: see FlowMatchingTask.
        bins: see FlowMatchingTask.
        seed: see FlowMatchingTask.
        lr: see TrainingTask; LuVe adapts with 1e-5.
        min_lr: see TrainingTask.
        weight_decay: see TrainingTask.
        warmup_steps: see TrainingTask.
        losses: see FlowMatchingTask.
        attention: replaces the blocks' self-attention, also where the export is loaded; None keeps the backbone's
            own.
    """

    # Every process takes part in an export: the weights may be sharded.
    collective_export = True

    def __init__(
        self,
        backbone: str,
        lora_rank: int = 0,
        recompute: Recompute = "nothing",
        keep_attention: int | None = None,
        export_dtype: str = "float16",
        shift: float = 5.0,
        weighting: Weighting | None = None,
        bins: int = 5,
        seed: int = 0,
        lr: float = 1e-5,
        min_lr: float = 1e-7,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        losses: dict[str, Loss] | None = None,
        attention: Attention | None = None,
    ) -> None:
        if export_dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"export_dtype: expected float32, float16 or bfloat16, got {export_dtype!r}")
        if lora_rank < 0:
            raise ValueError(f"lora_rank: expected 0 (train all weights) or a rank, got {lora_rank}")
        denoiser = load_backbone(backbone).denoiser()
        transformer = denoiser.module
        if attention is not None:
            denoiser.use_attention(attention)
        if lora_rank:
            transformer.requires_grad_(False)
            targets = list(denoiser.lora_targets)
            transformer.add_adapter(
                LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=targets), _LORA_NAME
            )
        denoiser.set_recompute(recompute, keep_attention)
        super().__init__(
            transformer,
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
        self.lora, self.export_dtype = lora_rank > 0, getattr(torch, export_dtype)

    def configure_model(self) -> None:
        """Shard the transformer when the strategy has a device mesh."""
        mesh = self.device_mesh
        if mesh is None or isinstance(next(self.transformer.parameters()), DTensor):
            return
        for _, block in self.denoiser.blocks:
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self.transformer, mesh=mesh["data_parallel"])

    def export(self, folder: Path, datamodule: Any) -> None:
        """Save the adapted transformer for its class's `from_pretrained`; a LoRA is merged into it.

        Every process must call it; the first one writes.

        Args:
            folder: target; the transformer goes to its subfolder `transformer/`.
            datamodule: not needed.
        """
        del datamodule
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.transformer, options=options)
        if self.global_rank != 0:
            return
        adapted = self.denoiser.copy()
        if self.lora:
            adapted.module.add_adapter(self.transformer.peft_config[_LORA_NAME], _LORA_NAME)
        adapted.module.load_state_dict(weights)
        if self.lora:
            adapted.module.fuse_lora()
            adapted.module.unload_lora()
        adapted.save(Path(folder) / "transformer", self.export_dtype)
