"""Parameters of a replaced attention, in a file beside the transformer's own weights, which diffusers loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luve_lightning.models.folders import is_local, loading

if TYPE_CHECKING:
    from luve_lightning.models.backbones.denoiser import Denoiser

BRANCH = "branch"
"""Name of the submodule of a block's self-attention that holds them."""
BRANCH_WEIGHTS = "attention.safetensors"
"""Name of their file."""


def save_branches(denoiser: Denoiser, folder: Path, old: Path | None = None) -> None:
    """Write them into a transformer's folder.

    Nothing is written where there are none, unless `old`, the folder to be replaced, has some.
    """
    weights = _weights(denoiser)
    if weights or (old is not None and (old / BRANCH_WEIGHTS).is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: x.contiguous() for key, x in weights.items()}, folder / BRANCH_WEIGHTS)


def load_branches(denoiser: Denoiser, backbone: str | Path, part: str) -> None:
    """Load them into a transformer that is loaded otherwise; nothing where it has none.

    Args:
        denoiser: the transformer.
        backbone: folder or hub id that it is from.
        part: its subfolder; empty where `backbone` is a transformer's own folder.

    Raises:
        FileNotFoundError: when the hub does not have them.
        ValueError: for a file that is missing, damaged or of other parameters.
    """
    file = Path(backbone) / part / BRANCH_WEIGHTS
    if not denoiser.branches and not file.is_file():
        return
    if not is_local(backbone):
        with loading(backbone, part):
            file = Path(hf_hub_download(str(backbone), BRANCH_WEIGHTS, subfolder=part or None))
    try:
        weights = load_file(file)
    except FileNotFoundError:
        raise ValueError(f"{file}: missing; the transformer's attention has parameters of its own") from None
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from error
    wanted = _weights(denoiser)
    shapes = [{key: tuple(x.shape) for key, x in some.items()} for some in (weights, wanted)]
    if shapes[0] != shapes[1]:
        odd = sorted(dict(shapes[0].items() ^ shapes[1].items()))
        raise ValueError(f"{file}: does not fit the attention in config.json, for instance {odd[0]}")
    with torch.no_grad():
        for key, x in wanted.items():
            x.copy_(weights[key])
    denoiser.module.lacks_branches = False


@contextmanager
def branches_set_aside(denoiser: Denoiser) -> Iterator[None]:
    """Take them out of the transformer, for diffusers to save it."""
    branches = denoiser.branches
    try:
        for _, site in denoiser.attention_sites:
            site._modules.pop(BRANCH, None)
        yield
    finally:
        for name, site in denoiser.attention_sites:
            if branch := branches.get(f"{name}.{BRANCH}"):
                site.add_module(BRANCH, branch)


def shapes_of(branch: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a block's parameters by name."""
    return {name: tuple(x.shape) for name, x in branch.state_dict().items()}


def _weights(denoiser: Denoiser) -> dict[str, Tensor]:
    return {f"{name}.{key}": x for name, part in denoiser.branches.items() for key, x in part.state_dict().items()}
