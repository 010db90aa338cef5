"""Estimates of time: an operation takes as long as its arithmetic, its memory traffic or its launch, the longest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from luve_lightning.evaluation.dry_run import Kind, Operation

_TERA = 1e12
_LAUNCH = 5e-6  # seconds from one kernel's start to the next one's, at least


@dataclass(frozen=True)
class GpuSpeed:
    """What one GPU reaches, not its data sheet's peaks.

    Attributes:
        name: as in `GPUS`.
        memory_gib: of the card.
        tflops: TFLOP/s in 16-bit by kind of operation.
        bandwidth: TB/s of memory.
        float32: the share of `tflops` that is left in float32 (no TF32 but in convolutions, PyTorch's default).
    """

    name: str
    memory_gib: float
    tflops: Mapping[Kind, float]
    bandwidth: float
    float32: Mapping[Kind, float]

    def seconds(self, operations: Mapping[Operation, int]) -> float:
        """Time of operations, run one after another."""
        return sum(self._one(operation) * count for operation, count in operations.items())

    def _one(self, operation: Operation) -> float:
        traffic = max(_LAUNCH, operation.bytes / (self.bandwidth * _TERA))
        if not operation.flops:
            return traffic
        rate = self.tflops[operation.kind]
        if operation.dtype == torch.float32:
            rate *= self.float32[operation.kind]
        return max(traffic, operation.flops / (rate * _TERA))


# H200, measured: attention 580 TFLOP/s (cuDNN); the others fitted to one forward of Wan2.1-1.3B (1.1 s at 720p,
# 12.6 s at 2K, 61 s at 4K), the VLUer (18.5 ms to 2K) and the VAE in training (339 ms a step), all bfloat16.
_H200 = GpuSpeed(
    "h200",
    memory_gib=139.0,
    tflops={
        "attention": 580,
        "wide attention": 100,
        "matmul": 600,
        "convolution": 400,
        "converted convolution": 230,
    },
    bandwidth=4.0,
    float32={
        "attention": 0.06,
        "wide attention": 0.3,
        "matmul": 0.08,
        "convolution": 0.4,
        "converted convolution": 0.4,
    },
)


def _scaled(name: str, memory_gib: float, arithmetic: float, bandwidth: float) -> GpuSpeed:
    """A GPU that was not measured: the H200's figures by the ratio of the data sheets."""
    tflops = {kind: rate * arithmetic / 989 for kind, rate in _H200.tflops.items()}
    return replace(
        _H200, name=name, memory_gib=memory_gib, tflops=tflops, bandwidth=_H200.bandwidth * bandwidth / 4.8
    )


# Dense bfloat16 TFLOP/s and TB/s of the data sheets.
GPUS: dict[str, GpuSpeed] = {
    gpu.name: gpu
    for gpu in (
        _H200,
        _scaled("h100", 79.0, 989, 3.35),
        _scaled("a100", 79.0, 312, 2.04),
        _scaled("l40s", 44.0, 362, 0.864),
        _scaled("4090", 23.5, 165, 1.008),
        _scaled("5090", 31.5, 210, 1.792),
    )
}


def known_gpu(name: str) -> GpuSpeed | None:
    """The entry for a name such as "h200" or PyTorch's "NVIDIA H200"; None when there is none."""
    words = name.lower().replace("-", " ").split()
    return next((gpu for key, gpu in GPUS.items() if key in words), None)


def gpu_speed(gpu: str | None, tflops: float | None) -> GpuSpeed | None:
    """The speed to estimate with.

    Args:
        gpu: a name in `GPUS`; None takes the GPU that PyTorch sees here, if it is a known one.
        tflops: what attention and matrix products reach, in place of the table's.

    Returns:
        None when neither says anything.

    Raises:
        ValueError: for an unknown GPU, or a rate that is not positive.
    """
    found = None
    if gpu is not None:
        found = known_gpu(gpu)
        if found is None:
            raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {gpu!r}")
    elif torch.cuda.is_available():
        found = known_gpu(torch.cuda.get_device_name())
    if tflops is None:
        return found
    if not tflops > 0:
        raise ValueError(f"gpu_tflops: expected more than 0, got {tflops}")
    base = found or _H200
    ratio = tflops / base.tflops["attention"]
    rates = {kind: rate * ratio for kind, rate in base.tflops.items()}
    if found is None:  # an unknown card: its memory is taken to keep up as the H200's does
        return replace(base, name=f"{tflops:g} TFLOP/s", tflops=rates, bandwidth=base.bandwidth * ratio)
    return replace(base, tflops=rates)
