"""What LuVe asks of a backbone.

A backbone is a diffusers pipeline folder or hub id. A family of backbones is five small classes in one file:

- a `LatentSpace` around its VAE: pixels to normalised latents and back (`latents.py`);
- a `TextConditioner` around its tokenizer and text encoder: captions to embeddings (`text.py`);
- a `Denoiser` around its transformer: velocities, the sites where experts sit, what training recomputes
  (`denoiser.py`);
- a `Schedule` around its scheduler: noise levels and time steps;
- a `Backbone`, which says by which class names its folders are known, and loads and builds the four.

Everything else in the package speaks to these classes. The modules inside them stay reachable (`LatentSpace.vae`,
`Denoiser.module`, ...) because pipelines, optimisers and checkpoints hold modules; their attributes are the family's
own business.

`models/backbones/wan.py` is the example to read; `load_backbone` and `family_of` (`finding.py`) pick the family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from luve_lightning.functional.flow_matching import sigma_of_timestep, timestep_of_sigma
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.models.backbones.denoiser import Denoiser
from luve_lightning.models.backbones.latents import LatentSpace
from luve_lightning.models.backbones.sizes import SizeRules
from luve_lightning.models.backbones.text import TextConditioner


class Schedule:
    """Noise levels and time steps of a diffusers scheduler for flow matching.

    Args:
        scheduler: has `sigmas`, `timesteps`, `set_timesteps`, `set_begin_index` and `step`, as diffusers' have; a
            pipeline holds and saves it.
        shift: towards more noise, see `functional.flow_matching.shift_sigma`.
    """

    remembered: ClassVar[int] = 0
    """Earlier velocities that a step looks back on."""

    def __init__(self, scheduler: Any, shift: float) -> None:
        self.scheduler, self.shift = scheduler, shift

    @property
    def train_timesteps(self) -> int:
        """The timestep of sigma 1."""
        return int(self.scheduler.config.num_train_timesteps)

    def timestep_of(self, sigma: Tensor) -> Tensor:
        """The timestep that the transformer is given at a sigma; a sampler's own may be rounded."""
        return timestep_of_sigma(sigma, self.train_timesteps)

    def sigma_of(self, timestep: Tensor) -> Tensor:
        """The inverse of `timestep_of`."""
        return sigma_of_timestep(timestep, self.train_timesteps)


class Backbone(ABC):
    """A pipeline folder or hub id of one family; its parts are loaded when they are asked for.

    A subclass that is imported, or named by an entry point of the group "luve_lightning.backbones", is found by
    `load_backbone`.

    Args:
        path: a local pipeline folder, a folder with some of its parts, a transformer's own folder, or a hub id.
    """

    name: ClassVar[str]
    """What configurations of new models call the family."""
    class_names: ClassVar[frozenset[str]]
    """Class names in `model_index.json` and `config.json` by which the family's folders and modules are known."""
    latent_space_class: ClassVar[type[LatentSpace]]
    text_class: ClassVar[type[TextConditioner]]
    denoiser_class: ClassVar[type[Denoiser]]

    def __init__(self, path: str | Path) -> None:
        self.path = path

    # Loading. Each raises FileNotFoundError for what cannot be had, and ValueError for damaged files or another
    # model's. `dtype` is that of the weights; float32 when None, whatever is on disk.

    @abstractmethod
    def latent_space(self, dtype: torch.dtype | None = None) -> LatentSpace:
        """Load `vae/`."""

    @abstractmethod
    def text(self, dtype: torch.dtype | None = None, length: int | None = None) -> TextConditioner:
        """Load `tokenizer/` and `text_encoder/`, frozen; `length` None takes the backbone's own."""

    @abstractmethod
    def denoiser(self, dtype: torch.dtype | None = None, part: str = "transformer") -> Denoiser:
        """Load a transformer: the subfolder `part`, or `path` itself where that is a transformer's own folder."""

    @abstractmethod
    def schedule(self, shift: float | None = None) -> Schedule:
        """Load `scheduler/`; `shift` None keeps the backbone's own."""

    def serving(self) -> Mapping[str, SigmaBand]:
        """The sigmas that each transformer serves, by the transformers' subfolders: one for most families."""
        return {"transformer": SigmaBand()}

    # Known from configuration files alone.

    @abstractmethod
    def size_rules(self) -> SizeRules:
        """What height, width and frames of a video must be multiples of; no weights are loaded."""

    @abstractmethod
    def configs(self) -> dict[str, dict[str, Any]]:
        """Configurations of "transformer", "vae" and "text_encoder", and {"shift", "length"} as "numbers"."""

    # New models.

    @classmethod
    @abstractmethod
    def from_config(cls, part: str, config: Mapping[str, Any]) -> nn.Module:
        """A "transformer", "vae" or "text_encoder" with random weights, on the current device, as `configs` says."""

    @classmethod
    @abstractmethod
    def build_vae(cls, sizes: Mapping[str, Any]) -> nn.Module:
        """A new VAE of a user's sizes.

        Raises:
            ValueError: for sizes out of range, unknown, or that do not fit each other.
        """

    @classmethod
    @abstractmethod
    def build_text(cls, captions: Iterable[str], length: int, sizes: Mapping[str, Any]) -> TextConditioner:
        """A new text encoder of a user's sizes, and a tokenizer of the captions' words; raises like `build_vae`."""

    @classmethod
    @abstractmethod
    def build_denoiser(cls, sizes: Mapping[str, Any], text_dim: int) -> Denoiser:
        """A new transformer of a user's sizes for embeddings of this width; raises like `build_vae`."""

    @classmethod
    @abstractmethod
    def build_schedule(cls, shift: float) -> Schedule:
        """The family's schedule at a shift."""

    @classmethod
    @abstractmethod
    def save_vae(cls, vae: nn.Module, folder: str | Path, dtype: torch.dtype) -> None:
        """Save a VAE as `folder`, which `latent_space` reads as `vae/`; the VAE stays as it is."""

    @classmethod
    @abstractmethod
    def save(
        cls,
        folder: Path,
        denoiser: Denoiser,
        text: TextConditioner,
        schedule: Schedule,
        vae: Path,
        dtype: torch.dtype,
    ) -> None:
        """Save a whole backbone folder.

        Args:
            folder: where to.
            denoiser: its weights and the text encoder's are copied, not changed.
            text: see `denoiser`.
            schedule: what sampling takes.
            vae: a folder that `save_vae` wrote, copied byte by byte.
            dtype: dtype on disk of the transformer and the text encoder.
        """
