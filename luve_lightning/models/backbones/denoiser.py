"""The interface between LuVe and a backbone's diffusion transformer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from luve_lightning.functional.frequency import Grid
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.noise_bands import sigma_of_timestep
from luve_lightning.model_folders import BRANCH_WEIGHTS, saving
from luve_lightning.models.attention import (
    ATTENTION_KEY,
    BRANCH,
    Attention,
    TaggedRotary,
    branches_set_aside,
    save_branches,
    saved_attention,
    shapes_of,
)
from luve_lightning.models.attention.dense import Dense
from luve_lightning.models.backbones.recompute import Recompute, set_recompute

Place = Literal["attention", "cross_attention", "feed_forward"]
"""Where in a block an expert can sit."""

REFINEMENT_KEY = "luve_refinement"  # in the transformer's configuration; diffusers keeps unknown keys

_MOST_GRAPHS = 64  # of one part of a block: some sizes, with each expert, with and without gradients


class Denoiser(ABC):
    """A transformer that predicts velocities of latents. It is not a module itself but represents one.

    Args:
        module: the transformer, a diffusers ModelMixin with adapters. State, hooks and experts live on it, so a
            copy of the module has its own, and two denoisers of one module are equivalent.
    """

    module_class: ClassVar[type[Any]]
    """Class of the transformer."""
    sites: ClassVar[Mapping[Place, str]]
    """Name within a block of the module at each place where an expert can sit, in the order a block runs them."""
    lora_targets: ClassVar[Sequence[str]]
    """What a plain LoRA of every linear layer of the blocks adapts, as PEFT's `target_modules`."""
    cached: ClassVar[Sequence[str]]
    """Regular expressions of the modules whose outputs a step-to-step cache may extrapolate."""
    modulation: ClassVar[str] = ""
    """Name, in the family's own code, of the table of modulations of a block and of the head; "" without one."""

    def __init__(self, module: Any) -> None:
        self.module = module
        if self.attention is None and (saved := saved_attention(module.config)) is not None:
            self.use_attention(saved)
            module.lacks_branches = bool(self.branches)  # until they are loaded

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its inputs, latents and text."""
        dtype: torch.dtype = self.module.dtype
        return dtype

    @property
    @abstractmethod
    def channels(self) -> int:
        """Number of latent channels of its input and output.

        Raises:
            ValueError: where these differ.
        """

    @property
    def conditioned(self) -> bool:
        """Whether it takes the latents of another video beside those that it denoises, along the channels."""
        return False

    def take_condition(self) -> None:
        """Take the latents of another video beside its own from now on, as its configuration then says.

        The weights for them are new, and zero: what it computes stays the same, to the bit, until they are trained.
        A family that cannot raises ValueError.
        """
        raise ValueError(f"condition: {type(self).__name__} takes no other latents beside those that it denoises")

    @property
    def trained_for(self) -> str | None:
        """Name of the refinement that it was trained for; None where that is LuVe's, or none."""
        return self.module.config.get(REFINEMENT_KEY)

    def train_for(self, refinement: str) -> None:
        """Note in the transformer's configuration which refinement it is trained for."""
        self.module.register_to_config(**{REFINEMENT_KEY: refinement})

    @property
    def embedding_parameters(self) -> Sequence[nn.Parameter]:
        """Parameters of the layer that makes tokens of latents, which `take_condition` widens."""
        return ()

    @property
    @abstractmethod
    def text_dim(self) -> int:
        """Width of its text embeddings."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """Number of attention heads, which context parallelism spreads over devices."""

    @property
    @abstractmethod
    def patch(self) -> Size3d:
        """Latent frames, rows and columns of one token."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[tuple[str, nn.Module]]:
        """Blocks in order of execution, with their names in the module."""

    @staticmethod
    @abstractmethod
    def widths(site: Any) -> tuple[int, int]:
        """Input and output channels of a module at one of the sites."""

    def velocity(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        *,
        sigmas: tuple[float, ...] | None = None,
        condition: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Velocity noise - x0 of noised latents.

        Args:
            latents: B x C x t x h x w, in `dtype`.
            timestep: shape (B,), see `Schedule.timestep_of`.
            text: embeddings, B x L x D, in `dtype`.
            sigmas: each sample's noise level, for an attention that depends on it; None reads it from `timestep`,
                which waits for the device.
            condition: latents of another video, of the same shape and in `dtype`, where it is `conditioned`.
            options: the family's own, such as diffusers' `attention_kwargs`.

        Returns:
            B x C x t x h x w.

        Raises:
            ValueError: where the parameters of its attention were not loaded, or a condition is missing or not taken.
        """
        attention = self.attention
        if self.conditioned != (condition is not None):
            takes, got = ("other", "none") if self.conditioned else ("no other", "some")
            raise ValueError(f"condition: the transformer takes {takes} latents beside its own, got {got}")
        if condition is not None:
            latents = torch.cat([latents, condition], dim=1)
        if getattr(self.module, "lacks_branches", False):
            raise ValueError(
                f"{BRANCH_WEIGHTS}: the transformer's attention has parameters, which were not loaded: load it by "
                "load_backbone"
            )
        if attention is not None and attention.needs_sigma:
            # On the module that every pass goes through first; the pass carries them on from there.
            levels = tuple(map(sigma_of_timestep, timestep.tolist())) if sigmas is None else sigmas
            self.rotary.pass_sigmas = levels  # type: ignore[assignment]
        return self.predict(latents, timestep, text, **options)

    @abstractmethod
    def predict(self, latents: Tensor, timestep: Tensor, text: Tensor, **options: Any) -> Tensor:
        """What `velocity` returns: a forward pass of the transformer."""

    @property
    @abstractmethod
    def rotary(self) -> nn.Module:
        """The submodule that makes each pass's rotary embedding: a tuple of tensors, which every block receives."""

    @staticmethod
    @abstractmethod
    def tokens_of(rotary: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Grid]:
        """What a pass is over, from the arguments of `rotary`: a tensor of the batch, and the token grid."""

    @property
    def rotary_channels(self) -> Grid:
        """Channels of a head that turn with a token's frame, row and column.

        Raises:
            ValueError: where the family's rotary embedding cannot be scaled.
        """
        raise ValueError(f"{type(self.module).__name__}: its rotary embedding cannot be scaled")

    @contextmanager
    def scaled_rotary(self, height: float = 1.0, width: float = 1.0, temperature: float = 1.0) -> Iterator[None]:
        """Scales the rotary embedding, and with it every self-attention, compiled or replaced, until the block ends.

        Args:
            height: factor of the base whose powers are the frequencies of rows. Above 1, rows turn slower, the more
                so the slower they turned; 1 changes nothing.
            width: likewise of columns.
            temperature: factor of self-attention's logits: queries and keys are turned and scaled by its square root,
                as in YaRN (arXiv 2309.00071).

        Raises:
            ValueError: where the family's rotary embedding cannot be scaled, and for factors that are not positive.
        """
        del height, width, temperature
        _ = self.rotary_channels
        yield

    @abstractmethod
    def set_attention(self, attend: Callable[..., Tensor] | None) -> None:
        """Replace self-attention's function, see Attention; None restores the family's own.

        Block number n calls `attend(query, key, value, rotary.where(n), branch)`, where `rotary` is the pass's
        TaggedRotary and `branch` the attribute of that name of its self-attention, or None. Use `use_attention` for
        an attention that is saved with the transformer.
        """

    @property
    def attention(self) -> Attention | None:
        """What replaces self-attention; None where it is the family's own."""
        found: Attention | None = getattr(self.module, "replaced_attention", None)
        return found

    @property
    def attention_in_force(self) -> Attention:
        """The attention, `Dense` where it is the family's own."""
        return self.attention or Dense()

    def use_attention(self, attention: Attention | None) -> None:
        """Replace self-attention; the transformer's configuration keeps it, and loading restores it.

        An attention with parameters keeps those of the one before where they fit. Otherwise they are new, on the
        device and in the dtype of the others.

        Raises:
            ValueError: for one whose settings do not fit this transformer.
        """
        if attention is not None:
            attention.check(len(self.blocks))
        self.module.register_to_config(**{ATTENTION_KEY: None if attention is None else attention.record()})
        self.module.replaced_attention = attention
        self.module.lacks_branches = False
        for _, site in self.attention_sites:
            before = site._modules.pop(BRANCH, None)
            parameter = next(site.parameters())
            with parameter.device:
                branch = None if attention is None else attention.branch(self.heads, self.widths(site)[0] // self.heads)
            if branch is not None:
                branch = branch.to(parameter.dtype)
                fits = before is not None and type(before) is type(branch) and shapes_of(before) == shapes_of(branch)
                site.add_module(BRANCH, before if fits else branch)
        self.set_attention(attention)

    @property
    def attention_sites(self) -> Sequence[tuple[str, nn.Module]]:
        """Self-attention of each block, below an expert, with the name that it has without one."""
        sites = []
        for name, block in self.blocks:
            site: Any = block.get_submodule(self.sites["attention"])
            sites.append((f"{name}.{self.sites['attention']}", getattr(site, "base_layer", site)))
        return sites

    @property
    def branches(self) -> dict[str, nn.Module]:
        """Parameters of the replaced attention by their name in the transformer without experts."""
        found = ((f"{name}.{BRANCH}", getattr(site, BRANCH, None)) for name, site in self.attention_sites)
        return {name: branch for name, branch in found if branch is not None}

    @staticmethod
    def original_name(name: str) -> str:
        """A module's name in the family's own code, by which other trainers' LoRAs know it.

        So is that of a parameter which is no module's weight or bias.
        """
        return name

    def copy(self) -> Denoiser:
        """A new transformer of the same configuration, on the CPU, with other weights."""
        config = self.module.config
        new = type(self)(self.module_class(**{k: v for k, v in config.items() if not k.startswith(("_", "luve_"))}))
        if (attention := saved_attention(config)) is not None:
            new.use_attention(attention)
        if self.trained_for is not None:
            new.train_for(self.trained_for)
        return new

    def save(self, folder: str | Path, dtype: torch.dtype) -> None:
        """Save the transformer with all its weights in one dtype; they are cast in place.

        Loading widens what must be float32.
        """
        # Not `.to(dtype)`: diffusers warns of the modules that it keeps in float32, which concerns running only.
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        with saving(folder) as new:
            save_branches(self, new, Path(folder))
            with branches_set_aside(self):
                self.module.save_pretrained(new)

    def token_grid(self, latents: Size3d) -> Grid:
        """Token frames, rows and columns of latents of this size.

        Raises:
            ValueError: for a size where the transformer would silently drop a row, a column or a frame.
        """
        for name, n, p in zip(("frames", "height", "width"), latents, self.patch, strict=True):
            if n < p or n % p:
                low = max(p, n // p * p)
                raise ValueError(
                    f"latent {name} {n}: the transformer takes multiples of {p}, nearest are {low} and {low + p}"
                )
        t, h, w = (n // p for n, p in zip(latents, self.patch, strict=True))
        return t, h, w

    def tell_sites(self) -> None:
        """Tell the expert layers about each forward pass they run in, including passes that recompute blocks.

        Called once, when the first expert is added. `module.expert_state.call(grid, batch, device)` is called once
        in each forward pass. Its result travels with the pass itself, on the rotary embedding, and is set as the
        attribute `expert_call` of every module at one of the `sites` that has one, before its block runs. So a
        block that gradient checkpointing runs again gets the result of its own pass, whatever ran in between.
        """
        self.tag_passes()
        self.rotary.expert_state = self.module.expert_state
        for _, block in self.blocks:
            block.expert_sites = tuple(self.sites.values())  # type: ignore[assignment]  # a plain attribute, not a module
            block.register_forward_pre_hook(_tell_layers, with_kwargs=True)

    def tag_passes(self) -> None:
        """Make `rotary` return a `TaggedRotary` from now on.

        The hook is a module-level function and what it needs lies on the module: a deep copy has its own.
        """
        rotary: Any = self.rotary
        if not hasattr(rotary, "tokens_of"):
            rotary.tokens_of = self.tokens_of
            rotary.register_forward_hook(_tag_rotary, with_kwargs=True)

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor", **options: Any) -> None:
        """Compile every block with torch.compile; a replaced self-attention runs between the compiled halves.

        All blocks share their graphs; each size, and each choice of experts, has its own. Add experts before. Two of
        torch's settings change for the process: it would give up after 8 graphs, and cut up a block under DDP, which
        fails where blocks are recomputed.

        Args:
            backend: torch.compile's.
            options: torch.compile's; sizes are constants by default.

        Raises:
            ValueError: for a backend that torch.compile does not know.
        """
        chosen: dict[str, Any] = {"dynamic": False}
        if backend == "inductor" and "mode" not in options:
            # torch 2.11 gives gradients of a wrong shape by these kernels (pytorch issue 178080).
            chosen["options"] = {"triton.mix_order_reduction": False}
        settings = torch._dynamo.config
        settings.recompile_limit = max(settings.recompile_limit, _MOST_GRAPHS)
        settings.optimize_ddp = False
        try:
            for _, block in self.blocks:
                block.compile(backend=backend, **chosen | options)
        except torch._dynamo.exc.InvalidBackend:
            raise ValueError(
                f"compile: expected a backend of torch.compile such as inductor, got {backend!r}"
            ) from None

    def set_recompute(
        self, recompute: Recompute, keep_attention: int | None = None, offload: bool = False, chunks: int = 1
    ) -> None:
        """Choose what training recomputes in the backward pass; see `recompute.set_recompute`."""
        blocks = [block for _, block in self.blocks]
        sites: list[Any] = [block.get_submodule(self.sites["feed_forward"]) for block in blocks]
        below = [getattr(site, "base_layer", site) for site in sites]  # an expert
        set_recompute(self.module, blocks, recompute, keep_attention, offload, chunks, below)


def _tag_rotary(rotary: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]) -> TaggedRotary:
    tokens, grid = rotary.tokens_of(rotary, args, kwargs)
    state = getattr(rotary, "expert_state", None)
    call = None if state is None else state.call(grid, len(tokens), tokens.device)
    return TaggedRotary(output, grid, call, getattr(rotary, "pass_sigmas", None))


def _tell_layers(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tagged = [given for given in (*args, *kwargs.values()) if isinstance(given, TaggedRotary)]
    call = tagged[0].call if tagged else None
    for name in block.expert_sites:
        layer = block.get_submodule(name)
        if hasattr(layer, "expert_call"):
            layer.expert_call = call
