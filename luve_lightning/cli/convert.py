"""`luve convert`, `luve random-models`: weights from and for other programs, and random ones of real size."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from peft import LoraConfig
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luve_lightning.analysis.model_parts import PartConfigs, wan_1_3b
from luve_lightning.analysis.random_models import write_random_models
from luve_lightning.cascade.lora_files import LoraFile, read_lora
from luve_lightning.cascade.lora_layers import FittedLora, fit_lora
from luve_lightning.cascade.lora_names import LoraSummary, parse_name
from luve_lightning.cli import Verb
from luve_lightning.cli.indexed_clips import check_folder
from luve_lightning.files import read_json, replacing, write_text
from luve_lightning.machine import choose_device
from luve_lightning.model_folders import saving
from luve_lightning.models.attention import Attention
from luve_lightning.models.backbones import Denoiser, empty_denoiser
from luve_lightning.models.experts import ADAPTER_WEIGHTS, EXPERT
from luve_lightning.models.vluer.released import read_released
from luve_lightning.terminal import say

VERBS = {
    "convert vluer": Verb("Generation", "make a VLUer's folder of the released VLUer's file", positional="file output"),
    "convert lora": Verb("Generation", "write a LoRA under another program's names", positional="source output"),
    "random-models": Verb("Measurement", "write a cascade's models with random weights, at real size"),
}

LoraNames = Literal["comfyui", "diffsynth", "diffusers", "peft"]
"""Programs by whose names a LoRA can be written."""
ATTENTION_HEADER = "luve_attention"
"""Entry of a LoRA's header: the attention that it was trained with, where that is not the family's own."""
# Where an adaptation's export keeps its LoRA, seen from the folders that a user may give.
_PLACES = ("transformer/lora", "lora")
_ADDED = (".lora_A.weight", ".lora_B.weight")

# Lies beside the converted weights, so that whoever gets the folder reads it.
_NOTICE = """\
# The released VLUer, converted

Made by `luve convert vluer` of the authors' model.pth. That file comes without a licence. Its network builds on VRT,
which is licensed CC-BY-NC-4.0: not for commercial use. Weights that are fine-tuned from these derive from them.
"""


def convert_vluer(file: Path, output: Path, crop: bool = False) -> None:
    """Makes a folder of the released VLUer's model.pth, for --vluer, `luve upsample` and fine-tuning.

    The file must hold exactly the released network's tensors; the optimiser's state beside them is ignored.

    Args:
        file: The released model.pth. It comes without a licence, and its network builds on VRT, which is licensed
            CC-BY-NC-4.0 (not for commercial use). We ship none of these weights.
        output: New folder, for instance data/released-vluer.
        crop: Cut latents to multiples of 8 rows and columns and stretch the rest to the output, as the original
            does (720p: 704 of 720 rows are kept); default refuse other sizes.
    """
    check_folder("output", output)
    # Its config.json, weights and README.md would replace those of another VLUer, or of a project.
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"output: {output} holds files already: choose a new folder")
    net = read_released(file, crop)
    net.save_pretrained(output)
    write_text(output / "README.md", _NOTICE)
    console = Console(emoji=False)
    say(console, f"{output}: the released VLUer, {net.num_parameters():,} parameters, from {file}")
    say(console, "licence: the file has none; the network builds on VRT, CC-BY-NC-4.0: not for commercial use")


def convert_lora(source: Path, output: Path, names: LoraNames = "comfyui", backbone: str | None = None) -> None:
    """Writes a LoRA under the names that another program reads, at the same scale.

    The LoRA of an adaptation (--model.init_args.lora_rank) lies in its export, in transformer/lora. Any other LoRA that
    `luve generate --lora` loads can be converted, too. An expert cannot: it adds to the output of a whole attention or
    feed-forward, not to weights.

    Args:
        source: File or folder of a LoRA, or an adaptation's export.
        output: New .safetensors file; with --names peft, a new folder.
        names: comfyui, diffsynth (DiffSynth-Studio), diffusers, or peft.
        backbone: Backbone folder or hub id that it is for, of which only the configuration is read; not needed for an
            adaptation's export.
    """
    done = write_lora(source, output, names, backbone)
    console = Console(emoji=False)
    say(console, f"{output}: {done.summary}")
    if done.attention is not None:
        name = done.attention.get("name")
        say(console, f"attention: it was trained with {name}, which is lost where a program attends densely")


def random_models(
    output: Path,
    backbone: str | None = None,
    vluer: Path | None = None,
    attention: Attention | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    seed: int = 0,
    refiner_alone: bool = False,
    device: str = "auto",
) -> None:
    """Writes a backbone, a VLUer, an adapted transformer and both experts with random weights.

    Time and memory do not depend on the weights' values: with these folders `luve generate`, `luve precompute` and
    `luve fit` can be tried and timed at real size before any training, and without a download. Videos are noise.

    Args:
        output: New folder; gets backbone/, vluer/, refiner/, experts/lfe/ and experts/hfe/.
        backbone: Folder or hub id whose configuration files give the sizes; default those of Wan2.1-1.3B, 18 GB in
            bfloat16.
        vluer: Folder whose configuration gives the VLUer's size; default the base size.
        attention: Attention of the adapted transformer; default the backbone's own.
        dtype: Dtype of the transformers and the text encoder; the others are float32.
        seed: Seed of the weights.
        refiner_alone: Write only refiner/ and experts/, for instance with another attention for another size.
        device: Where they are drawn: auto (a GPU if there is one), cpu, cuda or cuda:N.
    """
    console, started = Console(emoji=False), time.perf_counter()
    configs = wan_1_3b() if backbone is None else PartConfigs.from_pretrained(backbone, vluer)
    target, kind = choose_device(device), getattr(torch, dtype)
    written = write_random_models(output, configs, kind, target, attention, seed, refiner_alone)
    for name, count in written:
        took = f"{time.perf_counter() - started:.0f} s"
        console.print(f"  {output / name}  {count:,} parameters  ({took})", soft_wrap=True)


@dataclass(frozen=True)
class ConvertedLora:
    """What was written.

    Attributes:
        files: the files.
        summary: the LoRA.
        attention: record of the attention that it was trained with; None for the family's own.
    """

    files: tuple[Path, ...]
    summary: LoraSummary
    attention: Mapping[str, Any] | None


def write_lora(source: str | Path, output: Path, names: LoraNames, backbone: str | Path | None = None) -> ConvertedLora:
    """Write a LoRA of any layout that can be loaded, at its own scale, under a program's names.

    ComfyUI reads scales from tensors `alpha`. DiffSynth-Studio's older versions do not, so there A is multiplied by
    the scale. diffusers reads the header, PEFT `adapter_config.json`.

    Args:
        source: file, folder, hub id, or an adaptation's export.
        output: new `.safetensors` file; for PEFT a new folder.
        names: whose names.
        backbone: what the LoRA is for; None where the LoRA lies in its transformer's folder, as the adaptation
            exports it. Its weights are not read.

    Raises:
        FileExistsError: when `output` exists.
        FileNotFoundError: when the source or the backbone does not.
        ValueError: for an expert, a LoRA that cannot be loaded whole, or one that no names hold.
    """
    _check_output(output, names)
    place = _place(Path(source))
    refuse_expert(place)
    file = read_lora(place if place.exists() else source)
    base = backbone if backbone is not None else _surrounding(place)
    if base is None:
        raise ValueError(f"LoRA {source}: say which transformer it is for: --backbone FOLDER")
    denoiser = empty_denoiser(base)
    fitted = fit_lora(denoiser.module, replace(file, name=str(source)))
    layers = _layers(fitted, file)
    attention = _attention(place)
    header = {"format": "pt"} | ({} if attention is None else {ATTENTION_HEADER: json.dumps(attention)})
    if names == "peft":
        with saving(output) as new:
            _config(layers, fitted.scales, inference_mode=True).save_pretrained(new)
            _save(new / ADAPTER_WEIGHTS, _named(layers, "base_model.model."), header)
        return ConvertedLora((output / "adapter_config.json", output / ADAPTER_WEIGHTS), fitted.summary, attention)
    if names == "diffusers":
        # As diffusers writes it: PEFT's configuration under the component's name.
        config = _config(layers, fitted.scales).to_dict() | {"target_modules": list(layers)}
        told = {f"transformer.{key}": value for key, value in config.items() if value is not None}
        header["lora_adapter_metadata"] = json.dumps(told, sort_keys=True, default=str)
        tensors = _named(layers, "transformer.")
    elif names == "comfyui":
        tensors = _comfyui(layers, fitted.scales, denoiser)
    else:
        tensors = _diffsynth(layers, fitted.scales, denoiser)
    with replacing(output) as new:
        _save(new, tensors, header)
    return ConvertedLora((output,), fitted.summary, attention)


def refuse_expert(folder: Path) -> None:
    """Say why an expert is no LoRA of other programs.

    Raises:
        ValueError: when the folder, or the folder of the file, holds an expert.
    """
    place = (folder if folder.is_dir() else folder.parent) / EXPERT
    if not place.is_file():
        return
    facts = read_json(place)
    name, wrapped = facts.get("name"), facts.get("place")
    places = " and ".join(map(str, wrapped)) if isinstance(wrapped, list) else str(wrapped)
    filtered = facts.get("filter")
    if isinstance(filtered, dict):
        raise ValueError(
            f"{place.parent}: the expert {name} cannot be a LoRA: its {filtered.get('band')}-pass filter acts on the "
            "tokens between A and B, and a LoRA holds the product B A alone"
        )
    raise ValueError(
        f"{place.parent}: the expert {name} cannot be a LoRA, though it has no filter: it adds B A x to the output of "
        f"the whole {places}, and a LoRA changes the weights of the linear layers inside"
    )


def _check_output(output: Path, names: str) -> None:
    if names not in get_args(LoraNames):
        raise ValueError(f"names: expected one of {', '.join(get_args(LoraNames))}, got {names!r}")
    if names != "peft" and output.suffix != ".safetensors":
        raise ValueError(f"output: expected a .safetensors file, got {output}; only PEFT's layout is a folder")
    if names == "peft" and output.suffix == ".safetensors":
        raise ValueError(f"output: expected a folder for PEFT's two files, got {output}")
    if output.exists():
        raise FileExistsError(f"output: {output} exists already: choose a new name")


def _place(source: Path) -> Path:
    """Where the LoRA lies: in an adaptation's export, or at the source itself."""
    inside = [source / place for place in _PLACES if (source / place / ADAPTER_WEIGHTS).is_file()]
    return inside[0] if inside and not (source / ADAPTER_WEIGHTS).is_file() else source


def _surrounding(place: Path) -> Path | None:
    """The transformer's folder that a LoRA lies in."""
    folder = (place if place.is_dir() else place.parent).resolve().parent
    return folder if (folder / "config.json").is_file() else None


def _attention(place: Path) -> Mapping[str, Any] | None:
    """The attention in a LoRA's header."""
    path = place / ADAPTER_WEIGHTS if place.is_dir() else place
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(ATTENTION_HEADER)
        record = None if text is None else json.loads(text)
    except (OSError, SafetensorError, ValueError):  # a pickle, or another program's word
        return None
    return record if isinstance(record, dict) else None


def _layers(fitted: FittedLora, file: LoraFile) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer.

    Raises:
        ValueError: when it holds more than these.
    """
    found = {key.removeprefix("transformer."): tensor for key, tensor in fitted.state_dict.items()}
    parts = {key: parse_name(key) for key in file.tensors}
    more = [key for key, name in parts.items() if name is None or name.part not in ("A", "B", "alpha")]
    if more:
        raise ValueError(
            f"LoRA {fitted.summary.name}: only A and B can be converted, it holds more, for instance {more[0]}"
        )
    names = [key.removesuffix(_ADDED[0]) for key in found if key.endswith(_ADDED[0])]
    return {name: (found[name + _ADDED[0]], found[name + _ADDED[1]]) for name in names}


def _config(layers: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, float], **options: Any) -> LoraConfig:
    """PEFT's configuration with each layer's rank and alpha; patterns name those that differ from the first."""
    ranks = {name: len(a) for name, (a, _) in layers.items()}
    alphas = {name: _plain(scales[name] * rank) for name, rank in ranks.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # PEFT takes fractions, too
        rank_pattern={name: other for name, other in ranks.items() if other != rank},
        alpha_pattern={name: other for name, other in alphas.items() if other != alpha},
        target_modules=list(layers),
        **options,
    )


def _plain(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _named(layers: Mapping[str, tuple[Tensor, Tensor]], prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}{name}{end}": tensor
        for name, halves in layers.items()
        for end, tensor in zip(_ADDED, halves, strict=True)
    }


def _comfyui(
    layers: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, float], denoiser: Denoiser
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, (a, b) in layers.items():
        key = f"diffusion_model.{denoiser.original_name(name)}"
        found |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        found[f"{key}.alpha"] = torch.tensor(scales[name] * len(a), dtype=torch.float32)
    return found


def _diffsynth(
    layers: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, float], denoiser: Denoiser
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, (a, b) in layers.items():
        key = denoiser.original_name(name)
        scaled = (a.float() * scales[name]).to(a.dtype)
        found |= {f"{key}.lora_A.default.weight": scaled, f"{key}.lora_B.default.weight": b}
    return found


def _save(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    safetensors.torch.save_file({key: x.contiguous() for key, x in tensors.items()}, path, metadata=header)
