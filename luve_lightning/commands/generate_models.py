"""The models of `luve generate`: where they come from, and the pipeline made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from luve_lightning.models.text import CutText, cut_text
from luve_lightning.pipelines.generation_jobs import VideoJob
from luve_lightning.pipelines.generation_settings import CascadeSettings
from luve_lightning.pipelines.lora_files import LoraFile
from luve_lightning.pipelines.lora_layers import LoraSummary
from luve_lightning.pipelines.luve import LuVePipeline
from luve_lightning.pipelines.luve_components import expert_folders
from luve_lightning.pipelines.luve_speed import SpeedOptions


def find_models(
    backbone: str,
    vluer: Path | None,
    needs_vluer: bool,
    refiner: Path | None,
    experts: dict[str, Path | None] | Path | None,
    lora: Path | None,
) -> dict[str, str | Path]:
    """Where each model comes from, by the name of its option; models that are not used are left out.

    Raises:
        FileNotFoundError: for a folder that is not there.
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
    settings: CascadeSettings,
    speed: SpeedOptions,
    context_parallel: int,
    device: torch.device,
    lora: LoraFile | None = None,
) -> tuple[LuVePipeline, LoraSummary | None]:
    """The pipeline on its device with its options in force, and what of the LoRA acts.

    Args:
        sources: of `find_models`.
        own_experts: take the experts of a saved LuVePipeline.
        settings: see there.
        speed: see there.
        context_parallel: processes over which a video is spread.
        device: where it runs, unless parts of it are offloaded.
        lora: what `read_lora` read.
    """
    experts = {
        name.removeprefix("experts."): path for name, path in sources.items() if name.startswith("experts.")
    }
    pipeline: LuVePipeline = LuVePipeline.from_pretrained(
        sources["backbone"],
        vluer=sources.get("vluer"),
        experts=None if own_experts else experts,
        refiner=sources.get("refiner"),
        torch_dtype=getattr(torch, settings.dtype),
        shift=settings.shift,
    )
    summary = None if lora is None else pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    if not speed.offload:
        pipeline.to(device)
    if context_parallel > 1:
        pipeline.enable_context_parallel(context_parallel)
    pipeline.apply(speed)
    return pipeline, summary


def cuts_of(pipeline: LuVePipeline, job: VideoJob, length: int | None) -> dict[str, CutText]:
    """What the text encoder does not see of a job's texts, by "prompt" and "negative_prompt"."""
    length = pipeline.text_length(length)
    texts = {"prompt": job.prompt, "negative_prompt": job.negative_prompt or ""}
    found = {name: cut_text(pipeline.tokenizer, text, length) for name, text in texts.items()}
    return {name: cut for name, cut in found.items() if cut is not None}


def cut_lines(places: Mapping[str, str], cuts: Mapping[str, Mapping[str, CutText]]) -> str:
    """Which texts are cut and what they lack, in lines; empty when none is.

    Args:
        places: where each video's prompt stands, by the video's name; empty for the option.
        cuts: of `cuts_of` by the video's name.
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
