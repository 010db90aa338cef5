"""Options of speed and memory for a pipeline; each is off by default."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn
from torch.func import functional_call

from luve_lightning.models.attention import Attention, Where
from luve_lightning.models.backbones import Denoiser, denoiser_of, load_backbone
from luve_lightning.models.experts import expert_names
from luve_lightning.models.experts.routing import TokenSplit, state_of

if TYPE_CHECKING:
    from luve_lightning.cascade.pipeline import LuVePipeline

CacheName = Literal["first_block", "taylorseer"]

_CACHE_AND_CONTEXT = (
    "cache: first_block decides on each process's own tokens, and with context parallelism the processes would wait "
    "for each other for ever; use taylorseer"
)


@dataclass(frozen=True)
class SpeedOptions:
    """Speed and memory of a pipeline; the defaults change nothing. `LuVePipeline.apply` applies them.

    Attributes:
        attention_backend: a diffusers backend, such as _native_cudnn or flash; None lets PyTorch choose. It has no
            effect on a replaced self-attention.
        cache: step-to-step cache: first_block skips a step's other blocks when the first one's output changed by
            less than `cache_threshold`; taylorseer computes every `cache_interval`-th step and extrapolates.
        cache_threshold: relative change, >= 0; 0 skips nothing.
        cache_interval: steps, >= 1.
        compile: compile the transformers' blocks; the first steps of each size and expert take minutes.
        offload: keep only the model that runs on the GPU.
        decode_tile: height and width in latents of the tiles to decode; None decodes whole frames.
        decode_half: decode in bfloat16. On an H100 or later whole frames then go through fused kernels, five times
            faster; pixels change by about half of one of their 256 levels.
    """

    attention_backend: str | None = None
    cache: CacheName | None = None
    cache_threshold: float = 0.05
    cache_interval: int = 3
    compile: bool = False
    offload: bool = False
    decode_tile: tuple[int, int] | None = None
    decode_half: bool = False

    def __post_init__(self) -> None:
        if self.cache not in (None, *(known := get_args(CacheName))):
            raise ValueError(f"cache: expected one of {', '.join(known)} or null, got {self.cache!r}")
        if self.cache is not None and (self.cache_threshold < 0 or self.cache_interval < 1):
            raise ValueError(
                f"cache_threshold {self.cache_threshold} and cache_interval {self.cache_interval}: expected >= 0 and "
                ">= 1"
            )
        if self.decode_tile is not None and (len(self.decode_tile) != 2 or min(self.decode_tile) < 1):
            raise ValueError(
                f"decode_tile {self.decode_tile}: expected a height and a width in latents, each at least 1"
            )

    def cache_config(self, denoiser: Denoiser) -> Any:
        """Diffusers' configuration of the cache for a transformer, or None."""
        if self.cache is None:
            return None
        if self.cache == "first_block":
            return FirstBlockCacheConfig(threshold=self.cache_threshold)
        return TaylorSeerCacheConfig(
            cache_interval=self.cache_interval, cache_identifiers=list(denoiser.cached), taylor_factors_dtype=None
        )


def cache_of(speed: SpeedOptions) -> dict[str, Any] | None:
    """What decides the results of the step-to-step cache, an option of speed that changes more than rounding."""
    if speed.cache is None:
        return None
    key = "cache_threshold" if speed.cache == "first_block" else "cache_interval"
    return {"name": speed.cache, key: getattr(speed, key)}


def apply_speed(pipeline: LuVePipeline, options: SpeedOptions) -> None:
    """Put options into force, once, after the pipeline was moved to its device.

    Raises:
        ValueError: for options that do not exist or do not work here.
    """
    if options.attention_backend is not None:
        set_attention_backend(pipeline, options.attention_backend)
    if options.cache is not None:
        enable_cache(pipeline, options.cache_config(denoiser_of(pipeline.transformer)))
    if options.compile:
        compile_blocks(pipeline)
    if options.decode_tile is not None:
        pipeline.decode_tile = (int(options.decode_tile[0]), int(options.decode_tile[1]))
    pipeline.decode_half = options.decode_half
    if options.offload:
        if not torch.accelerator.is_available():
            raise ValueError("offload: models are kept off a GPU, and there is none here")
        pipeline.enable_model_cpu_offload()


def compiler_being_loaded(options: SpeedOptions) -> Thread | None:
    """A thread that imports torch.compile's packages, which takes seconds; None where they are not needed.

    Nobody has to join it: who imports them, too, waits.
    """
    if not options.compile:
        return None
    thread = Thread(target=import_module, args=("torch._inductor.compile_fx",), daemon=True)
    thread.start()
    return thread


def set_attention_backend(pipeline: LuVePipeline, backend: str) -> None:
    """Choose diffusers' attention backend for every transformer; warns where self-attention is replaced.

    Raises:
        ValueError: for an unknown backend, or one whose package is not installed.
    """
    for transformer in pipeline.transformers:
        try:
            with attention_backend():  # at its end, the default of the process is what it was
                transformer.set_attention_backend(backend)
        except (RuntimeError, ValueError, ImportError) as error:
            raise ValueError(f"attention backend {backend!r}: {' '.join(str(error).split())}") from error
        if (attention := denoiser_of(transformer).attention) is not None:
            warnings.warn(
                f"attention backend {backend!r}: of no effect on self-attention that is replaced by {attention}; "
                "cross-attention uses it",
                stacklevel=2,
            )


def enable_cache(pipeline: LuVePipeline, config: Any) -> None:
    """Reuse parts of earlier steps, by one of diffusers' cache hooks, in every transformer.

    What is cached is dropped wherever another expert comes into force, and between stages: caches that count steps
    count from there.

    `config` is for instance a `FirstBlockCacheConfig`, a `TaylorSeerCacheConfig` with `cache_identifiers` or a
    `MagCacheConfig`; `SpeedOptions.cache_config` makes the common ones.

    Raises:
        ValueError: for a configuration that caches nothing in this transformer, or is incompatible with context
            parallelism.
    """
    if pipeline.context_parallel_degree > 1 and isinstance(config, FirstBlockCacheConfig):
        raise ValueError(_CACHE_AND_CONTEXT)
    for transformer in pipeline.transformers:
        transformer.enable_cache(config)
        if not _caches_something(transformer):
            transformer.disable_cache()
            raise ValueError(
                f"cache: {type(config).__name__} as given names no module of this transformer, so that nothing would "
                "be cached"
            )


def disable_cache(pipeline: LuVePipeline) -> None:
    """Undo `enable_cache`."""
    for transformer in pipeline.transformers:
        if transformer.is_cache_enabled:
            transformer.disable_cache()


def compile_blocks(pipeline: LuVePipeline, **options: Any) -> None:
    """Compile every block of every transformer; see `Denoiser.compile_blocks`, whose options these are."""
    for transformer in pipeline.transformers:
        denoiser_of(transformer).compile_blocks(**options)


def check_heads(option: str, degree: int, heads: int) -> None:
    """Refuse a number of devices that does not divide a transformer's attention heads.

    Raises:
        ValueError: names the option, and the numbers that do.
    """
    if heads % degree:
        fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"{option} {degree}: the transformer's {heads} attention heads are spread evenly; expected one of {fits}"
        )


def check_spread(sources: Mapping[str, str | Path], degree: int) -> None:
    """Refuse a degree for `enable_context_parallel` by the transformers' configurations, before they are loaded.

    Args:
        sources: from `find_models`.
        degree: see `enable_context_parallel`.

    Raises:
        ValueError: see `check_heads`.
    """
    first = sources.get("transformer", sources["backbone"])
    for source in dict.fromkeys((first, sources.get("refiner", first))):
        check_heads("context_parallel", degree, load_backbone(source).heads())


def enable_context_parallel(pipeline: LuVePipeline, degree: int) -> None:
    """Spread each video's tokens over this many processes, by diffusers' context parallelism (Ulysses).

    Every process then calls the pipeline with the same arguments and a generator of the same seed, and has the whole
    result. The other stages run on each alike. It cannot be undone.

    Args:
        pipeline: its transformers are spread.
        degree: the number of processes that torchrun started; it divides the transformers' attention heads (12 in
            Wan2.1-1.3B).

    Raises:
        ValueError: for a degree that does not divide the heads or is not the number of processes, and an attention
            with parameters that are not one for each head.
    """
    for transformer in pipeline.transformers:
        denoiser = denoiser_of(transformer)
        if not all(getattr(branch, "by_head", False) for branch in denoiser.branches.values()):
            raise ValueError(
                f"context parallelism spreads heads, and {denoiser.attention} has parameters for all of them: spread "
                "prompts over the GPUs instead (context_parallel 1)"
            )
        if degree < 2:
            raise ValueError(f"context_parallel: expected at least 2, got {degree}")
        check_heads("context_parallel", degree, denoiser.heads)
        if transformer.is_cache_enabled and isinstance(transformer._cache_config, FirstBlockCacheConfig):
            raise ValueError(_CACHE_AND_CONTEXT)
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if processes != degree:
        raise ValueError(
            f"context parallelism over {degree} devices: {processes} process{'' if processes == 1 else 'es'} here; "
            f"start it with torchrun --nproc_per_node {degree} and initialise torch.distributed"
        )
    for transformer in pipeline.transformers:
        config = ContextParallelConfig(ulysses_degree=degree)
        transformer.enable_parallelism(config=config)
        split = TokenSplit(config._flattened_mesh.get_group())
        if expert_names(transformer):
            state_of(transformer).split = split
        denoiser = denoiser_of(transformer)
        if denoiser.attention is not None:  # diffusers spreads its own only
            denoiser.set_attention(_Spread(denoiser.attention, split.group))
    pipeline.context_parallel_degree = degree


class _OfHeads(nn.Module):
    """A branch `by_head` of this process's part of the heads."""

    def __init__(self, branch: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._whole = (branch,)  # no submodule: its parameters are not this one's
        self._own = {name: x.chunk(group.size())[group.rank()] for name, x in branch.named_parameters()}

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Tensor = functional_call(self._whole[0], self._own, inputs)
        return output


class _Spread:
    """An attention of tokens split over processes: each process computes all tokens of its part of the heads."""

    def __init__(self, attention: Attention, group: dist.ProcessGroup) -> None:
        self.attention, self.group = attention, group

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, where: Where, branch: nn.Module | None) -> Tensor:
        """See Attention; B x N/P x heads x width in and out, without gradient."""
        query, key, value = (self._exchange(x, cut=2, join=1) for x in (query, key, value))
        part = None if branch is None else _OfHeads(branch, self.group)
        return self._exchange(self.attention(query, key, value, where, part), cut=1, join=2)

    def _exchange(self, x: Tensor, cut: int, join: int) -> Tensor:
        """Send part i along axis `cut` to process i, and join what comes along axis `join`."""
        parts = torch.stack(x.chunk(self.group.size(), cut))
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self.group)
        return torch.cat(received.unbind(), join)


def _caches_something(transformer: Any) -> bool:
    registries = (getattr(module, "_diffusers_hook", None) for module in transformer.modules())
    return any(hook._is_stateful for r in registries if r is not None for hook in r.hooks.values())
