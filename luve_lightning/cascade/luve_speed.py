"""What makes LuVePipeline faster or smaller: each is off until it is switched on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from diffusers import (
    ContextParallelConfig,
    FirstBlockCacheConfig,
    TaylorSeerCacheConfig,
    WanTransformer3DModel,
)
from diffusers.models.attention_dispatch import attention_backend

from luve_lightning.cascade.luve_components import LuVeComponents
from luve_lightning.models.backbones import LatentSpace
from luve_lightning.models.experts import expert_names
from luve_lightning.models.experts.routing import TokenSplit, state_of

CacheName = Literal["first_block", "taylorseer"]

# diffusers' own patterns ("blocks.*attn", matched in full) name no module of Wan: its cache would do nothing.
_TAYLORSEER_MODULES = [r"blocks\.\d+\.(attn1|attn2|ffn)"]


@dataclass(frozen=True)
class SpeedOptions:
    """Speed and memory of the pipeline; the defaults change nothing. `LuVeSpeed.apply` puts them into force.

    Attributes:
        attention: a backend of diffusers, such as _native_cudnn or flash; None is PyTorch's own choice.
        cache: step-to-step cache: first_block skips a step's other blocks when the first one's output changed by
            less than `cache_threshold`, taylorseer computes every `cache_interval`-th step and extrapolates.
        cache_threshold: relative change, >= 0; 0 skips nothing.
        cache_interval: steps, >= 1.
        compile: compile the transformers' blocks; the first steps of each size and expert take minutes.
        offload: keep only the model that runs on the GPU.
        decode_tile: height and width in latents of the tiles that are decoded at a time; None decodes whole frames.
    """

    attention: str | None = None
    cache: CacheName | None = None
    cache_threshold: float = 0.05
    cache_interval: int = 3
    compile: bool = False
    offload: bool = False
    decode_tile: tuple[int, int] | None = None

    def cache_config(self) -> Any:
        """Diffusers' configuration of the cache, or None.

        Raises:
            ValueError: for an unknown cache or a number out of range.
        """
        if self.cache is None:
            return None
        if self.cache not in get_args(CacheName):
            raise ValueError(
                f"cache: expected one of {', '.join(get_args(CacheName))} or null, got {self.cache!r}"
            )
        if self.cache_threshold < 0 or self.cache_interval < 1:
            raise ValueError(
                f"cache_threshold {self.cache_threshold} and cache_interval {self.cache_interval}: expected >= 0 and "
                ">= 1"
            )
        if self.cache == "first_block":
            return FirstBlockCacheConfig(threshold=self.cache_threshold)
        return TaylorSeerCacheConfig(
            cache_interval=self.cache_interval,
            cache_identifiers=_TAYLORSEER_MODULES,
            taylor_factors_dtype=None,
        )


class LuVeSpeed(LuVeComponents):
    """The switches; see LuVeComponents for the rest."""

    decode_tile: tuple[int, int] | None = None
    context_parallel_degree: int = 1

    def apply(self, options: SpeedOptions) -> None:
        """Put options into force, once, after the pipeline was moved to its device.

        Raises:
            ValueError: for options that do not exist or do not work here.
        """
        if options.attention is not None:
            self.set_attention_backend(options.attention)
        if options.cache is not None:
            self.enable_cache(options.cache_config())
        if options.compile:
            self.compile_blocks()
        if options.decode_tile is not None:
            self.enable_tiled_decoding(options.decode_tile)
        if options.offload:
            if not torch.accelerator.is_available():
                raise ValueError("offload: models are kept off a GPU, and there is none here")
            self.enable_model_cpu_offload()

    def set_attention_backend(self, backend: str) -> None:
        """Choose diffusers' attention backend for every transformer.

        Raises:
            ValueError: for an unknown backend, or one whose package is not installed.
        """
        for transformer in self.transformers:
            try:
                with attention_backend():  # at its end, the default of the process is what it was
                    transformer.set_attention_backend(backend)
            except (RuntimeError, ValueError, ImportError) as error:
                raise ValueError(f"attention backend {backend!r}: {' '.join(str(error).split())}") from error

    def enable_cache(self, config: Any) -> None:
        """Reuse parts of earlier steps, by one of diffusers' cache hooks, in every transformer.

        What is cached is dropped wherever another expert comes into force, and between stages: caches that count steps
        count from there.

        Args:
            config: such as `FirstBlockCacheConfig`, `TaylorSeerCacheConfig` with `cache_identifiers`, `MagCacheConfig`;
                `SpeedOptions.cache_config` makes the common ones.

        Raises:
            ValueError: for a configuration that caches nothing in Wan's transformer, or does not go with context
                parallelism.
        """
        if self.context_parallel_degree > 1 and isinstance(config, FirstBlockCacheConfig):
            raise ValueError(_CACHE_AND_CONTEXT)
        for transformer in self.transformers:
            transformer.enable_cache(config)
            if not _caches_something(transformer):
                transformer.disable_cache()
                raise ValueError(
                    f"cache: {type(config).__name__} as given names no module of Wan's transformer, so that nothing "
                    "would be cached"
                )

    def disable_cache(self) -> None:
        """Undo `enable_cache`."""
        for transformer in self.transformers:
            if transformer.is_cache_enabled:
                transformer.disable_cache()

    def compile_blocks(self, **kwargs: Any) -> None:
        """Compile every block of every transformer with torch.compile.

        Each size and each expert is a graph of its own, of which torch keeps 8 before it gives up compiling.

        Args:
            kwargs: of torch.compile.
        """
        for transformer in self.transformers:
            transformer.compile_repeated_blocks(**kwargs)

    def enable_tiled_decoding(self, tile: tuple[int, int] = LatentSpace.default_tile) -> None:
        """Decode, and encode for RGB interpolation, in tiles: the same to rounding, in much less memory.

        Args:
            tile: height and width in latents, each >= 1.
        """
        if len(tile) != 2 or min(tile) < 1:
            raise ValueError(f"decode_tile {tile}: expected a height and a width in latents, each at least 1")
        self.decode_tile = (int(tile[0]), int(tile[1]))

    def disable_tiled_decoding(self) -> None:
        """Undo `enable_tiled_decoding`."""
        self.decode_tile = None

    def enable_context_parallel(self, degree: int) -> None:
        """Spread each video's tokens over this many processes, by diffusers' context parallelism (Ulysses).

        Every process then calls the pipeline with the same arguments and a generator of the same seed, and has the
        whole result. The other stages run on each alike. It cannot be undone.

        Args:
            degree: the number of processes that torchrun started; it divides the transformers' attention heads (12
                in Wan2.1-1.3B).

        Raises:
            ValueError: for a degree that does not divide the heads or is not the number of processes.
        """
        for transformer in self.transformers:
            heads = transformer.config.num_attention_heads
            if degree < 2 or heads % degree:
                fits = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
                raise ValueError(
                    f"context parallelism over {degree} devices: the transformer has {heads} attention heads, which "
                    f"are spread evenly: expected {fits}"
                )
            if transformer.is_cache_enabled and isinstance(transformer._cache_config, FirstBlockCacheConfig):
                raise ValueError(_CACHE_AND_CONTEXT)
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if processes != degree:
            raise ValueError(
                f"context parallelism over {degree} devices: {processes} process{'' if processes == 1 else 'es'} here; "
                f"start it with torchrun --nproc_per_node {degree} and initialise torch.distributed"
            )
        for transformer in self.transformers:
            config = ContextParallelConfig(ulysses_degree=degree)
            transformer.enable_parallelism(config=config)
            if expert_names(transformer):
                state_of(transformer).split = TokenSplit(config._flattened_mesh.get_group())
        self.context_parallel_degree = degree


_CACHE_AND_CONTEXT = (
    "cache: first_block decides on each process's own tokens, and with context parallelism the processes would wait "
    "for each other for ever; use taylorseer"
)


def _caches_something(transformer: WanTransformer3DModel) -> bool:
    registries = (getattr(module, "_diffusers_hook", None) for module in transformer.modules())
    return any(hook._is_stateful for r in registries if r is not None for hook in r.hooks.values())
