"""The models of `luve generate`, the pipeline made from them, and the processes that share its work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from luve_lightning.cascade.generation_jobs import VideoJob
from luve_lightning.cascade.lora_files import LoraFile
from luve_lightning.cascade.lora_layers import LoraSummary
from luve_lightning.cascade.pipeline import LuVePipeline
from luve_lightning.cascade.pipeline_files import expert_folders
from luve_lightning.cascade.speed import SpeedOptions, enable_context_parallel
from luve_lightning.machine import choose_device
from luve_lightning.models.backbones import CutText

# Others wait while one hashes files, encodes videos, or waits for a video that another program is making.
_PATIENCE = timedelta(days=7)


def find_models(
    backbone: str,
    vluer: Path | None,
    needs_vluer: bool,
    refiner: Path | None,
    experts: dict[str, Path | None] | Path | None,
    lora: Path | None,
) -> dict[str, str | Path]:
    """Where each model comes from, by the name of its option; unused models are left out.

    Raises:
        FileNotFoundError: for a missing folder.
        ValueError: when a VLUer is needed and there is none.
    """
    if not needs_vluer:
        vluer = None
    elif vluer is None and not (Path(backbone) / "vluer").is_dir():  # a saved LuVePipeline has one
        raise ValueError("vluer: required, but not given; --upsampling latent or rgb needs none")
    found: dict[str, str | Path | None] = {"vluer": vluer, "refiner": refiner, "lora": lora}
    if isinstance(experts, Path):
        experts = {name or "expert": folder for name, folder in expert_folders(experts).items()}
    found |= {f"experts.{name}": folder for name, folder in (experts or {}).items()}
    given = {name: path for name, path in found.items() if path is not None}
    for name, path in given.items():
        if not Path(path).exists():
            raise FileNotFoundError(f"{name}: {path}: no such file or folder")
    return {"backbone": backbone, **given}


def load_pipeline(
    sources: dict[str, str | Path],
    own_experts: bool,
    dtype: str,
    speed: SpeedOptions,
    context_parallel: int,
    device: torch.device,
    lora: LoraFile | None = None,
) -> tuple[LuVePipeline, LoraSummary | None]:
    """The pipeline on its device with its options applied, and what part of the LoRA acts.

    Args:
        sources: from `find_models`.
        own_experts: use the experts of a saved LuVePipeline.
        dtype: dtype of the transformers and the text encoder.
        speed: see there.
        context_parallel: number of processes that share a video.
        device: device of the pipeline, unless parts of it are offloaded.
        lora: as `read_lora` read it.
    """
    experts = {
        name.removeprefix("experts."): path for name, path in sources.items() if name.startswith("experts.")
    }
    pipeline: LuVePipeline = LuVePipeline.from_pretrained(
        sources["backbone"],
        vluer=sources.get("vluer"),
        experts=None if own_experts else experts,
        refiner=sources.get("refiner"),
        torch_dtype=getattr(torch, dtype),
    )
    summary = None if lora is None else pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    if not speed.offload:
        pipeline.to(device)
    if context_parallel > 1:
        enable_context_parallel(pipeline, context_parallel)
    pipeline.apply(speed)
    return pipeline, summary


def cuts_of(pipeline: LuVePipeline, job: VideoJob, length: int | None) -> dict[str, CutText]:
    """What the text encoder does not see of a job's texts, by "prompt" and "negative_prompt"."""
    conditioner = pipeline.text(length)
    texts = {"prompt": job.prompt, "negative_prompt": job.negative_prompt or ""}
    found = {name: conditioner.cut(text) for name, text in texts.items()}
    return {name: cut for name, cut in found.items() if cut is not None}


def cut_lines(places: Mapping[str, str], cuts: Mapping[str, Mapping[str, CutText]]) -> str:
    """Lines that say which texts are cut and what they lose; empty when none is.

    Args:
        places: where each video's prompt stands, by the video's name; empty for the option.
        cuts: from `cuts_of`, by the video's name.
    """
    told = [
        f"  {places[name] or '--prompt'}: {what}: {cut}"
        for name, own in cuts.items()
        for what, cut in own.items()
    ]
    if not told:
        return ""
    head = f"longer than the text encoder reads: {len(told)} texts"
    return "\n".join([head, *told[:3], *([f"  ... and {len(told) - 3} more"] if len(told) > 3 else [])])


@dataclass(frozen=True)
class Processes:
    """The position of this process.

    Attributes:
        rank: rank among all processes, from 0.
        count: number of processes.
        local: rank among this machine's processes.
        together: whether all make each video together.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    together: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], context_parallel: int) -> Processes:
        """Read torchrun's variables.

        Args:
            environment: may hold RANK, WORLD_SIZE and LOCAL_RANK.
            context_parallel: number of processes that share a video.

        Raises:
            ValueError: when the number of processes differs from it.
        """
        count = int(environment.get("WORLD_SIZE", "1"))
        if context_parallel < 1 or (context_parallel > 1 and context_parallel != count):
            raise ValueError(
                f"context_parallel {context_parallel}: expected 1, or the number of processes, which is {count}; "
                f"torchrun --nproc-per-node {max(2, context_parallel)} starts them"
            )
        rank = int(environment.get("RANK", "0")) if count > 1 else 0
        local = int(environment.get("LOCAL_RANK", str(rank))) if count > 1 else 0
        return cls(rank, count, local, context_parallel > 1)

    def device(self, name: str) -> torch.device:
        """The device of this process: its own GPU where there are several.

        Args:
            name: auto, cpu, cuda or cuda:N.

        Raises:
            ValueError: no such device, or the same GPU for all.
        """
        if self.count == 1:
            return choose_device(name)
        if name not in ("auto", "cuda", "cpu"):
            raise ValueError(
                f"device: {self.count} processes take a GPU each; expected auto, cuda or cpu, got {name!r}"
            )
        if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        device = choose_device(f"cuda:{self.local}")
        torch.cuda.set_device(device)
        return device

    def begin(self, device: torch.device) -> None:
        """Connect processes that make videos together.

        Raises:
            ValueError: where there is no GPU; diffusers' context parallelism needs one.
        """
        if not self.together:
            return
        if torch.accelerator.device_count() == 0:
            raise ValueError("context_parallel: one video is spread over GPUs, and there is none here")
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=_PATIENCE)

    def end(self) -> None:
        """Disconnect them."""
        if self.together:
            dist.destroy_process_group()

    def shared(self, value: Any) -> Any:
        """The first process's value, for all that make videos together."""
        if not self.together:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def follow(self, make: Callable[[int], None]) -> None:
        """Make what the first process makes, until it says that all is done (None)."""
        while (number := self.shared(None)) is not None:
            make(number)
