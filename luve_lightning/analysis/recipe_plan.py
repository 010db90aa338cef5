"""What a stage of the recipe takes, whatever it makes: seconds and bytes of a unit, hours and terabytes of all.

Encoding runs the models' own code without values (`dry_run`). Reading and decoding clips, on the processor and beside
the GPU's work, does not count, nor does writing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from luve_lightning.analysis.cost import FirstUse, GpuSpeed, total
from luve_lightning.analysis.dry_run import CUBLAS_WORKSPACE, dry_run, weight_bytes
from luve_lightning.analysis.model_parts import PartConfigs, Parts, encode_prompt
from luve_lightning.cascade.options import CascadeOptions
from luve_lightning.cascade.pipeline_files import expert_folders
from luve_lightning.config_files import ToExport, exporting
from luve_lightning.data.latent_store import HIGH_RESOLUTION, LatentRecipe
from luve_lightning.data.variants import PixelTransform
from luve_lightning.data.video_index import ClipEntry, Limits, Split, VideoIndex
from luve_lightning.functional.pixels import resize_frames, resize_video
from luve_lightning.models.attention import Attention
from luve_lightning.models.backbones import LatentSpace, denoiser_of
from luve_lightning.models.experts import ExpertConfig, add_expert, load_expert
from luve_lightning.models.vluer import BaseVLUer

Kind = Literal["training", "precompute", "embed", "score", "upsample"]
Unit = Literal["step", "clip", "text", "video"]

_SOURCE = 1.5  # a decoded clip's side to the largest that is encoded: 4K for 2K


@dataclass(frozen=True)
class RecipePlan:
    """A stage of the recipe as it is configured.

    Attributes:
        kind: what it is.
        unit: what is counted: optimiser steps, windows of clips, captions, or clips that are upsampled.
        seconds: those of a unit on one process; None where they are not known.
        first_use: seconds that a process takes longer once; None where they are not known.
        peak: bytes on each GPU; None where they are not known.
        units: how many there are; None where the data are not there.
        processes: GPUs, over all machines.
        strategy: how they share a training; see Sharing.
        stored: bytes of a unit on disk; None where they are not known.
        rows: one of what takes part, such as each bucket or size, in plain types.
        notes: what is assumed, and what is left out.
    """

    kind: Kind
    unit: Unit
    seconds: float | None
    first_use: float | None
    peak: int | None
    units: int | None
    processes: int = 1
    strategy: str = "one device"
    stored: int | None = None
    rows: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def hours(self) -> float | None:
        """Hours of all units, and of each process's first use."""
        if self.seconds is None or self.units is None:
            return None
        at_once = 1 if self.kind == "training" else self.processes  # processes share a step, and divide the clips
        return (self.seconds * self.units / at_once + (self.first_use or 0.0)) / 3600

    @property
    def gpu_hours(self) -> float | None:
        """Hours times GPUs."""
        return None if self.hours is None else self.hours * self.processes

    @property
    def terabytes(self) -> float | None:
        """What all units take on disk, in 1e12 bytes."""
        return None if self.stored is None or self.units is None else self.stored * self.units / 1e12


def encoded_size(
    codec: LatentSpace, bucket: LatentRecipe, scale: float, dtype: torch.dtype, speed: GpuSpeed | None
) -> dict[str, Any]:
    """A row of one stored size: encoding a window of a clip at it.

    Args:
        codec: on the meta device, in the dtype in which it encodes.
        bucket: the recipe, with its bucket's size and frames.
        scale: how many times smaller the size is.
        dtype: dtype on disk.
        speed: for the time.
    """
    height, width = bucket.pixel_size(scale)
    latents = codec.latent_size(bucket.frames, height, width)
    with dry_run() as run:
        codec.encode(torch.empty(1, 3, bucket.frames, height, width, device="meta"))
    return {
        "pixels": [bucket.frames, height, width],
        "latents": list(latents),
        "flops": run.flops,
        "seconds": None if speed is None else speed.seconds(run.operations),
        "stored": codec.channels * prod(latents) * dtype.itemsize,
    }


def plan_windows_encoded(
    parts: Parts,
    buckets: Sequence[LatentRecipe],
    transforms: Sequence[PixelTransform],
    batch_size: int,
    dtype: torch.dtype,
    speed: GpuSpeed | None,
    windows: Sequence[int] | None,
    processes: int,
    kept: int = 0,
) -> RecipePlan:
    """`luve precompute`: windows encoded at every size, in every variant.

    Args:
        parts: whose VAE encodes, in the dtype of autocast where there is one.
        buckets: the recipe with each bucket's size and frames.
        transforms: the variants' own.
        batch_size: windows encoded at once.
        dtype: dtype on disk.
        speed: for the time.
        windows: how many there are of each bucket; None where the index is not there: as many of each.
        processes: GPUs.
        kept: bytes of weights beside those that encode: the VAE's own under autocast.
    """
    check_counts(batch_size=batch_size)
    codec, rows = parts.codec, []
    for bucket in buckets:
        sizes = [encoded_size(codec, bucket, scale, dtype, speed) for scale in (HIGH_RESOLUTION, *bucket.scales)]
        with dry_run() as run:
            _encode(codec, bucket, transforms, batch_size)
        seconds = None if speed is None else speed.seconds(run.operations)
        rows.append(
            {
                "bucket": f"{bucket.size[0]}x{bucket.size[1]}x{bucket.frames}",
                "seconds": None if seconds is None else seconds / batch_size,
                "peak": run.peak + weight_bytes(codec) + kept + CUBLAS_WORKSPACE,
                "stored": len(transforms) * sum(size["stored"] for size in sizes),
                "sizes": sizes,
            }
        )
    share = _shares(windows, len(rows))
    largest = codec.latent_size(buckets[0].frames, *buckets[0].size)
    streams = codec.streams(torch.empty(1, codec.channels, *largest, device="meta"))  # decoding, as encoding
    uses: list[FirstUse] = ["kernels"] if streams else []
    notes = ["decoding clips, on the processor beside the GPU, and writing are left out"]
    if len(rows) > 1 and windows is None:
        notes.append("a clip's seconds and bytes are the mean over the buckets")
    return RecipePlan(
        kind="precompute",
        unit="clip",
        seconds=mean((row["seconds"] for row in rows), share),
        first_use=first_use(speed, uses),
        peak=max(row["peak"] for row in rows),
        units=None if windows is None else sum(windows),
        processes=processes,
        stored=round(mean((row["stored"] for row in rows), share) or 0),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _encode(codec: LatentSpace, bucket: LatentRecipe, transforms: Sequence[PixelTransform], batch_size: int) -> None:
    """What `EncodeTask` does with a batch."""
    height, width = (round(side * _SOURCE) for side in bucket.size)
    frames = [torch.empty(bucket.frames, height, width, 3, dtype=torch.uint8, device="meta") for _ in range(batch_size)]
    videos = torch.stack([resize_frames(clip, bucket.size) for clip in frames])
    del frames
    for transform in transforms:
        changed = transform(videos)
        for scale in (HIGH_RESOLUTION, *bucket.scales):
            codec.encode(resize_video(changed, bucket.pixel_size(scale))).float()


def plan_captions_embedded(
    configs: PartConfigs,
    length: int | None,
    batch_size: int,
    dtype: Literal["float32", "bfloat16"],
    speed: GpuSpeed | None,
    captions: int | None,
) -> RecipePlan:
    """`luve embed`: captions through the text encoder, each padded to one length.

    Args:
        configs: of the backbone.
        length: tokens that a caption is padded to; None is the backbone's own.
        batch_size: captions at once.
        dtype: of the encoder's weights and on disk.
        speed: for the time.
        captions: how many there are; None where the index is not there.
    """
    check_counts(length=length, batch_size=batch_size)
    parts, tokens = Parts(configs, getattr(torch, dtype)), length or configs.text_length
    encoder = parts.text_encoder
    with dry_run() as run:
        encode_prompt(parts, tokens, batch_size)
    width = configs.text_encoder.get("d_model", 0)
    seconds = None if speed is None else speed.seconds(run.operations)
    return RecipePlan(
        kind="embed",
        unit="text",
        seconds=None if seconds is None else seconds / batch_size,
        first_use=0.0,
        peak=run.peak + weight_bytes(encoder) + CUBLAS_WORKSPACE,
        units=captions,
        stored=tokens * width * parts.dtype.itemsize,
        notes=(
            f"stored: the most, of {tokens} tokens; a caption's own tokens alone are stored",
            "loading the text encoder is left out, and writing, which goes on beside the GPU's work",
        ),
    )


def plan_clips_upsampled(
    parts: Parts,
    recipe: LatentRecipe,
    methods: Mapping[str, Callable[[Tensor, tuple[int, int, int]], Tensor]],
    modules: Sequence[torch.nn.Module],
    speed: GpuSpeed | None,
    clips: int | None,
    notes: Sequence[str] = (),
) -> RecipePlan:
    """`luve upsample`: each clip encoded twice, upsampled by each method and decoded.

    Args:
        parts: whose VAE encodes and decodes.
        recipe: size, frames and the one scale.
        methods: functions from latents to latents, by name.
        modules: VLUers among them, on the GPU all the time.
        speed: for the time.
        clips: how many there are; None where the index is not there.
        notes: what is assumed of them.
    """
    codec, size = parts.codec, recipe.size

    grid = codec.latent_size(recipe.frames, *size)
    with dry_run() as counted:
        video = torch.empty(1, 3, recipe.frames, *size, device="meta")
        made = {"vae": codec.encode(video)}
        video = resize_video(video, recipe.pixel_size(recipe.scales[0]))
        low = codec.encode(video)
        del video  # as in ClipUpsampler: decoding takes the most
        made |= {name: method(low, grid).float() for name, method in methods.items()}
        for latents in made.values():
            codec.decode(latents)
    uses: list[FirstUse] = ["kernels"] if codec.streams(made["vae"]) else []
    held = sum(weight_bytes(module) for module in (codec, *modules))
    return RecipePlan(
        kind="upsample",
        unit="video",
        seconds=None if speed is None else speed.seconds(counted.operations),
        first_use=first_use(speed, uses),
        peak=counted.peak + held + CUBLAS_WORKSPACE,
        units=clips,
        notes=(
            f"a unit is a clip, of which {len(methods) + 2} videos are written",
            "left out: reading clips and writing lossless videos, beside the GPU's work; the first clip waits for it",
            "where processor or disk take longer than the GPU, they set the pace: luve upsample --measured tells",
            *notes,
        ),
    )


def plan_scores(scorer: str, frames: int, clips: int | None) -> RecipePlan:
    """`luve score`: how much there is to score; what a scorer takes is its own."""
    check_counts(frames=frames)
    each = f"{frames} frame{'' if frames == 1 else 's'} of each clip"
    count = "" if clips is None else f", {frames * clips:,} in all"
    return RecipePlan(
        kind="score", unit="clip", seconds=None, first_use=None, peak=None, units=clips,
        notes=(f"{scorer} scores {each}{count}; its seconds and memory are unknown before it runs",),
    )  # fmt: skip


def cascade_parts(
    backbone: str,
    options: CascadeOptions,
    dtypes: tuple[torch.dtype, torch.dtype],
    models: Mapping[str, str | Path | None],
    experts: Mapping[str, Path | None] | Path | None,
    attention: Attention | None,
) -> tuple[Parts, list[str]]:
    """The models of a cascade, on the meta device, and which of them training has yet to make.

    Args:
        backbone: folder or hub id.
        options: their shift and sampler count.
        dtypes: of the transformers and the text encoder, and of the VAE and the VLUer.
        models: "vluer", "refiner" and "transformer", as PartConfigs reads them.
        experts: folder of each by name, or one of all.
        attention: replaces self-attention in the third stage's transformer; None is its own.
    """
    given, notes = dict(models), []
    found = {name: exporting(Path(path)) for name, path in models.items() if path and not Path(path).exists()}
    for name, training in found.items():
        if training is not None:
            notes.append(f"{name} {models[name]} is not there yet: planned as {training.file} will export it")
            given[name] = None if name == "vluer" else backbone
    configs = PartConfigs.from_pretrained(
        backbone, given.get("vluer"), given.get("refiner"), options.shift, options.sampler, given.get("transformer")
    )
    if training := found.get("vluer"):
        configs = replace(configs, vluer=_vluer_of(training))
    parts = Parts(configs, dtypes[0], vae_dtype=dtypes[1])
    for name, own in (("transformer", parts.transformer), ("refiner", parts.refiner)):
        if training := found.get(name):
            denoiser_of(own).use_attention(training.argument("attention", Attention | None))
    if attention is not None:
        denoiser_of(parts.refiner).use_attention(attention)
    folders: Any = {k: v for k, v in experts.items() if v is not None} if isinstance(experts, Mapping) else experts
    for expert, folder in expert_folders(folders).items():
        training = None if folder.exists() else exporting(folder)
        if training is None:
            load_expert(parts.refiner, folder, expert, any_attention=attention is not None)
        else:
            notes.append(f"experts.{expert} {folder} is not there yet: planned as {training.file} will export it")
            add_expert(parts.refiner, str(expert), training.argument("expert", ExpertConfig), dtype=dtypes[0])
    return parts, notes


def planned_vluer(backbone: str, folder: Path) -> tuple[BaseVLUer, str]:
    """A VLUer in float32 on the meta device, and a note where training has yet to make it."""
    training = None if folder.exists() else exporting(folder)
    configs = PartConfigs.from_pretrained(backbone, None if training else folder)
    if training is None:
        return Parts(configs, torch.float32).vluer, ""
    note = f"{folder} is not there yet: planned as {training.file} will export it"
    return Parts(replace(configs, vluer=_vluer_of(training)), torch.float32).vluer, note


def _vluer_of(training: ToExport) -> dict[str, Any]:
    """The configuration of the VLUer that a training makes."""
    chosen = training.model["init_args"]["net"]
    named = {"_class_name": str(chosen["class_path"]).rpartition(".")[2]}
    return dict(chosen.get("init_args") or {}) | named


def clips_there(
    index: Path | None, clips: Path | None, keep: Limits, splits: Sequence[Split] | None, limit: int | None = None
) -> list[ClipEntry] | None:
    """The clips of an index, at most `limit` of each split; None where it, or its folder of clips, is not there."""
    check_counts(limit=limit)
    if index is None or not index.is_file():
        return None
    if index.suffix == ".csv" and not (clips or index.parent / "clips").is_dir():
        return None
    found = VideoIndex.open(index, clips, keep)
    if splits is None:
        return found.entries[:limit]
    return [entry for split in splits for entry in found.split(split)[:limit]]


def check_counts(**counts: int | None) -> None:
    """Refuse numbers below 1 by the option's name; None is an option that was left out."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")


def first_use(speed: GpuSpeed | None, uses: Sequence[FirstUse]) -> float | None:
    """Seconds of first uses; None where they are not known."""
    if not uses:
        return 0.0
    return None if speed is None else speed.first_uses(uses)


def mean(values: Any, weights: Sequence[float]) -> float | None:
    """The weighted mean; None where one value is not known."""
    return total(None if value is None else value * weight for value, weight in zip(values, weights, strict=True))


def _shares(counts: Sequence[int] | None, number: int) -> list[float]:
    """Each one's part of the whole; equal ones where nothing is known."""
    if counts is None or not sum(counts):
        return [1 / number] * number
    return [count / sum(counts) for count in counts]
