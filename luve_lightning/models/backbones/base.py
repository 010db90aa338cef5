"""What LuVe asks of a backbone.

A backbone is a diffusers pipeline folder or hub id. A family of backbones is five small classes in one file:

- a `LatentSpace` around its VAE: pixels to normalised latents and back (`latents.py`);
- a `TextConditioner` around its tokenizer and text encoder: captions to embeddings (`text.py`);
- a `Denoiser` around its transformer: velocities, the sites where experts sit, what training recomputes;
- a `Schedule` around its scheduler: noise levels and time steps;
- a `Backbone`, which says by which class names its folders are known, and loads and builds the four.

Everything else in the package speaks to these classes. The modules inside them stay reachable (`LatentSpace.vae`,
`Denoiser.module`, ...) because pipelines, optimisers and checkpoints hold modules; their attributes are the family's
own business.

`models/backbones/wan.py` is the example to read; `load_backbone` and `family_of` (`finding.py`) pick the family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from luve_lightning.functional.flow_matching import sigma_of_timestep, timestep_of_sigma
from luve_lightning.functional.frequency import Grid
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.models.backbones.latents import LatentSpace
from luve_lightning.models.backbones.sizes import SizeRules
from luve_lightning.models.backbones.text import TextConditioner

Place = Literal["attention", "cross_attention", "feed_forward"]
"""Where in a block an expert can sit."""
Recompute = Literal["nothing", "blocks", "all_but_attention"]
"""What the backward pass computes again."""


class Denoiser(ABC):
    """A transformer that predicts velocities of latents. It is not a module, it speaks for one.

    Args:
        module: the transformer, a diffusers ModelMixin with adapters. State, hooks and experts live on it, so that a
            copy of the module has its own.
    """

    sites: ClassVar[Mapping[Place, str]]
    """Name within a block of the module at each place where an expert can sit, in the order a block runs them."""
    site_types: ClassVar[tuple[type[nn.Module], ...]]
    """Classes of these modules."""
    lora_targets: ClassVar[Sequence[str]]
    """What a plain LoRA of every linear layer of the blocks adapts, as PEFT's `target_modules`."""
    cached: ClassVar[Sequence[str]]
    """Regular expressions of the modules whose outputs a step-to-step cache may extrapolate."""

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that latents and text are given in."""
        dtype: torch.dtype = self.module.dtype
        return dtype

    @property
    @abstractmethod
    def channels(self) -> int:
        """Latent channels that it takes and gives.

        Raises:
            ValueError: where these differ.
        """

    @property
    @abstractmethod
    def text_dim(self) -> int:
        """Width of the text embeddings that it takes."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """Attention heads, which context parallelism spreads over devices."""

    @property
    @abstractmethod
    def patch(self) -> Size3d:
        """Latent frames, rows and columns of one token."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[tuple[str, nn.Module]]:
        """Blocks in the order they run, with their names in the module."""

    @abstractmethod
    def widths(self, site: nn.Module) -> tuple[int, int]:
        """Channels that a module at one of the sites takes and gives."""

    @abstractmethod
    def velocity(self, latents: Tensor, timestep: Tensor, text: Tensor, **options: Any) -> Tensor:
        """Velocity noise - x0 of noised latents.

        Args:
            latents: B x C x t x h x w, in `dtype`.
            timestep: shape (B,), see `Schedule.timestep_of`.
            text: embeddings, B x L x D, in `dtype`.
            options: the family's own, such as diffusers' `attention_kwargs`.

        Returns:
            B x C x t x h x w.
        """

    @abstractmethod
    def tell_sites(self) -> None:
        """Tell the expert layers the token grid of each forward pass, in a pass that recomputes blocks too.

        Called once, when the first expert is added. `module.expert_state` has a method `call(grid, batch, device)`:
        in each forward pass of the module it is called once, and what it returns is put into the attribute
        `expert_call` of every module at one of the `sites` that has one, before the block that holds it runs. A
        block that gradient checkpointing runs again is given that of its own pass, whatever ran in between. Hooks
        are module-level functions and state lies on the module, so that a deep copy has its own.
        """

    @abstractmethod
    def set_recompute(self, recompute: Recompute, keep_attention: int | None = None) -> None:
        """Choose what training recomputes in the backward pass.

        Args:
            recompute: "nothing" keeps every activation; "blocks" keeps each block's input only; "all_but_attention"
                keeps the outputs of self-attention too.
            keep_attention: with "all_but_attention", of how many blocks; None is all.

        Raises:
            ValueError: for another word, or a number of blocks that there is no use for.
        """

    @abstractmethod
    def set_attention(self, attend: Callable[..., Tensor] | None) -> None:
        """Replace what self-attention computes of its queries, keys and values; None puts the family's own back.

        Args:
            attend: `attend(query, key, value, grid)`: each B x N x heads x width after norms and positions, on the
                token grid; it returns what `query` is like. What carries it over to a saved transformer is its own
                matter.
        """

    @abstractmethod
    def copy(self) -> Denoiser:
        """A new transformer of the same configuration; its weights are not yet those of this one."""

    @abstractmethod
    def save(self, folder: str | Path, dtype: torch.dtype) -> None:
        """Save the transformer with all its weights in one dtype; they are cast in place."""

    def token_grid(self, latents: Size3d) -> Grid:
        """Token frames, rows and columns of latents of this size.

        Raises:
            ValueError: for a size of which the transformer would silently drop a row, a column or a frame.
        """
        for name, n, p in zip(("frames", "height", "width"), latents, self.patch, strict=True):
            if n < p or n % p:
                low = max(p, n // p * p)
                raise ValueError(
                    f"latent {name} {n}: the transformer takes multiples of {p}, nearest are {low} and {low + p}"
                )
        t, h, w = (n // p for n, p in zip(latents, self.patch, strict=True))
        return t, h, w


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
