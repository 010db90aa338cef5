"""`luve spectra`: at which noise level each frequency band of a backbone's latents resolves."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from luve_lightning.cli import Verb
from luve_lightning.evaluation.denoising_spectra import (
    DEFAULT_EDGES,
    PAPER_SIGMA_SWITCH,
    check_spectra_options,
    generate_spectra,
    suggest_switch,
    switch_lines,
    write_spectra,
)
from luve_lightning.files import write_text
from luve_lightning.machine import check_video, choose_device
from luve_lightning.models.backbones import Backbone, Schedule, load_backbone
from luve_lightning.terminal import Steps, amount, say

VERBS = {
    "spectra": Verb(
        "Measurement",
        "measure when frequency bands resolve, suggest a sigma_switch",
        examples=("experiments/spectra/mini.yaml",),
    )
}


def spectra(
    backbone: str,
    prompts: list[str],
    output: Path,
    height: int,
    width: int,
    frames: int,
    steps: int = 50,
    guidance: float = 5.0,
    shift: float | None = None,
    seed: int = 0,
    edges: list[float] | None = None,
    share: float = 0.5,
    length: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
) -> None:
    """Measures at which noise level each band of spatial frequencies resolves, and suggests a sigma_switch.

    Generates the latents of each prompt and compares, band by band, the clean latent that the model predicts at
    each denoising step with the final one (the paper's figure 6). Writes spectra.csv, spectra.png and switch.json.

    Args:
        backbone: Folder or hub id of a diffusers pipeline.
        prompts: Prompts, one video each.
        output: Folder of the files.
        height: Height of the videos, pixels.
        width: Width of the videos, pixels.
        frames: Frames of the videos, 4k + 1.
        steps: Denoising steps; more give a finer curve.
        guidance: Scale of classifier-free guidance; 1 is none.
        shift: Shift of the schedule; default that of the backbone's scheduler.
        seed: Seed of the first prompt's noise; each further prompt takes the next.
        edges: Edges of the bands, rising fractions of Nyquist from 0 to 1; default four equal bands.
        share: Share of what is open in a band at the first step; once this much is settled, the switch may come.
        length: Number of tokens to pad or cut a prompt to; default the tokenizer's own, at most Wan's 512.
        dtype: Dtype of the transformer's and the text encoder's weights; bfloat16 is slow on a CPU.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
    """
    started, console = time.perf_counter(), Console(emoji=False)
    bands = list(DEFAULT_EDGES) if edges is None else edges
    check_spectra_options(prompts, steps, bands, share)
    check_video(frames, height, width)
    target = choose_device(device)
    parts = load_backbone(backbone)
    schedule = _schedule(parts, shift)
    text = parts.text(getattr(torch, dtype), length).to(target)
    codec, size = parts.latent_space(), (frames, height, width)
    denoiser = parts.denoiser(getattr(torch, dtype))
    denoiser.module.eval().to(target)
    with Steps(console) as progress:
        progress.begin("denoising steps", steps * len(prompts))
        found = generate_spectra(
            denoiser, text, schedule, codec, prompts, size, steps, guidance, seed, bands, progress.advance
        )
    switch = suggest_switch(found, share)
    title = f"{backbone}, {height}x{width}, {frames} frames, {amount(found.videos, 'video')}, guidance {guidance:g}"
    table, plot = write_spectra(found, switch, output, "spectra", title)
    settings = {
        "backbone": backbone, "prompts": prompts, "height": height, "width": width, "frames": frames,
        "steps": steps, "guidance": guidance, "shift": schedule.shift, "seed": seed,
        "edges": bands, "dtype": dtype, "device": str(target), "torch": torch.__version__,
    }  # fmt: skip
    low, high = found.at(PAPER_SIGMA_SWITCH)[[0, -1]].tolist()
    # NaN, the interval of a single video, is not valid JSON.
    told = {key: None if value != value else value for key, value in asdict(switch).items()}
    facts = told | {"released": {"sigma": PAPER_SIGMA_SWITCH, "low": low, "high": high}, "settings": settings}
    write_text(output / "switch.json", json.dumps(facts, indent=2) + "\n")
    written = f"written to {table}, {plot.name} and switch.json"
    made = f"{amount(found.videos, 'video')} of {amount(steps, 'step')}"
    took = f"{made} in {time.perf_counter() - started:.0f} s on {target}"
    say(console, "\n".join([*switch_lines(found, switch), written, took]))


def _schedule(backbone: Backbone, shift: float | None) -> Schedule:
    if shift is None:
        try:
            return backbone.schedule()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; give the schedule's --shift instead") from error
    if not 0 < shift < float("inf"):
        raise ValueError(f"shift: expected a number greater than 0, got {shift}")
    return backbone.build_schedule(shift)
