"""The plan of a training from its configuration: of the VLUer, the adaptation and the experts."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser

from luve_lightning.analysis.cost import FirstUse, GpuSpeed
from luve_lightning.analysis.dry_run import CUBLAS_WORKSPACE, dry_run, weight_bytes
from luve_lightning.analysis.model_parts import PartConfigs, Parts
from luve_lightning.analysis.recipe_plan import RecipePlan, check_counts, clips_there, first_use, mean, planned_vluer
from luve_lightning.analysis.training_plan import Sharing, Strategy, TrainingStep, plan_step, plan_vluer_step
from luve_lightning.config_files import exporting
from luve_lightning.data.latent_store import LatentRecipe
from luve_lightning.data.video_index import ClipEntry
from luve_lightning.datamodules import CaptionLatentsDataModule, LatentPairsDataModule
from luve_lightning.datamodules.buckets import Bucket, Buckets
from luve_lightning.datamodules.latent_crops import CropRule, aligned_windows
from luve_lightning.datamodules.sampling import batch_groups
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.models.attention import Attention
from luve_lightning.models.backbones import Denoiser, LatentSpace, denoiser_of, load_backbone
from luve_lightning.models.experts import add_expert
from luve_lightning.tasks import (
    AdaptationTask,
    EnhancementTask,
    ExpertTask,
    FlashVideoTask,
    LaVieTask,
    VLUerDistillationTask,
    VLUerTask,
    WaverTask,
)

_TASKS = (VLUerTask, VLUerDistillationTask, AdaptationTask, ExpertTask, FlashVideoTask, LaVieTask, WaverTask)
# Dtype of autocast by the Trainer's precision.
_AUTOCAST = {"32-true": None, "32": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_SHARDED = "ModelParallelStrategy"


def plan_training(
    model: Mapping[str, Any], data: Mapping[str, Any], trainer: Mapping[str, Any], speed: GpuSpeed | None = None
) -> RecipePlan:
    """Plan a training.

    Args:
        model: class path and arguments of its task.
        data: those of its data module.
        trainer: the Trainer's options.
        speed: speed of the GPU, for the durations.

    Raises:
        ValueError: for what is not planned.
    """
    kind, task = _arguments("model", model, _TASKS)
    source = LatentPairsDataModule if issubclass(kind, VLUerTask) else CaptionLatentsDataModule
    return FitPlanner(kind, task, _arguments("data", data, (source,))[1], trainer, speed).plan()


def _arguments(key: str, given: Mapping[str, Any], kinds: tuple[type[Any], ...]) -> tuple[type[Any], dict[str, Any]]:
    """A component's class and its arguments as the class takes them, defaults included; it is not made."""
    path = given.get("class_path")
    kind = next((kind for kind in kinds if str(path).rpartition(".")[2] == kind.__name__), None)
    if kind is None:
        *most, last = (kind.__name__ for kind in kinds)
        names = f"{', '.join(most)} or {last}" if most else last
        got = f"got {path}" if path else "got none; a file of differences is given after the one it differs from"
        raise ValueError(f"{key}.class_path: a plan is for {names}, {got}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, key, instantiate=False)
    try:
        with torch.device("meta"):  # a VLUer among the arguments needs no memory
            values = parser.instantiate(parser.parse_object({key: dict(given.get("init_args") or {})}))
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split()).replace(f"{key}.", f"{key}.init_args.")) from None
    return kind, vars(values[key])


class FitPlanner:
    """Plans a configuration of `luve fit`.

    Args:
        kind: class of the task, one of those that `plan_training` takes.
        task: its arguments, defaults included.
        data: arguments of its data module, defaults included.
        trainer: the Trainer's options.
        speed: speed of the GPU, for the durations.

    Raises:
        ValueError: for a precision or a strategy that is not planned.
    """

    def __init__(
        self,
        kind: type[Any],
        task: Mapping[str, Any],
        data: Mapping[str, Any],
        trainer: Mapping[str, Any],
        speed: GpuSpeed | None = None,
    ) -> None:
        self.kind, self.task, self.data, self.trainer, self.speed = kind, task, data, trainer, speed
        check_counts(**{"data.init_args.batch_size": data["batch_size"]})
        self.autocast, self.sharing = precision_of(trainer), sharing_of(trainer)
        self.clips = trainer.get("gradient_clip_val") is not None
        self.notes: list[str] = []
        rules = load_backbone(data["backbone"]).size_rules()
        self.buckets = Buckets.chosen(data["size"], data["frames"], lambda: rules.step)

    def plan(self) -> RecipePlan:
        """The whole training."""
        vluer = issubclass(self.kind, VLUerTask)
        steps, shares = self._vluer_steps() if vluer else self._denoiser_steps()
        validation = self._vluer_validation() if vluer and self.trainer.get("limit_val_batches") != 0 else 0
        peak = max(step.peak for step in steps)
        if validation > peak:
            gib = f"{peak / 2**30:.2f} GiB"
            self.notes.append(f"the peak is validation's, which decodes whole clips; a training step takes {gib}")
        self._note_waits(steps)
        parts = whole_of(self.trainer, "accumulate_grad_batches", 1, 1)
        seconds = mean((step.seconds for step in steps), shares)
        # A graph for each shape, in training and in validation.
        shapes = len({(step.latents, step.batch) for step in steps})
        graphs: list[FirstUse] = ["training", "forward"]
        uses: list[FirstUse] = ["compiler", *graphs * shapes] if self.task.get("compile") else []
        most = whole_of(self.trainer, "max_steps", -1)
        if most < 1:
            self.notes.append("trainer.max_steps says no number of steps")
        return RecipePlan(
            kind="training",
            unit="step",
            seconds=None if seconds is None else seconds * parts,
            first_use=first_use(self.speed, uses),
            peak=max(peak, validation),
            units=most if most > 0 else None,
            processes=self.sharing.devices,
            strategy=self.sharing.strategy,
            rows=tuple(asdict(step) for step in steps),
            notes=tuple(self.notes),
        )

    def _note_waits(self, steps: Sequence[TrainingStep]) -> None:
        """Say where steps wait for the DataLoader."""
        speed = self.speed
        if speed is None or speed.loading is None:
            return
        waiting = [step.loaded for step in steps if step.seconds == speed.loaded(step.loaded)]
        if waiting:
            batch, rate = f"{max(waiting) / 1e6:.3g} MB", f"{speed.loading * 1e6:.3g} MB/s"
            self.notes.append(f"steps wait for data: up to {batch} a batch, loaded at {rate}")

    # The adaptation and the experts.

    def _denoiser_steps(self) -> tuple[list[TrainingStep], list[float]]:
        """A step of every bucket, the largest first, and the share of the steps that each takes."""
        data = self.data
        denoiser, codec, text_length = self._denoiser()
        grids = {}
        for bucket in self.buckets:
            recipe = LatentRecipe("plan", bucket.size, () if data["scale"] == 1 else (data["scale"],), bucket.frames)
            grids[bucket] = codec.latent_size(bucket.frames, *recipe.pixel_size(data["scale"]))
        volumes = {bucket: prod(grid) for bucket, grid in grids.items()}
        if issubclass(self.kind, EnhancementTask):
            self.notes.append("reading and upsampling the low-resolution latents are not counted")
        chosen = self._chosen()
        groups = batch_groups(
            self.buckets, chosen, volumes, data["batch_size"],
            fill_batches=data["fill_batches"], stills_share=None if len(chosen) == len(self.buckets) else
            data["stills_share"],
        )  # fmt: skip
        steps = [
            plan_step(
                denoiser, str(group.bucket), grids[group.bucket], group.batch_size, text_length, self.autocast,
                self.speed, self.task["compile"] is not None, self.sharing, self.clips,
            )
            for group in groups
        ]  # fmt: skip
        batches = [group.draws / group.batch_size for group in groups]
        return steps, [count / sum(batches) for count in batches]

    def _chosen(self) -> list[Bucket]:
        """The bucket of every training clip; each bucket once where the index is not there, or there is only one."""
        every = list(self.buckets)
        if len(every) == 1:
            return every
        entries = clips_there(Path(self.data["index"]), None, self.data["keep"], ["train"])
        if entries is None:
            self.notes.append(f"{self.data['index']} is not there: each bucket counts alike in the mean step")
            return every
        recipe = LatentRecipe(
            "plan", every[0].size, (), every[0].frames, stride=self.data["stride"], fps=self.data["fps"]
        )
        assigned, _ = self.buckets.assign(entries, recipe)
        return [bucket for bucket, clips in assigned.items() for _ in clips] or every

    def _denoiser(self) -> tuple[Denoiser, LatentSpace, int]:
        """What is trained, as the task sets it up; the latents' space; tokens of a caption."""
        task = self.task
        expert = self.kind is ExpertTask
        dtype = getattr(torch, task["dtype"]) if expert else torch.float32
        configs, attention = self._configs(task["backbone"])
        parts = Parts(configs, dtype)
        denoiser = denoiser_of(parts.transformer)
        denoiser.module.train()
        if (attention := task["attention"] or attention) is not None:
            denoiser.use_attention(attention)
        if expert:
            add_expert(denoiser.module, task["name"], task["expert"], dtype=torch.float32)
        else:
            if task["lora_rank"]:
                check_counts(**{"model.init_args.lora_rank": task["lora_rank"]})
            denoiser.module.requires_grad_(True)
            self.kind.set_up(denoiser, task["lora_rank"], task["lora_ranks"])
        denoiser.set_recompute(task["recompute"], task["keep_attention"], task["offload"], task["chunks"])
        return denoiser, parts.codec, configs.text_length

    def _configs(self, backbone: str) -> tuple[PartConfigs, Attention | None]:
        """The models' configurations, and the attention that a transformer not trained yet will have."""
        try:
            return PartConfigs.from_pretrained(self.data["backbone"], transformer=backbone), None
        except FileNotFoundError:
            if backbone == self.data["backbone"] or Path(backbone).exists():
                raise
        configs = PartConfigs.from_pretrained(self.data["backbone"])
        found = exporting(Path(backbone))
        like = f"the transformer of {self.data['backbone']}"
        if found is not None:
            like += f", as {found.file} will export it"
        self.notes.append(f"model.backbone {backbone} is not there yet: planned with {like}")
        return configs, None if found is None else found.argument("attention", Attention | None)

    # The VLUer.

    def _vluer_steps(self) -> tuple[list[TrainingStep], list[float]]:
        """A step of every bucket, scale and phase, and the share of the steps that each takes."""
        task, data, codec = self.task, self.data, self._codec()
        net = task["net"].to("meta").train().requires_grad_(True)
        if not data["scales"]:
            raise ValueError("data.init_args.scales: expected at least one")
        taught = None
        if self.kind is VLUerDistillationTask:
            teacher, note = planned_vluer(data["backbone"], Path(task["teacher"]))
            taught = teacher.requires_grad_(False), task["teacher_losses"]
            self.notes += [f"model.teacher: {note}"] if note else []
        steps, shares = [], []
        for phase, share in self._phases():
            decoded = None if phase == 1 else tuple(data["video_crop"] or task["pixel_crop"])
            for low, high, scale, bucket in self._crops(codec):
                steps.append(
                    plan_vluer_step(
                        net, codec, task["losses"], f"{bucket}, {scale:g}x, phase {phase}", low, high,
                        data["batch_size"], decoded, data["video_crop"] is not None, self.autocast, self.speed,
                        self.sharing, self.clips, taught,
                    )
                )  # fmt: skip
                shares.append(share / (len(data["scales"]) * len(self.buckets)))
        return steps, shares

    def _phases(self) -> list[tuple[int, float]]:
        """The phases that the training has, and their shares of the steps."""
        start, steps = self.task["pixel_from_step"], whole_of(self.trainer, "max_steps", -1)
        if start < 0 or not any(loss.space == "pixel" for loss in self.task["losses"].values()):
            return [(1, 1.0)]
        first = min(1.0, start / steps) if steps > 0 else 0.5
        return [(phase, share) for phase, share in ((1, first), (2, 1 - first)) if share > 0]

    def _crops(self, codec: LatentSpace) -> Iterator[tuple[Size3d, Size3d, float, Bucket]]:
        """Latents of the low and the high resolution, for every bucket and scale."""
        data = self.data
        rule = CropRule(tuple(data["crop"]), data["crop_at"], data["crop_frames"])
        for bucket in self.buckets:
            whole = codec.latent_size(bucket.frames, *bucket.size)
            for scale in data["scales"]:
                windows = aligned_windows(whole, rule, scale, np.random.default_rng(0))
                high, low = ((t[1] - t[0], y[1] - y[0], x[1] - x[0]) for t, y, x in windows)
                yield low, high, scale, bucket

    def _vluer_validation(self) -> int:
        """Bytes at the peak of validation, which decodes whole clips one by one."""
        codec, bucket = self._codec(), next(iter(self.buckets))
        latents = torch.empty(1, codec.channels, *codec.latent_size(bucket.frames, *bucket.size), device="meta")
        video = 3 * bucket.volume * 4
        with dry_run() as run:
            codec.decode(latents)
        net = self.task["net"]
        optimizer = sum(8 * parameter.numel() for parameter in net.parameters())
        return weight_bytes(net) + optimizer + weight_bytes(codec) + video + run.peak + CUBLAS_WORKSPACE

    def _codec(self) -> LatentSpace:
        """The VAE in the dtype in which it decodes."""
        dtype = self.autocast or getattr(torch, self.task["codec_dtype"])
        return Parts(PartConfigs.from_pretrained(self.data["backbone"]), torch.float32, vae_dtype=dtype).codec


def precision_of(trainer: Mapping[str, Any]) -> torch.dtype | None:
    """Dtype of autocast; None without.

    Raises:
        ValueError: for a precision that is not planned.
    """
    precision = str(trainer.get("precision") or "32-true")
    if precision not in _AUTOCAST:
        raise ValueError(f"trainer.precision: expected one of {', '.join(_AUTOCAST)} for a plan, got {precision!r}")
    return _AUTOCAST[precision]


def whole_of(trainer: Mapping[str, Any], key: str, default: int, least: int = -1) -> int:
    """A whole number among the Trainer's options; null and 0 are the default.

    Raises:
        ValueError: for anything else, and for a number below the least.
    """
    value = trainer.get(key) or default
    try:
        found = int(value)
    except (TypeError, ValueError, OverflowError):
        found = least - 1
    if found < least or (isinstance(value, float) and found != value):
        raise ValueError(f"trainer.{key}: expected a whole number, got {value!r}")
    return found


def processes_of(trainer: Mapping[str, Any]) -> int:
    """GPUs over all machines; "auto" and -1 are as many as there are here, at least one.

    Raises:
        ValueError: for a number that is not whole, or no GPU.
    """
    devices = trainer.get("devices")
    if isinstance(devices, str) and devices.strip().isdecimal():
        devices = int(devices)
    if isinstance(devices, str) and "," in devices:
        devices = [one for one in devices.split(",") if one.strip()]
    if isinstance(devices, list):
        devices = len(devices)
    if devices in (None, "auto", -1, "-1"):
        devices = max(1, torch.cuda.device_count())
    if not isinstance(devices, int) or devices < 1:
        raise ValueError(f"trainer.devices: expected a number of at least 1, a list, auto or -1, got {devices!r}")
    return devices * whole_of(trainer, "num_nodes", 1, 1)


def sharing_of(trainer: Mapping[str, Any]) -> Sharing:
    """How GPUs share a training.

    Raises:
        ValueError: for a strategy that is not planned.
    """
    given, devices = trainer.get("strategy") or "auto", processes_of(trainer)
    if isinstance(given, Mapping):
        given = str(given.get("class_path")).rpartition(".")[2]
    name = given if isinstance(given, str) else type(given).__name__  # the parser makes what has a class path
    known: dict[str, Strategy] = {"auto": "ddp", "DDPStrategy": "ddp", _SHARDED: "fsdp2"}
    strategy = "ddp" if name.startswith("ddp") else known.get(name)
    if strategy is None:
        raise ValueError(f"trainer.strategy: a plan is for auto, ddp or {_SHARDED}, got {name}")
    return Sharing(strategy if devices > 1 else "one device", devices)


def encoding_buckets(
    buckets: Buckets, recipe: LatentRecipe, entries: Sequence[ClipEntry] | None
) -> tuple[list[LatentRecipe], list[int] | None]:
    """The recipe of each bucket that has clips, and its number of windows; all of them where the index is not there.

    Raises:
        ValueError: no clip fits any.
    """
    if entries is None:
        return [bucket.recipe(recipe) for bucket in buckets], None
    assigned, left = buckets.assign(entries, recipe)
    if not assigned:
        raise ValueError(f"all of {len(entries)} clips fit no bucket, first {left[0]}")
    recipes = [bucket.recipe(recipe) for bucket in assigned]
    counts = [
        sum(len(own.clip_ranges(clip.total_frames, clip.fps)[0]) for clip in clips)
        for own, clips in zip(recipes, assigned.values(), strict=True)
    ]
    return recipes, counts
