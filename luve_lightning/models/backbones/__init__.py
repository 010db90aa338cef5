"""Backbones: one interface, each family of diffusion models behind it, and which family a folder or a module is of."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luve_lightning.files import read_json
from luve_lightning.model_folders import (
    KnownWeights,
    WeightsHeader,
    cannot_load,
    hub_file,
    is_local,
    read_config,
    read_header,
)
from luve_lightning.models.backbones.base import Backbone, Sampler, Schedule, check_sampler
from luve_lightning.models.backbones.denoiser import REFINEMENT_KEY, Denoiser, Place
from luve_lightning.models.backbones.encoders import CutText, CutTextWarning, LatentSpace, SizeRules, TextConditioner
from luve_lightning.models.backbones.recompute import Recompute

__all__ = [
    "REFINEMENT_KEY",
    "Backbone",
    "CutText",
    "CutTextWarning",
    "Denoiser",
    "LatentSpace",
    "Place",
    "Recompute",
    "Sampler",
    "Schedule",
    "SizeRules",
    "TextConditioner",
    "check_sampler",
    "denoiser_of",
    "empty_denoiser",
    "family_named",
    "family_of",
    "latent_space_of",
    "load_backbone",
    "recognise",
]


GROUP = "luve_lightning.backbones"
"""Entry points of packages that bring a family: name = "package.module:Class"."""

_LORA = re.compile(r"lora|lokr|hada|\.diff(_b|_m)?$")

# Where to look for a class name, in this order: whole pipelines, a transformer's own folder, some of the parts.
_FILES = ("model_index.json", "config.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json")


def load_backbone(path: str | Path) -> Backbone:
    """The backbone of a pipeline folder or a hub id; no weights are loaded yet.

    Args:
        path: local pipeline folder, a folder with its transformer/ or its vae/, a transformer's own folder or
            `.safetensors` file, or a hub id such as "Wan-AI/Wan2.1-T2V-1.3B-Diffusers".

    Raises:
        FileNotFoundError: when it is neither, or holds no such file.
        ValueError: for an unknown family, or a file that is damaged or of something else.
    """
    if Path(path).is_file():
        return _of_file(Path(path))
    names = _class_names(path)
    for family in families():
        if (family.class_names | family.original_names) & set(names):
            return family(path)
    known = ", ".join(sorted(name for family in families() for name in family.class_names))
    raise ValueError(f"backbone {path}: no family of backbones is known for {names[0]}; known are {known}")


def recognise(header: WeightsHeader) -> KnownWeights | None:
    """What a single weights file holds of a backbone, by the names and shapes in its header alone.

    Args:
        header: from `model_folders.read_header(path)`, which reads no tensor.

    Returns:
        Family, part ("transformer", "vae", "text_encoder"), whose names it has, their prefix, the sizes, and why it
        is refused where it cannot be used; None for what no family knows: LoRAs, experts, VLUers, other models.
    """
    return next((found for family in families() if (found := family.recognise(header)) is not None), None)


def family_of(module: nn.Module) -> type[Backbone]:
    """The family of a transformer or a VAE.

    Raises:
        ValueError: for a module of no known family.
    """
    names = {kind.__name__ for kind in type(module).__mro__}
    for family in families():
        if family.class_names & names:
            return family
    raise ValueError(f"no family of backbones is known for a {type(module).__name__}")


def denoiser_of(transformer: nn.Module) -> Denoiser:
    """The denoiser of a transformer.

    Raises:
        ValueError: for a module of no known family, or a wrapped or compiled one.
    """
    return family_of(transformer).denoiser_class(transformer)


def empty_denoiser(backbone: str | Path) -> Denoiser:
    """A backbone's denoiser without values, to fit names and shapes to; its weights are not read.

    Raises:
        FileNotFoundError: when there is no such backbone.
        ValueError: for one of no known family.
    """
    family = load_backbone(backbone)
    config = family.config("transformer")
    try:
        with torch.device("meta"):
            return denoiser_of(family.from_config("transformer", config))
    except Exception as error:  # anything at all: libraries divide by sizes and unpack them unchecked
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"backbone {backbone}: its config.json makes no transformer: {reason}") from error


def latent_space_of(vae: nn.Module, tile: tuple[int, int] | None = None) -> LatentSpace:
    """The latent space of a VAE; see LatentSpace.

    Raises:
        ValueError: for a module of no known family.
    """
    kind: Any = family_of(vae).latent_space_class
    space: LatentSpace = kind(vae, tile)
    return space


def family_named(name: str) -> type[Backbone]:
    """The family of this name.

    Raises:
        ValueError: for an unknown name; lists the known ones.
    """
    known = {family.name: family for family in families()}
    if name not in known:
        raise ValueError(f"family: expected one of {', '.join(sorted(known))}, got {name!r}")
    return known[name]


def families() -> list[type[Backbone]]:
    """Every known family: this package's, those imported already and those of entry points.

    A folder's class names are compared with these; nothing is imported because a downloaded file says so.
    """
    _import_families()
    return list(_subclasses(Backbone))  # type: ignore[type-abstract]  # its subclasses are wanted, not the class itself


def _of_file(path: Path) -> Backbone:
    """The backbone of a transformer's own file."""
    try:
        header = read_header(path)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"backbone {error}") from error
    known = recognise(header)
    if known is None:
        kind = "a LoRA" if any(map(_LORA.search, header.shapes)) else "nothing that a family of backbones knows"
        first = next(iter(header.shapes), "no weights at all")
        raise ValueError(f"backbone {path}: holds {kind}, for instance {first}; expected a transformer's weights")
    if known.refusal is not None:
        raise ValueError(f"backbone {path}: {known.refusal}")
    return family_named(known.family)(path)


@cache
def _import_families() -> None:
    """Import them once: searching the installed packages takes 10 ms."""
    for found in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{found.name}")
    for entry in entry_points(group=GROUP):
        entry.load()


def _subclasses(kind: type[Backbone]) -> Iterator[type[Backbone]]:
    for found in kind.__subclasses__():
        yield from _subclasses(found)
        if not getattr(found, "__abstractmethods__", None):
            yield found


def _class_names(path: str | Path) -> list[str]:
    """Class names in a folder's configuration files, the pipeline's first."""
    local, first = is_local(path), None
    for name in _FILES:
        try:
            file = Path(path) / name if local else hub_file(path, name)
            content = read_json(file) if name.startswith("text") else read_config(file.parent, "", file.name)
        except OSError as error:
            first = first or error
            continue
        if name.startswith("text"):  # transformers' way
            return list(map(str, content.get("architectures") or ["a text encoder without architectures"]))
        transformer = content.get("transformer")  # its library and its class
        return [content["_class_name"], *(transformer[1:] if isinstance(transformer, list) else [])]
    if local:
        raise FileNotFoundError(
            f"backbone {path}: no model_index.json there, nor transformer/config.json; expected a diffusers pipeline "
            "folder or a transformer's own"
        )
    assert first is not None
    raise cannot_load(path, "model_index.json", first) from first
