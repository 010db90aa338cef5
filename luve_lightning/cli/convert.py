"""`luve convert`, `luve random-models`: weights from and for other programs, and random ones of real size."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from luve_lightning.analysis.model_parts import PartConfigs, wan_1_3b
from luve_lightning.analysis.random_models import write_random_models
from luve_lightning.cascade.lora_conversion import LoraNames
from luve_lightning.cascade.lora_conversion import convert_lora as write_lora
from luve_lightning.cli import Verb
from luve_lightning.cli.index import check_folder
from luve_lightning.files import write_text
from luve_lightning.machine import choose_device
from luve_lightning.models.attention import Attention
from luve_lightning.models.vluer.released import read_released
from luve_lightning.terminal import say

VERBS = {
    "convert vluer": Verb("Generation", "make a VLUer's folder of the released VLUer's file", positional="file output"),
    "convert lora": Verb("Generation", "write a LoRA under another program's names", positional="source output"),
    "random-models": Verb("Measurement", "write a cascade's models with random weights, at real size"),
}


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
