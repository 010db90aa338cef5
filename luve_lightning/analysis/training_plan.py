"""What a training step takes on each GPU: of a denoiser by flow matching, and of a VLUer.

A training step is counted as it runs: forward and backward, under autocast, with what it recomputes. Its peak is the
weights, the optimiser's state (two numbers in float32 for each trained one) and what the passes allocate, gradients
included. At 2K and 49 frames with `recompute: all_but_attention` that is 77.7 GiB for the adaptation of Wan2.1-1.3B and
54.5 GiB for the LFE, as measured on one GPU (docs/performance.md). Of compiled blocks nothing is in memory that a
kernel computes from the rest; their peaks are at most a tenth above the measured ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from luve_lightning.analysis.cost import GpuSpeed
from luve_lightning.analysis.dry_run import CUBLAS_WORKSPACE, DryRun, Operation, dry_training, weight_bytes
from luve_lightning.data.latent_store import LatentRecipe
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.noise_bands import noised, velocity
from luve_lightning.losses import Loss
from luve_lightning.models.backbones import Denoiser, LatentSpace
from luve_lightning.models.vluer import BaseVLUer
from luve_lightning.safetensors_window import DTYPE_NAMES

# How often the weights' bytes are moved: by AdamW over lists of tensors, each operation a kernel, and by clipping.
_ADAMW_PASSES, _CLIPPING_PASSES = 20, 3


# What CUDA's autocast runs in 16 bits and in float32, of what transformers call.
_LOWER = frozenset((F.linear, torch.matmul, torch.bmm, torch.Tensor.matmul, F.conv2d, F.conv3d))
_HIGHER = frozenset((F.layer_norm, torch.layer_norm, F.softmax, torch.softmax))


Strategy = Literal["one device", "ddp", "fsdp2"]


@dataclass(frozen=True)
class Sharing:
    """How GPUs share a training; each has batches of its own.

    Attributes:
        strategy: "ddp": each holds everything, and the buckets in which gradients are summed beside them; "fsdp2":
            weights, gradients and the optimiser's state are sharded, and gathered block by block.
        devices: GPUs, over all machines.
    """

    strategy: Strategy = "one device"
    devices: int = 1

    @property
    def shards(self) -> int:
        """GPUs among which weights are divided."""
        return self.devices if self.strategy == "fsdp2" else 1


@dataclass(frozen=True)
class Held:
    """What stays on a GPU from step to step, in bytes.

    Attributes:
        weights: all weights, of which "fsdp2" holds a part.
        gradients: those of the trained weights, while they are there.
        optimizer: AdamW's state, two numbers in float32 for each trained one.
        shared: DDP's buckets, or what FSDP2 gathers and sums at once: two blocks' weights and gradients.
    """

    weights: int
    gradients: int
    optimizer: int
    shared: int

    @classmethod
    def of(cls, modules: Iterable[nn.Module], sharing: Sharing, blocks: Sequence[nn.Module] = ()) -> Held:
        """Of modules, some of whose parameters are trained; `blocks` are what FSDP2 shards one by one."""
        modules = list(modules)
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        gradients = sum(p.numel() * p.element_size() for p in trained)
        shared = gradients if sharing.strategy == "ddp" and sharing.devices > 1 else 0
        if sharing.shards > 1:
            inside = [weight_bytes(block) for block in blocks]
            root = sum(map(weight_bytes, modules)) - sum(inside)
            shared = 4 * max(inside, default=0) + root  # the root's are gathered all the time
        shards = sharing.shards
        weights, optimizer = sum(map(weight_bytes, modules)), sum(2 * 4 * p.numel() for p in trained)
        return cls(weights // shards, gradients // shards, optimizer // shards, shared)

    def peak(self, passes: int) -> int:
        """The most of a step whose passes allocate so much, gradients included."""
        # AdamW's own step holds all gradients and one more tensor as large.
        during = max(passes + CUBLAS_WORKSPACE, 2 * self.gradients)
        return self.weights + self.optimizer + self.shared + during


@dataclass(frozen=True)
class TrainingStep:
    """What one training step takes on each GPU. Memory is in bytes.

    Attributes:
        name: the bucket.
        latents: frames, height and width of a sample.
        tokens: tokens of a sample; 0 for a model without.
        batch: samples.
        flops: floating-point operations of the forward and the backward pass.
        weights: the weights on this GPU.
        optimizer: AdamW's state.
        shared: see Held.
        passes: what the passes allocate at their peak, gradients included.
        peak: the most of the whole step.
        terms: what makes up `passes`, the largest first.
        seconds: estimated duration; None without a GPU's speed, or where it lacks the rate of an operation. A step
            ends no earlier than the DataLoader brings the next batch, where that rate is known.
        loaded: bytes of a batch.
    """

    name: str
    latents: Size3d
    tokens: int
    batch: int
    flops: int
    weights: int
    optimizer: int
    shared: int
    passes: int
    peak: int
    terms: Mapping[str, int]
    seconds: float | None
    loaded: int = 0

    @classmethod
    def planned(
        cls,
        name: str,
        latents: Size3d,
        tokens: int,
        batch: int,
        run: DryRun,
        held: Held,
        speed: GpuSpeed | None,
        operations: Mapping[Operation, int],
        loaded: int,
    ) -> TrainingStep:
        """From the counts of the passes, what is held and, for the time, the operations beside them and the batch."""
        seconds = None if speed is None else speed.training(run.operations, operations)
        if speed is not None and seconds is not None:
            seconds = max(seconds, speed.loaded(loaded))  # the next batch comes while this one is computed
        peak = held.peak(run.peak)
        return cls(
            name,
            latents,
            tokens,
            batch,
            run.flops,
            held.weights,
            held.optimizer,
            held.shared,
            run.peak,
            peak,
            run.terms,
            seconds,
            loaded,
        )


def optimizer_step(parameters: Sequence[nn.Parameter], clips: bool, shards: int = 1) -> Counter[Operation]:
    """The operations of clipping gradients and of AdamW's step, all of them traffic."""
    size = sum(p.numel() * p.element_size() for p in parameters) // shards
    return Counter({Operation("rest", 0, size * (_ADAMW_PASSES + _CLIPPING_PASSES * clips), torch.float32): 1})


def run_backward(loss: Tensor) -> None:
    """The backward pass of a scalar under the function modes in force, which `loss.backward()` would leave."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


@contextmanager
def sharded_gradients(parameters: Iterable[nn.Parameter], shards: int) -> Iterator[None]:
    """While entered, a gradient on the meta device leaves its shard alone behind; on exit all are gone."""
    kept: list[Tensor] = []

    def keep_shard(parameter: Tensor) -> None:
        assert parameter.grad is not None
        kept.append(parameter.grad.new_empty(-(-parameter.numel() // shards)))
        parameter.grad = None

    parameters = list(parameters)
    hooks = [p.register_post_accumulate_grad_hook(keep_shard) for p in parameters] if shards > 1 else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            parameter.grad = None


class TrainingFunctions(TorchFunctionMode):
    """What a GPU runs in training: one kernel for attention and for an RMS norm, and autocast's casts.

    Attributes:
        casts: 16-bit copies of trained weights, which autocast keeps until the forward pass ends; None afterwards.
    """

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.autocast = autocast
        self.casts: dict[int, Tensor] | None = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = [*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)][:3]
            query, key, value = (self._cast(x, self.autocast or x.dtype) for x in given)
            # The operator itself, which tells selective recomputation what it is.
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        if func in (F.rms_norm, torch.rms_norm):
            weight = args[2] if len(args) > 2 else kwargs.get("weight")
            if weight is None or weight.dtype == args[0].dtype:
                return _FusedNorm.apply(args[0], weight)
        if self.autocast is not None and func in _LOWER | _HIGHER:
            dtype = self.autocast if func in _LOWER else torch.float32
            args = tuple(self._cast(x, dtype) for x in args)
            kwargs = {name: self._cast(x, dtype) for name, x in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == dtype:
            return x
        if self.casts is None or not (x.is_leaf and x.requires_grad):
            return x.to(dtype)
        if id(x) not in self.casts:
            self.casts[id(x)] = x.to(dtype)
        return self.casts[id(x)]


class _FusedNorm(torch.autograd.Function):
    """An RMS norm that keeps its input and one number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def plan_step(
    denoiser: Denoiser,
    name: str,
    latents: Size3d,
    batch: int,
    text_length: int,
    autocast: torch.dtype | None = None,
    speed: GpuSpeed | None = None,
    compiled: bool = False,
    sharing: Sharing = Sharing(),  # frozen
    clips: bool = False,
) -> TrainingStep:
    """Plan a step of flow matching on one bucket.

    Args:
        denoiser: on the meta device, with what is trained and what is recomputed set.
        name: the bucket, for people.
        latents: frames, height and width of a sample.
        batch: samples.
        text_length: tokens of a caption.
        autocast: dtype of the Trainer's mixed precision; None where there is none.
        speed: speed of the GPU, for the duration.
        compiled: whether blocks are compiled.
        sharing: how GPUs share the training.
        clips: whether gradients are clipped.
    """
    tokens = prod(denoiser.token_grid(latents))
    trained = [parameter for parameter in denoiser.module.parameters() if parameter.requires_grad]
    functions = TrainingFunctions(autocast)
    blocks = [block for _, block in denoiser.blocks] if compiled else []
    clean, noise = (torch.empty(batch, denoiser.channels, *latents, device="meta") for _ in range(2))
    text = torch.empty(batch, text_length, denoiser.text_dim, device="meta", dtype=denoiser.dtype)
    sigma = torch.empty(batch, device="meta")
    with sharded_gradients(trained, sharing.shards), dry_training(functions, blocks) as run:
        mixed = noised(clean, noise, sigma).to(denoiser.dtype)
        beside = clean.to(denoiser.dtype) if denoiser.conditioned else None
        loss = (
            (denoiser.velocity(mixed, sigma, text, condition=beside).float() - velocity(clean, noise)).square().mean()
        )
        functions.casts = None
        run.compiled_backward = compiled
        run_backward(loss)
        del loss, mixed
    held = Held.of([denoiser.module], sharing, [block for _, block in denoiser.blocks])
    stepping = optimizer_step(trained, clips, sharing.shards)
    loaded = clean.nbytes + text.nbytes
    return TrainingStep.planned(name, latents, tokens, batch, run, held, speed, stepping, loaded)


def plan_vluer_step(
    net: BaseVLUer,
    codec: LatentSpace,
    losses: Mapping[str, Loss],
    name: str,
    low: Size3d,
    high: Size3d,
    batch: int,
    decoded: Size3d | None = None,
    given: bool = False,
    autocast: torch.dtype | None = None,
    speed: GpuSpeed | None = None,
    sharing: Sharing = Sharing(),  # frozen
    clips: bool = False,
    taught: tuple[BaseVLUer, Mapping[str, Loss]] | None = None,
) -> TrainingStep:
    """Plan a step of the VLUer on crops of one scale.

    Args:
        net: on the meta device, trained.
        codec: on the meta device, in the dtype in which it decodes; frozen.
        losses: by name, as VLUerTask has them.
        name: the crops, for people.
        low: latent frames, height and width of the low resolution.
        high: those of the high resolution.
        batch: samples.
        decoded: latents whose pixels the losses in pixel space compare; None is phase 1.
        given: whether the target's pixels come with the data, and are not decoded.
        autocast: dtype of the Trainer's mixed precision; None where there is none.
        speed: speed of the GPU, for the duration.
        sharing: how GPUs share the training.
        clips: whether gradients are clipped.
        taught: a teacher on the meta device, frozen, and the losses against its output; features are not counted.
    """
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    functions = TrainingFunctions(autocast)
    sample, target = (torch.empty(batch, codec.channels, *size, device="meta") for size in (low, high))
    loaded = (sample.numel() + target.numel()) * DTYPE_NAMES[LatentRecipe.dtype].itemsize
    with sharded_gradients(trained, sharing.shards), dry_training(functions) as run:
        output = None
        if taught is not None:
            with torch.no_grad():
                output = taught[0](sample, high)
        prediction = net(sample, high)
        terms = [loss.weight * loss(prediction, output) for loss in (taught[1].values() if taught else ())]
        terms += [loss.weight * loss(prediction, target) for loss in losses.values() if loss.space == "latent"]
        if decoded is not None:
            t, y, x = (slice(min(n, whole)) for n, whole in zip(decoded, high, strict=True))
            if given:
                size = codec.pixel_size(*(part.stop for part in (t, y, x)))
                wanted = torch.empty(batch, 3, *size, device="meta")
                loaded += wanted.nbytes
            else:
                with torch.no_grad():
                    wanted = codec.decode_differentiable(target[:, :, t, y, x])
            pixels = codec.decode_differentiable(prediction[:, :, t, y, x])
            terms += [loss.weight * loss(pixels, wanted) for loss in losses.values() if loss.space == "pixel"]
            del pixels, wanted
        loss = torch.stack(terms).sum()
        functions.casts = None
        del prediction, terms, output
        run_backward(loss)
        del loss
    held = Held.of([net, codec, *(taught[:1] if taught else ())], sharing)
    stepping = optimizer_step(trained, clips, sharing.shards)
    return TrainingStep.planned(name, high, 0, batch, run, held, speed, stepping, loaded)
