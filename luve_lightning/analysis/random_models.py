"""The models of a whole cascade with random weights, on disk: what runs at real size without anyone's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from luve_lightning.analysis.model_parts import PartConfigs, Parts
from luve_lightning.data.mini_world import vocabulary
from luve_lightning.functional.frequency import FrequencyFilter
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.models.attention import Attention
from luve_lightning.models.backbones import denoiser_of
from luve_lightning.models.experts import ExpertConfig, add_expert, expert_parameters, save_expert

# As experiments/experts trains them.
EXPERTS = {
    "lfe": ExpertConfig("attention", 32, 32, FrequencyFilter("low", 0.5), SigmaBand(0.875, 1.0)),
    "hfe": ExpertConfig("feed_forward", 32, 32, FrequencyFilter("high", 0.5), SigmaBand(0.0, 0.875)),
}
BACKBONE, REFINER, VLUER = "backbone", "refiner", "vluer"
"""Subfolders that `write_random_models` fills, beside `experts`."""

_SPECIAL = 8  # numbers left for the tokenizer's own tokens, such as padding, where the vocabulary is small
_STD = 0.02  # of weights that start at zero: a model must not be timed on zeros


def write_random_models(
    folder: Path,
    configs: PartConfigs,
    dtype: torch.dtype,
    device: torch.device,
    attention: Attention | None = None,
    seed: int = 0,
    refiner_alone: bool = False,
) -> Iterator[tuple[str, int]]:
    """Write a backbone, a VLUer, an adapted transformer and its two experts, each as training would export it.

    They are random, and their videos are noise: what is real is the size of everything. The tokenizer knows the mini
    world's words.

    Args:
        folder: a new folder; gets `backbone/`, `vluer/`, `refiner/transformer/`, `experts/lfe/` and `experts/hfe/`.
        configs: sizes of the models. Without a refiner's, it has those of the backbone's transformer.
        dtype: dtype of the transformers and the text encoder; the VAE, the VLUer and the experts are float32.
        device: where the weights are drawn; a GPU takes seconds where a CPU takes minutes.
        attention: attention of the adapted transformer; None is the backbone's own.
        seed: seed of all weights.
        refiner_alone: write only the adapted transformer and its experts, to use with another folder's models.

    Yields:
        Each subfolder that is written, and the number of its parameters.

    Raises:
        FileExistsError: when the folder holds something.
        ValueError: for an attention that does not fit the transformer.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"output {folder}: expected a new or empty folder")
    if attention is not None:  # refused before anything is written
        denoiser_of(Parts(configs, dtype).refiner).use_attention(attention)
    # A transformer of its own for the third stage, where `configs` has it share the first one's.
    parts = Parts(replace(configs, refiner=configs.refiner or configs.transformer), dtype, device)
    with _seeded(seed, device), torch.no_grad():
        if not refiner_alone:
            yield BACKBONE, _write_backbone(folder / BACKBONE, parts)
            yield VLUER, _write_vluer(folder / VLUER, parts)
        adapted = denoiser_of(parts.refiner)
        if attention is not None:
            adapted.use_attention(attention)
        _no_zeros(adapted.module)
        count = _size(adapted.module)
        adapted.save(folder / REFINER / "transformer", dtype)
        yield REFINER, count
        for name, config in EXPERTS.items():
            add_expert(adapted.module, name, config, dtype=torch.float32)
            weights = list(expert_parameters(adapted.module, name))
            for weight in weights:
                nn.init.normal_(weight, std=_STD)
            save_expert(adapted.module, name, folder / "experts" / name)
            yield f"experts/{name}", sum(weight.numel() for weight in weights)


def _write_backbone(folder: Path, parts: Parts) -> int:
    """Write a whole pipeline folder; the number of its parameters."""
    family, configs = parts.configs.family, parts.configs
    vae = family.from_config("vae", configs.vae)
    family.save_vae(vae, folder, torch.float32)
    words = vocabulary()[: max(1, int(configs.text_encoder.get("vocab_size", 2**15)) - _SPECIAL)]
    tokenizer = family.build_text([" ".join(words)], configs.text_length, {}).tokenizer
    text = family.text_class(tokenizer, parts.text_encoder, configs.text_length)
    family.save(folder, denoiser_of(parts.transformer), text, configs.schedule, folder, parts.dtype)
    count = sum(map(_size, (vae, parts.text_encoder, parts.transformer)))
    parts.forget("text_encoder", "transformer")
    return count


def _write_vluer(folder: Path, parts: Parts) -> int:
    """Write the VLUer; the number of its parameters."""
    _no_zeros(parts.vluer)
    parts.vluer.save_pretrained(folder)
    count = _size(parts.vluer)
    parts.forget("vluer")
    return count


def _no_zeros(module: nn.Module) -> None:
    """Draw the weights of two dimensions or more that start at zero."""
    weights: list[Tensor] = [weight for weight in module.parameters() if weight.ndim > 1]
    for weight in weights:
        if not weight.any():
            nn.init.normal_(weight, std=_STD)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed, on a device, and leave PyTorch's own random numbers as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        yield
