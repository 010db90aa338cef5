"""`luve bench --subject vluer-train`: our VLUer and the released one, a step's time and what the same samples teach."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luve_lightning.analysis.benchmarks.vluer import require_gpu, time_on_gpu
from luve_lightning.config_files import read_config
from luve_lightning.data.video_index import Limits
from luve_lightning.datamodules import LatentPairsDataModule
from luve_lightning.datamodules.latent_crops import CropRule, LatentPairCrops
from luve_lightning.datamodules.sampling import SampleKey
from luve_lightning.functional.fidelity import psnr
from luve_lightning.functional.interpolation import Size3d, interpolate_latents
from luve_lightning.losses import FrameDifferenceL1, LatentL1, PixelL1
from luve_lightning.models.backbones import family_named
from luve_lightning.models.vluer import BaseVLUer, ReleasedVLUer, VLUer
from luve_lightning.tasks.vluer import VLUerTask

Upsampler = Callable[[Tensor, Size3d], Tensor]
# What a CPU trains: the same forms, narrow.
_NARROW = {"channels": 16, "pairs": 1, "hidden": 16, "layers": 1, "query_channels": 16, "decoder_layers": 1}
_NARROW_RELEASED: dict[str, Any] = {
    "heads": 2, "channels": 12, "deep_channels": 12, "mutual_blocks": 1, "self_blocks": 1, "deep_groups": 1,
    "deep_blocks": 1, "frame_groups": 1, "hidden": (16, 16), "decoder_channels": 12, "decoder_deep_channels": 12,
    "decoder_groups": 1,
}  # fmt: skip


def measure(
    device: torch.device,
    repeats: int = 20,
    batch_size: int = 2,
    crop: int = 128,
    frames: int = 11,
    experiment: Path | None = None,
    steps: int = 500,
) -> Iterator[dict[str, Any]]:
    """Time one optimiser step of either network on the same pairs; with `experiment`, also compare what they learn.

    Args:
        device: where. A CPU times nothing, and trains narrow networks.
        repeats: timed steps after three to warm up; the median counts.
        batch_size: batch size of the timed step.
        crop: high-resolution latent height and width, twice the low resolution's; 128 is the released recipe's at 2x,
            and the least that the released network takes. It has no row for smaller crops and no multiples of 16.
        frames: latent frames.
        experiment: configuration of a training of the VLUer, such as experiments/vluer/wan2.1.yaml. Both networks
            train from scratch on its latents: the same crops in the same order, with its optimiser and batch size,
            latent L1 alone. Then crops of its held-out clips are upsampled, beside bilinear interpolation and the
            ceiling, the high-resolution latents themselves.
        steps: their optimiser steps.

    Yields:
        One row for each network's steps, in phase 1 and phase 2, with a random Wan2.1 VAE. Then, for each scale and
        method, mean latent L1 and PSNR of the decoded crops against the clips' own pixels, and seconds of training.

    Raises:
        ValueError: a CPU without `experiment`; `steps` below 1.
    """
    if experiment is None:
        require_gpu(device)
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    torch.manual_seed(0)
    if device.type == "cuda":
        low = torch.randn(batch_size, 16, frames, crop // 2, crop // 2, device=device)
        high = torch.randn(batch_size, 16, frames, crop, crop, device=device)
        yield from time_steps(VLUer(), low, high, repeats)
        if crop >= 128 and crop % 16 == 0:
            yield from time_steps(ReleasedVLUer(), low, high, repeats)
        del low, high
    if experiment is not None:
        yield from compare_learning(experiment, steps, device)


def time_steps(net: BaseVLUer, low: Tensor, high: Tensor, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of one network's steps, in bfloat16 autocast."""
    device, size = low.device, (high.shape[2], high.shape[3], high.shape[4])
    with tempfile.TemporaryDirectory() as folder:
        family = family_named("wan")
        family.save_vae(family.build_vae({}), Path(folder), torch.bfloat16)
        task = VLUerTask(
            net=net,
            backbone=folder,
            losses={"latent": LatentL1(), "pixel": PixelL1(), "frame": FrameDifferenceL1()},
            codec_dtype="bfloat16",
        ).to(device)
    optimizer = torch.optim.AdamW(task.net.parameters(), lr=2e-4)

    def step(phase: int) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            prediction = task(low, size)
            loss = task.losses["latent"](prediction, high)
            if phase == 2:
                pixels = task.decoded_crops(prediction, {"hr": high}, step=0)
                loss = loss + task.losses["pixel"](*pixels) + task.losses["frame"](*pixels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    about = {"subject": "vluer-train", "model": type(net).__name__, "parameters": task.net.num_parameters()}
    about |= {"batch_size": len(low), "crop": list(size), "pixel_crop": list(task.pixel_crop)}
    for phase in (1, 2):
        yield about | {"phase": phase} | time_on_gpu(partial(step, phase), device, repeats)


def compare_learning(experiment: Path, steps: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of `measure` for what the networks learn from the same samples."""
    config = read_config(experiment, "experiment")
    data = _data_of(config, experiment)
    data.open_splits("train", "val")
    narrow = device.type == "cpu"
    makers: tuple[Callable[[], BaseVLUer], ...] = (
        partial(VLUer, **(_NARROW if narrow else {})),
        partial(ReleasedVLUer, **(_NARROW_RELEASED if narrow else {})),
    )
    for first, make in enumerate(makers):
        torch.manual_seed(0)
        task = _task_of(make(), config, device)
        about = {"subject": "vluer-train", "steps": steps, "samples": steps * data.batch_size}
        seconds = _train(task, data, steps)
        learnt = {"parameters": task.net.num_parameters(), "train_s": round(seconds, 2)}
        methods: dict[str, Upsampler] = {}
        if first == 0:
            methods["bilinear"] = interpolate_latents
        methods[type(task.net).__name__] = task
        for (scale, method), (clips, distance, fidelity) in _held_out(task, data, methods, ceiling=first == 0).items():
            scores = {"latent_l1": round(distance, 5), "psnr_rgb": round(fidelity, 3)}
            row = about | {"scale": scale, "method": method, "held_out": clips} | scores
            yield row | (learnt if method == type(task.net).__name__ else {})
        del task


def _data_of(config: Mapping[str, Any], experiment: Path) -> LatentPairsDataModule:
    """The data of a configuration of training, without pixels and without worker processes."""
    data = config.get("data", {})
    if str(data.get("class_path")).rpartition(".")[2] != LatentPairsDataModule.__name__:
        raise ValueError(
            f"experiment: {experiment}: data: expected LatentPairsDataModule, got {data.get('class_path')}"
        )
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in data["init_args"].items()
    }
    keep = Limits(**options.pop("keep", {}))
    return LatentPairsDataModule(**options | {"scales": list(options["scales"]), "video_crop": None}, keep=keep)


def _task_of(net: BaseVLUer, config: Mapping[str, Any], device: torch.device) -> VLUerTask:
    given = config.get("model", {}).get("init_args", {})
    rates = {name: given[name] for name in ("lr", "min_lr", "weight_decay", "warmup_steps", "betas") if name in given}
    return VLUerTask(
        net,
        config["data"]["init_args"]["backbone"],
        {"latent": LatentL1()},
        codec_dtype="float32" if device.type == "cpu" else "bfloat16",
        **rates,
    ).to(device)


def _precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if device.type == "cpu" else torch.autocast(device.type, torch.bfloat16)


def _train(task: VLUerTask, data: LatentPairsDataModule, steps: int) -> float:
    """Train on the first batches of the data's order; the seconds of the steps without reading."""
    optimizer = torch.optim.AdamW(task.net.parameters(), lr=task.lr, betas=task.betas, weight_decay=task.weight_decay)
    loader, seconds = data.train_dataloader(), 0.0
    sampler: Any = loader.batch_sampler
    done = 0
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        for batch in itertools.islice(loader, steps - done):
            low, high = batch["lr"].to(task.device).float(), batch["hr"].to(task.device).float()
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = task.learning_rate(done, steps)
            with _precision(task.device):
                loss = task.losses["latent"](task(low, tuple(high.shape[2:])), high)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()  # waits for the device
            seconds += time.perf_counter() - started
            done += 1
        if done == steps:
            return seconds
    raise AssertionError("unreachable")


@torch.inference_mode()
def _held_out(
    task: VLUerTask,
    data: LatentPairsDataModule,
    methods: Mapping[str, Callable[[Tensor, Size3d], Tensor]],
    ceiling: bool,
) -> dict[tuple[float, str], tuple[int, float, float]]:
    """Clips, mean latent L1 and mean PSNR_rgb by scale and method, on one crop of each held-out clip."""
    rule = CropRule(data.crop.size, data.crop.at, "first")
    pairs = data.pairs["val"][: data.val_limit]
    largest = max(rule.high(scale) for scale in data.scales)
    crops = LatentPairCrops(data.store, pairs, data.scales, rule, video_crop=largest)
    task.eval()
    found: dict[tuple[float, str], list[tuple[float, float]]] = defaultdict(list)
    for kind, index in itertools.product(range(len(data.scales)), range(len(pairs))):
        item = crops[SampleKey(index, kind, (0, 0, index))]
        low, high = item["lr"][None].to(task.device), item["hr"][None].to(task.device)
        video = item["video"][None].to(task.device)
        made = {}
        for name, method in methods.items():
            with _precision(task.device):
                made[name] = method(low, (high.shape[2], high.shape[3], high.shape[4])).float()
        for name, latents in (made | ({"vae": high} if ceiling else {})).items():
            fidelity = psnr(task.codec.decode(latents), video).item()
            found[data.scales[kind], name].append(((latents - high).abs().mean().item(), fidelity))
    return {
        key: (len(scores), sum(one for one, _ in scores) / len(scores), sum(two for _, two in scores) / len(scores))
        for key, scores in found.items()
    }
