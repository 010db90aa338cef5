"""The adaptation of a transformer to a higher resolution (LuVe's "UHR scaling" row), and a frequency expert on it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from luve_lightning.functional.noise_bands import LossWeight, SigmaBand, Weighting
from luve_lightning.losses import Loss
from luve_lightning.machine import gather_mappings
from luve_lightning.model_folders import saving
from luve_lightning.models.attention import Attention
from luve_lightning.models.attention.dense import Dense
from luve_lightning.models.backbones import Denoiser, Recompute, load_backbone
from luve_lightning.models.experts import (
    ADAPTER_WEIGHTS,
    ExpertConfig,
    activate,
    add_expert,
    expert_parameters,
    load_expert,
    save_expert,
    train_only,
)
from luve_lightning.models.experts.routing import state_of
from luve_lightning.tasks.flow import FlowMatchingTask

_LORA_NAME = "adaptation"


class AdaptationTask(FlowMatchingTask):
    """Fine-tunes the transformer at a higher resolution, all of it or by a plain LoRA, at all noise levels.

    With Lightning's `ModelParallelStrategy` parameters, gradients and optimiser are sharded (FSDP2) block by
    block.

    Args:
        backbone: backbone folder, a transformer's own folder or `.safetensors` file, or a hub id.
        lora_rank: rank of a LoRA in every linear layer of the blocks; 0 trains all weights. The attention's own
            parameters always train whole.
        lora_ranks: other ranks, by the ends of layers' names, such as `attn1.to_q`; the first that fits counts.
            None: all have `lora_rank`.
        recompute: see `Denoiser.set_recompute`.
        keep_attention: see `Denoiser.set_recompute`.
        offload: see `Denoiser.set_recompute`.
        chunks: see `Denoiser.set_recompute`.
        compile: torch.compile backend for the transformer's blocks, such as "inductor"; None compiles nothing.
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
        loss_weight: see FlowMatchingTask.
        attention: replaces the blocks' self-attention, also where the export is loaded; None keeps the backbone's,
            and so what it was adapted with before.
        decay_steps: see TrainingTask.
    """

    # Every process takes part in an export: the weights may be sharded.
    collective_export = True

    def __init__(
        self,
        backbone: str,
        lora_rank: int = 0,
        lora_ranks: dict[str, int] | None = None,
        recompute: Recompute = "nothing",
        keep_attention: int | None = None,
        offload: bool = False,
        chunks: int = 1,
        compile: str | None = None,
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
        loss_weight: LossWeight | None = None,
        attention: Attention | None = None,
        decay_steps: int | None = None,
    ) -> None:
        if export_dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"export_dtype: expected float32, float16 or bfloat16, got {export_dtype!r}")
        if lora_rank < 0:
            raise ValueError(f"lora_rank: expected 0 (train all weights) or a rank, got {lora_rank}")
        denoiser = load_backbone(backbone).denoiser()
        transformer = denoiser.module
        if attention is not None:
            denoiser.use_attention(attention)
        self.set_up(denoiser, lora_rank, lora_ranks)
        denoiser.set_recompute(recompute, keep_attention, offload, chunks)
        if compile is not None:
            denoiser.compile_blocks(compile)
        super().__init__(
            transformer, SigmaBand(), shift, weighting, bins, seed, lr, min_lr, weight_decay, warmup_steps, losses,
            loss_weight, decay_steps,
        )  # fmt: skip
        self.lora, self.export_dtype = lora_rank > 0, getattr(torch, export_dtype)

    @classmethod
    def set_up(cls, denoiser: Denoiser, lora_rank: int, lora_ranks: Mapping[str, int] | None = None) -> None:
        """Make of a transformer what is trained: all of it with rank 0, else a LoRA beside frozen weights."""
        if lora_rank:
            add_lora(denoiser, lora_rank, lora_ranks or {})
        elif lora_ranks:
            raise ValueError("lora_ranks: expected none, because lora_rank 0 trains all weights")

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

        The LoRA is also saved by itself, in PEFT's layout and float32, in `lora/` inside the transformer's folder, so
        that no later export can leave it beside another transformer. There is none where an attention's own
        parameters were trained, or others, which a LoRA cannot hold.

        Every process must call it; the first one writes.

        Args:
            folder: target; the transformer goes to its subfolder `transformer/`.
            datamodule: not needed.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.transformer, options=options)
        if self.global_rank != 0:
            if self.device.type == "cuda":  # what it sends is queued: if it ended now, the first would wait for ever
                torch.cuda.synchronize(self.device)
            return
        adapted = self.denoiser.copy()
        if self.lora:
            adapted.module.add_adapter(self.transformer.peft_config[_LORA_NAME], _LORA_NAME)
        adapted.module.load_state_dict(weights)
        lora = _lora_weights(adapted) if self.lora else {}
        if self.lora:
            adapted.module.fuse_lora()
            adapted.module.unload_lora()
        adapted.save(Path(folder) / "transformer", self.export_dtype)
        others = [n for n, p in self.transformer.named_parameters() if p.requires_grad and ".lora_" not in n]
        if lora and others:
            what = "its attention's own parameters" if adapted.branches else f"other weights, such as {others[0]},"
            rank_zero_info(f"no LoRA is saved beside the transformer: {what} were trained, too")
        elif lora:
            _save_lora(adapted, self.transformer.peft_config[_LORA_NAME], lora, Path(folder) / "transformer" / "lora")


def add_lora(denoiser: Denoiser, rank: int, ranks: Mapping[str, int]) -> None:
    """Freeze a transformer but for a new LoRA in its linear layers, and its attention's own parameters.

    Args:
        denoiser: the transformer.
        rank: rank of every layer that `ranks` does not name.
        ranks: ranks by the ends of layers' names.

    Raises:
        ValueError: for a rank below 1, or a name of no such layer.
    """
    denoiser.module.requires_grad_(False)
    targets = list(denoiser.lora_targets)
    ends = tuple(f".{target}" for target in targets)
    layers = [name for name, _ in denoiser.module.named_modules() if name.endswith(ends)]
    for name, other in ranks.items():
        if other < 1:
            raise ValueError(f"lora_ranks.{name}: expected at least 1, got {other}")
        if not any(f".{layer}".endswith(f".{name}") for layer in layers):
            raise ValueError(f"lora_ranks.{name}: no linear layer of the blocks has a name that ends so")
    # PEFT takes names for regular expressions. With alpha as large as the rank the scale is 1 everywhere.
    pattern = {re.escape(name): other for name, other in ranks.items()}
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=targets, rank_pattern=pattern, alpha_pattern=dict(pattern)
    )
    denoiser.module.add_adapter(config, _LORA_NAME)
    for branch in denoiser.branches.values():  # new, so there is nothing to freeze
        branch.requires_grad_(True)


def _lora_weights(denoiser: Denoiser) -> dict[str, Tensor]:
    """The LoRA's weights, by the names that a PeftModel gives them."""
    return {
        f"base_model.model.{name}.{part}.weight": getattr(layer, part)[_LORA_NAME].weight.detach().float().clone()
        for name, layer in denoiser.module.named_modules()
        if isinstance(layer, LoraLayer)
        for part in ("lora_A", "lora_B")
    }


def _save_lora(denoiser: Denoiser, config: LoraConfig, weights: dict[str, Tensor], folder: Path) -> None:
    """Write a LoRA as PEFT does, with the attention that it was trained with in the weights' header."""
    saved = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        target_modules=list(denoiser.lora_targets),
        inference_mode=True,
    )
    header = {"format": "pt"}
    if (attention := denoiser.attention_in_force) != Dense():
        header["luve_attention"] = json.dumps(attention.record())
    with saving(folder) as new:
        saved.save_pretrained(new)
        safetensors.torch.save_file(weights, new / ADAPTER_WEIGHTS, metadata=header)


class ExpertTask(FlowMatchingTask):
    """Trains one of LuVe's experts by flow matching, only at the noise levels of its band.

    Levels outside the band cannot occur: `SigmaBand.sample` draws none. The test compares the expert with its
    base, expert disabled, on the same clips, noise levels and noise.

    Args:
        backbone: backbone folder, a transformer's own (as the adaptation exports it) or its file, or a hub id.
        expert: the expert's place, rank, filter and band.
        name: name of the PEFT adapter: "lfe", "hfe" or your own.
        init_from: folder saved by `save_expert` to continue from; its configuration must equal `expert`.
        dtype: dtype of the frozen transformer, "float32" or "bfloat16"; the expert itself trains in float32.
        recompute: see `Denoiser.set_recompute`.
        keep_attention: see `Denoiser.set_recompute`.
        offload: see `Denoiser.set_recompute`.
        chunks: see `Denoiser.set_recompute`.
        compile: torch.compile backend for the transformer's blocks, such as "inductor"; None compiles nothing.
        shift: see FlowMatchingTask.
        weighting: see FlowMatchingTask.
        bins: see FlowMatchingTask.
        seed: see FlowMatchingTask; the expert's initial weights follow the run's `seed_everything`.
        lr: see TrainingTask; LuVe trains experts with 1e-4.
        min_lr: see TrainingTask.
        weight_decay: see TrainingTask.
        warmup_steps: see TrainingTask.
        losses: see FlowMatchingTask.
        loss_weight: see FlowMatchingTask.
        attention: replaces the backbone's self-attention, and the one that `init_from` was trained with; None keeps
            the backbone's. The expert's folder keeps it.
    """

    def __init__(
        self,
        backbone: str,
        expert: ExpertConfig,
        name: str,
        init_from: str | None = None,
        dtype: str = "float32",
        recompute: Recompute = "nothing",
        keep_attention: int | None = None,
        offload: bool = False,
        chunks: int = 1,
        compile: str | None = None,
        shift: float = 5.0,
        weighting: Weighting | None = None,
        bins: int = 5,
        seed: int = 0,
        lr: float = 1e-4,
        min_lr: float = 1e-6,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        losses: dict[str, Loss] | None = None,
        loss_weight: LossWeight | None = None,
        attention: Attention | None = None,
    ) -> None:
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype: expected float32 or bfloat16, got {dtype!r}")
        denoiser = load_backbone(backbone).denoiser(getattr(torch, dtype))
        transformer = denoiser.module
        if attention is not None:
            denoiser.use_attention(attention)
        if init_from is None:
            add_expert(transformer, name, expert, dtype=torch.float32)
        else:
            _continue_expert(transformer, name, expert, init_from, any_attention=attention is not None)
        denoiser.set_recompute(recompute, keep_attention, offload, chunks)
        if compile is not None:
            denoiser.compile_blocks(compile)
        super().__init__(
            transformer, expert.band, shift, weighting, bins, seed, lr, min_lr, weight_decay, warmup_steps, losses,
            loss_weight,
        )  # fmt: skip
        self.name, self.expert = name, expert
        self._before: dict[tuple[str, int], float] = {}
        self._after: dict[tuple[str, int], float] = {}
        self.comparison: dict[str, tuple[float, float]] = {}

    def _identity(self) -> str:
        return json.dumps({"name": self.name} | asdict(self.expert), sort_keys=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save which expert the weights belong to: another filter or band has the same shapes."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["expert"] = self._identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another expert's checkpoint."""
        saved, own = json.loads(checkpoint.get("expert", "{}")), json.loads(self._identity())
        differs = [f"{key} {saved[key]} there, {own[key]} here" for key in own if saved.get(key, own[key]) != own[key]]
        if differs:
            raise ValueError(f"checkpoint is of another expert: {'; '.join(differs)}")
        super().on_load_checkpoint(checkpoint)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Losses of held-out clips in the expert's band, without and with it."""
        activate(self.transformer, None)
        self._before |= self.fixed_losses(batch)
        activate(self.transformer, self.name)
        self._after |= self.fixed_losses(batch)

    def on_test_epoch_end(self) -> None:
        """Mean losses; `comparison` keeps each clip's for reports."""
        before, after = gather_mappings(self._before), gather_mappings(self._after)
        self._before, self._after = {}, {}
        clips = sorted({clip for clip, _ in before})
        self.comparison = {
            clip: (
                math.fsum(before[clip, part] for part in range(self.bins)) / self.bins,
                math.fsum(after[clip, part] for part in range(self.bins)) / self.bins,
            )
            for clip in clips
        }
        for name, column in zip(("before", "after"), zip(*self.comparison.values(), strict=True), strict=True):
            self.log(f"test/loss_{name}", math.fsum(column) / len(column), sync_dist=True)

    def export(self, folder: Path, datamodule: Any) -> None:
        """Save the expert: PEFT's two files and `expert.json`.

        Args:
            folder: where to.
            datamodule: not needed.
        """
        save_expert(self.transformer, self.name, folder)


def _continue_expert(transformer: Any, name: str, expert: ExpertConfig, folder: str, any_attention: bool) -> None:
    """Load an expert to train on, in float32."""
    load_expert(transformer, folder, name, any_attention)
    found = state_of(transformer, name).configs[name]
    for key in ("places", "rank", "alpha", "filter", "band"):
        saved, wanted = getattr(found, key), getattr(expert, key)
        if saved != wanted:
            raise ValueError(f"init_from: the expert in {folder} has {key} {saved}, `expert` says {wanted}")
    train_only(transformer, name)
    for parameter in expert_parameters(transformer, name):
        parameter.data = parameter.data.float()
