"""`luve upsample`, `luve spectra`: clips upsampled by several methods; when a backbone's frequency bands resolve."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from luve_lightning.cascade import upsampling
from luve_lightning.cascade.upsampling import LatentUpsampler, LooseModels, UpsamplingMethod
from luve_lightning.cli import Verb
from luve_lightning.cli.indexed_clips import check_folder, entries_of, open_index, print_summary, uneven_line
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.video_files import check_name
from luve_lightning.data.video_index import CAPTION, CAPTIONS, Limits, Split
from luve_lightning.evaluation.denoising_spectra import (
    DEFAULT_EDGES,
    PAPER_SIGMA_SWITCH,
    check_spectra_options,
    generate_spectra,
    suggest_switch,
    switch_lines,
    write_spectra,
)
from luve_lightning.evaluation.super_resolution import load_super_resolver
from luve_lightning.evaluation.upsampled_clips import ClipUpsampler, EnlargingRecipe, Totals, UpsamplingRecipe
from luve_lightning.evaluation.upsampling_comparison import method_names
from luve_lightning.evaluation.video_sets import low_resolution_videos
from luve_lightning.files import write_text
from luve_lightning.machine import UnitTimes, check_video, check_workers, choose_device
from luve_lightning.model_folders import weights_digest
from luve_lightning.models.backbones import Backbone, LatentSpace, Schedule, load_backbone
from luve_lightning.models.super_resolution import PixelSuperResolver
from luve_lightning.models.vluer import load_vluer
from luve_lightning.terminal import Steps, amount, say

VERBS = {
    "upsample": Verb(
        "Measurement",
        "upsample clips by several methods into folders of videos",
        named=("super_resolution",),
        examples=("experiments/upsample/mini.yaml",),
        goes_on=True,
    ),
    "spectra": Verb(
        "Measurement",
        "measure when frequency bands resolve, suggest a sigma_switch",
        examples=("experiments/spectra/mini.yaml",),
    ),
}


def upsample(
    backbone: str,
    output: Path,
    index: Path | None = None,
    videos: Path | None = None,
    size: tuple[int, int] | None = None,
    scale: float | None = None,
    frames: int | None = None,
    vluers: dict[str, Path | None] | None = None,
    baselines: list[str] | None = None,
    super_resolution: dict[str, Path | None] | None = None,
    splits: list[Split] | None = None,
    clips: Path | None = None,
    keep: Limits = Limits(),  # noqa: B008  # frozen
    start: int = 0,
    stride: int = 1,
    fps: float | None = None,
    caption: str = "Summarized Description",
    limit: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
    encoder_threads: int = 1,
    measured: Path | None = None,
) -> None:
    """Upsamples clips from a low resolution by several methods, into one folder of lossless videos per method.

    The folders are the named VLUers and interpolations, reference (the clips' own pixels) and vae (the VAE's
    reconstruction, the ceiling for upsamplers of latents). Beside each video lies a JSON file with its prompt and
    how it was made; existing videos made the same way are skipped.

    With --videos instead of --index, the videos of a folder are the low resolution themselves, for instance those of
    the first stage that luve generate --keep_stages true leaves in motion/.

    Args:
        backbone: Folder or hub id of the diffusers pipeline with the VAE.
        output: Folder of the methods' folders.
        index: UltraVideo's CSV, or an index that luve index made.
        videos: Folder of videos to enlarge instead; prompts are those of JSON files beside them or in the folder above.
        size: Height and width of the high resolution; larger clips are cropped to its shape and downscaled.
        scale: How many times smaller the low resolution is. Of videos: how many times larger than each they become,
            where no size is given.
        frames: Frames per clip, 4k+1. Of videos: the first ones, default all.
        vluers: VLUer folders by name.
        baselines: Methods without a VLUer: some of nearest, bilinear, bicubic and rgb_bicubic; default all.
        super_resolution: Weights of networks that enlarge pixels, by name: --super_resolution NAME=FILE, a .pth or
            .safetensors of RealBasicVSR or Real-ESRGAN's RRDBNet. They see the decoded low resolution; what they make
            is resized to the exact size.
        splits: Splits to upsample, of train, val and test; default all clips.
        clips: Folder of the clips; default clips/ beside a CSV, else the index's own folder.
        keep: Which clips of the index to take.
        start: First frame.
        stride: Read every stride-th frame.
        fps: Read every clip as one of this many frames a second, by the times of its frames; start, frames and stride
            then count these. Default: the frames as they are.
        caption: Column of the index that becomes the prompt.
        limit: Use only the first clips of each split, this many; default all.
        dtype: Dtype of the weights of the VAE and of super-resolution.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        encoder_threads: Threads that write a video file; the frames are the same.
        measured: Also write what it took to this file, FILE.json: seconds in all, of the first clip and of each later
            one, by every method, what these were spent on, and GPU memory.
    """
    started = time.perf_counter()
    console = Console(emoji=False)
    check_folder("output", output)
    check_workers("encoder_threads", encoder_threads, least=1)
    target = choose_device(device)
    _check(start, stride, limit, caption)
    chosen = upsampling.baselines(baselines)
    folders = {name: folder for name, folder in (vluers or {}).items() if folder is not None}
    for name in folders:
        check_name(name, "vluers:")
    recipe: UpsamplingRecipe | EnlargingRecipe
    unreadable: list[tuple[str, str]] = []
    if videos is None:
        if index is None or size is None or scale is None or frames is None:
            lacking = _lacking(index=index, size=size, scale=scale, frames=frames)
            raise ValueError(f"{lacking}: required, but not given; or enlarge a folder of videos: --videos")
        entries = entries_of(open_index(console, index, clips, keep), splits, limit)
        recipe = UpsamplingRecipe((size[0], size[1]), scale, frames, start, stride, caption, fps)
    else:
        own = {"index": index, "splits": splits, "clips": clips, "fps": fps, "start": start, "stride": stride != 1}
        if given := [key for key, value in (own | {"keep": keep != Limits()}).items() if value]:
            raise ValueError(f"{given[0]}: is for clips of an index; expected it without videos")
        recipe = EnlargingRecipe(None if size is None else (size[0], size[1]), scale, frames)
        entries, unreadable = low_resolution_videos(videos)
        entries = entries[:limit]
    codec = load_backbone(backbone).latent_space(getattr(torch, dtype)).to(target)
    methods, identities = _methods(chosen, folders, codec, target)
    nets = _networks(super_resolution or {}, methods)
    identities |= {name: weights_digest(net) for name, net in nets.items()}
    for net in nets.values():
        net.to(target, getattr(torch, dtype))
    hashes = ClipHashes(output)
    upsampler = ClipUpsampler(codec, methods, identities, recipe, output, hashes, target, nets, encoder_threads)
    if not upsampler.names:
        raise ValueError("expected at least one of vluers, baselines and super_resolution")
    what = "clip" if videos is None else "video"
    say(console, f"{amount(len(entries), what)} by {', '.join(upsampler.names)} on {target}")
    times = UnitTimes("clip", target)
    with Steps(console) as steps:
        steps.begin("clips", len(entries))
        totals = upsampler.run(entries, steps.advance, times)
    uneven = uneven_line(upsampler.hashes, entries) if fps is None else ""
    totals.unreadable = [*unreadable, *totals.unreadable]
    _tell(console, output, totals, uneven, [entry.clip_id for entry in entries if not entry.captions], started)
    made = {"total": totals.written + totals.there, "there": totals.there, "made": totals.written}
    times.write(measured, processes=1, units=len(entries), **made)
    if len(totals.unreadable) == len(entries) + len(unreadable):
        raise ValueError(f"none of the {amount(len(totals.unreadable), what)} of {index or videos} could be read")


def _check(start: int, stride: int, limit: int | None, caption: str) -> None:
    """Refuse what no clips can have."""
    if start < 0 or stride < 1 or (limit is not None and limit < 1):
        raise ValueError(f"expected start >= 0, stride >= 1 and limit >= 1, got {start}, {stride} and {limit}")
    if caption not in (*CAPTIONS, CAPTION):
        raise ValueError(
            f"caption: expected one of {', '.join(CAPTIONS)}, or {CAPTION} for clips of one's own, got {caption!r}"
        )


def _lacking(**wanted: object) -> str:
    return ", ".join(key for key, value in wanted.items() if value is None)


def _methods(
    chosen: Mapping[str, UpsamplingMethod], folders: Mapping[str, Path], codec: LatentSpace, device: torch.device
) -> tuple[dict[str, LatentUpsampler], dict[str, str]]:
    """The interpolations and the VLUers by name, and what distinguishes a VLUer from others."""
    methods: dict[str, LatentUpsampler] = {name: method.of(LooseModels(codec)) for name, method in chosen.items()}
    identities: dict[str, str] = {}
    for name, folder in folders.items():
        methods[name], identities[name] = _load(name, folder, codec, device)
    return methods, identities


def _load(name: str, folder: Path, codec: LatentSpace, device: torch.device) -> tuple[LatentUpsampler, str]:
    """A VLUer, and what distinguishes it from others."""
    if name in (*method_names()[1:], "reference"):
        raise ValueError(f"vluers: {name} is the name of another method")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"vluers.{name}: {folder} has no config.json; expected a saved VLUer")
    net = load_vluer(folder, torch_dtype=torch.float32).to(device).eval()
    if net.config.latent_channels != codec.channels:
        raise ValueError(
            f"vluers.{name}: {folder} takes {net.config.latent_channels} latent channels, the VAE has {codec.channels}"
        )
    config = {key: value for key, value in dict(net.config).items() if not key.startswith("_")}
    return net, weights_digest(net, json.dumps(config, sort_keys=True, default=str))


def _networks(files: Mapping[str, Path | None], taken: Collection[str]) -> dict[str, PixelSuperResolver]:
    """Networks of super-resolution by name."""
    nets = {}
    for name, file in files.items():
        if file is None:
            continue
        check_name(name, "super_resolution:")
        if name in (*method_names()[1:], "reference", *taken):
            raise ValueError(f"super_resolution: {name} is the name of another method")
        try:
            nets[name] = load_super_resolver(file)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"super_resolution.{name}: {error}") from None
    return nets


def _tell(console: Console, output: Path, totals: Totals, uneven: str, silent: Sequence[str], started: float) -> None:
    lines = [
        f"  written        {amount(totals.written, 'video')}",
        f"  already there  {totals.there}",
        f"  unreadable     {amount(len(totals.unreadable), 'clip')}",
        *(f"    {clip_id}: {reason}" for clip_id, reason in totals.unreadable),
        f"  variable rate  {uneven}" if uneven else "",
        f"  no prompt      {amount(len(silent), 'video')} (first {silent[0]})" if silent else "",
    ]
    print_summary(console, output, lines, started)


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
