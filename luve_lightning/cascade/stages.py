"""The three stages of the cascade, and decoding: each takes a pipeline and latents, and returns latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal, Unpack, get_args

import numpy as np
import torch
from torch import Tensor, nn

from luve_lightning.cascade.expert_choice import Experts, expert_chooser
from luve_lightning.cascade.options import CascadeOptions, SpectrumSwitch
from luve_lightning.cascade.refinement import Refinement, refinement_method
from luve_lightning.cascade.run import Chooser, RefinementRun, RunOptions, begin, check_steps, from_noise
from luve_lightning.cascade.upsampling import UpsamplingMethod, upsampling_method
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.models.backbones import denoiser_of

if TYPE_CHECKING:
    from luve_lightning.cascade.pipeline import LuVePipeline

VideoType = Literal["latent", "np", "pt", "pil"]


@torch.no_grad()
def generate_motion(
    pipeline: LuVePipeline,
    prompt: str | list[str] | None = None,
    *,
    height: int,
    width: int,
    num_frames: int,
    **options: Unpack[RunOptions],
) -> Tensor:
    """Stage 1, LMG: latents of a video at low resolution, exactly as from diffusers' own pipeline.

    The pipeline's first transformer denoises. Sizes are in pixels; `prompt` is one, or one for each video.

    Returns:
        Normalised latents, float32, B x C x t x h x w.

    Raises:
        ValueError: for an impossible size, naming the nearest possible ones, and other impossible options.
    """
    size = num_frames, height, width
    check_size(pipeline, pipeline.transformer, size)
    return from_noise(pipeline, "motion", pipeline.transformer, size, begin(pipeline, prompt, **options))


@torch.no_grad()
def upsample(
    pipeline: LuVePipeline,
    latents: Tensor,
    size: tuple[int, int],
    num_frames: int | None = None,
    method: str | UpsamplingMethod = CascadeOptions.upsampling,
) -> Tensor:
    """Stage 2, VLU: latents of a larger video.

    Args:
        pipeline: has the models.
        latents: normalised, B x C x t x h x w.
        size: height and width of the larger video in pixels.
        num_frames: frames of the larger video; default those of `latents`.
        method: an upsampling method, or its name.

    Returns:
        Normalised latents, float32.

    Raises:
        ValueError: for a size that is impossible, or a method that is.
    """
    method = check_method(pipeline, method)
    frames = pipeline.codec.pixel_size(*latents.shape[2:])[0] if num_frames is None else num_frames
    pipeline.size_rules.check(frames, height=size[0], width=size[1])
    target = pipeline.codec.latent_size(frames, *size)
    latents = latents.to(pipeline._execution_device, torch.float32)
    if method.model == "vae":
        pipeline.codec.wake()
    upsampled = method(latents, target, pipeline)
    pipeline.maybe_free_model_hooks()
    return upsampled


@torch.no_grad()
def refine(
    pipeline: LuVePipeline,
    latents: Tensor,
    prompt: str | list[str] | None = None,
    *,
    skip_steps: int = CascadeOptions.skip_steps,
    experts: Experts = "all",
    switch: float | SpectrumSwitch | None = None,
    refinement: str | Refinement = CascadeOptions.refinement,
    motion: Tensor | None = None,
    **options: Unpack[RunOptions],
) -> Tensor:
    """Stage 3, HCR: noise latents to the level after `skip_steps` of the schedule's steps, and denoise them.

    Args:
        pipeline: its refiner denoises, or its only transformer.
        latents: normalised, B x C x t x h x w.
        prompt: one for each sample.
        skip_steps: LuVe's S. The paper takes 5 of 50, its released checkpoints 10. 0 starts from pure noise, all
            steps leave the latents as they are.
        experts: "all", "none", a name or several. Each step uses the one whose band of sigma holds the
            scheduler's timestep: LuVe's low-frequency expert from timestep 875 on, the high-frequency one below.
        switch: the sigma where their bands meet instead of the one they were saved with, or a SpectrumSwitch.
        refinement: a refinement method instead of LuVe's, or its name.
        motion: the first stage's latents, which some methods need.
        options: see RunOptions.

    Returns:
        Normalised latents, float32, the shape of `latents`.

    Raises:
        ValueError: for what is impossible.
    """
    channels = pipeline.codec.channels
    if latents.ndim != 5 or latents.shape[1] != channels:
        raise ValueError(f"latents must be B x {channels} x t x h x w, got shape {tuple(latents.shape)}")
    model = pipeline.refinement_transformer
    check_tokens(pipeline, model, (latents.shape[2], latents.shape[3], latents.shape[4]))
    check_steps(options.get("steps", CascadeOptions.steps), skip_steps)
    method = refinement_method(refinement) if isinstance(refinement, str) else refinement
    check_refinement(pipeline, method, latents, motion, options.get("steps", CascadeOptions.steps), skip_steps)
    choose = chooser(pipeline, model, experts, switch)
    run = begin(pipeline, prompt, **options)
    if len(run.embeds) != len(latents):
        raise ValueError(f"{len(run.embeds)} prompts for {len(latents)} latents: expected one for each")
    return method(RefinementRun(pipeline, latents, motion, skip_steps, choose, run))


@torch.no_grad()
def decode(pipeline: LuVePipeline, latents: Tensor, output_type: VideoType = "np") -> Any:
    """The video of latents.

    Args:
        pipeline: its VAE decodes.
        latents: normalised, B x C x t x h x w.
        output_type: as in diffusers' pipelines, with values in [0, 1]: "np", float32 B x T x H x W x 3; "pt",
            float32 B x T x 3 x H x W; "pil", a list of B lists of T images. "latent" gives the latents back.

    Raises:
        ValueError: for another output type.
    """
    check_output_type(output_type)
    if output_type == "latent":
        return latents
    video = _decoded(pipeline, latents, gathered=output_type != "pt")
    return pipeline.video_processor.postprocess_video(video, output_type)


@torch.no_grad()
def decode_bytes(
    pipeline: LuVePipeline, latents: Tensor, arrived: Callable[[np.ndarray, int], None] | None = None
) -> np.ndarray:
    """The videos of latents in whole levels, uint8 B x T x H x W x 3; see `decode`.

    Rounded where they were decoded, part by part: a 4K video of 49 frames takes 5 GB in floating point.

    Args:
        pipeline: its VAE decodes.
        latents: normalised, B x C x t x h x w; a single video's where `arrived` is given.
        arrived: called with the video's frames and the number of them that are there, perhaps several times; with
            another array where decoding begins anew.
    """
    video = _decoded(pipeline, latents, gathered=True, levels=True, arrived=arrived)
    if video.dtype == torch.uint8:
        return video.numpy()
    batch, _, frames, height, width = video.shape
    result = np.empty((batch, frames, height, width, 3), np.uint8)
    for clip, into in zip(video, result, strict=True):
        for number in range(frames):
            levels = clip[:, number].mul(0.5).add_(0.5).clamp_(0, 1).mul_(255).round_()
            into[number] = levels.to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    if arrived is not None:
        arrived(result[0], frames)
    return result


def kernels_being_built(pipeline: LuVePipeline) -> Thread | None:
    """A thread that builds what decoding on a GPU would wait for at its first use; None elsewhere.

    Join it before decoding. Building takes seconds of a processor's time that denoising does not need.
    """
    device = pipeline.vae.device
    if device.type != "cuda":
        return None

    def build() -> None:
        # What fails here fails in decoding, where it is told. Autocast is a thread's own.
        with suppress(Exception), torch.autocast(device.type, torch.bfloat16, enabled=pipeline.decode_half):
            pipeline.codec.build_kernels()

    thread = Thread(target=build, daemon=True)
    thread.start()
    return thread


def _decoded(
    pipeline: LuVePipeline,
    latents: Tensor,
    gathered: bool,
    levels: bool = False,
    arrived: Callable[[np.ndarray, int], None] | None = None,
) -> Tensor:
    """Pixels in [-1, 1], B x 3 x T x H x W; where they do not fit, the other models leave the GPU meanwhile.

    `gathered`: whether a video decoded in tiles is put together on the CPU. `levels`: whether one decoded in parts
    may come as uint8 B x T x H x W x 3, on the CPU. `arrived`: see `decode_bytes`.
    """

    def decoded() -> Tensor:
        pipeline.codec.wake()
        codec, z = pipeline.codec, latents.to(pipeline.vae.device, torch.float32)
        size = len(z), 3, *codec.pixel_size(*z.shape[2:])
        out = torch.empty(size) if gathered and pipeline.decode_tile is not None else None
        if z.device.type == "cuda":  # memory that denoising leaves in pieces is too small for frames
            torch.cuda.empty_cache()
        with torch.autocast(z.device.type, torch.bfloat16, enabled=pipeline.decode_half):
            if levels and codec.streams(z):
                out = torch.empty(len(z), *size[2:], 3, dtype=torch.uint8)
                video = codec.decode(z, out=out, **({"written": partial(arrived, out[0].numpy())} if arrived else {}))
            else:
                video = codec.decode(z, out=out)
        pipeline.maybe_free_model_hooks()
        return video

    try:
        return decoded()
    except torch.OutOfMemoryError:
        others = _beside_the_vae(pipeline)
        if not others:
            raise
    # Here the exception is gone, and with it what its frames held.
    with _on_cpu(others):
        return decoded()


def _beside_the_vae(pipeline: LuVePipeline) -> list[nn.Module]:
    """The models on the VAE's device that decoding does not need; with offloading, none are there."""
    if getattr(pipeline, "_all_hooks", None):
        return []
    others = [part for part in pipeline.components.values() if isinstance(part, nn.Module) and part is not pipeline.vae]
    return [part for part in others if _device(part) == pipeline.vae.device]


def _device(module: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in module.parameters()), None)


@contextmanager
def _on_cpu(modules: list[nn.Module]) -> Iterator[None]:
    """Modules are on the CPU inside, and afterwards where they were."""
    devices = [_device(module) for module in modules]
    for module in modules:
        module.to("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        for module, device in zip(modules, devices, strict=True):
            module.to(device)


def check_size(pipeline: LuVePipeline, transformer: Any, size: Size3d, prefix: str = "") -> None:
    """Refuse frames, height and width that the models would crop; `prefix` is the option names' prefix."""
    pipeline.size_rules.check(size[0], **{f"{prefix}height": size[1], f"{prefix}width": size[2]})
    check_tokens(pipeline, transformer, pipeline.codec.latent_size(*size))


def check_tokens(pipeline: LuVePipeline, transformer: Any, latents: Size3d) -> None:
    """Refuse latents that the transformer would crop, or that cannot be spread over devices."""
    tokens = math.prod(denoiser_of(transformer).token_grid(latents))
    if tokens % pipeline.context_parallel_degree:
        raise ValueError(
            f"{tokens} tokens do not divide among {pipeline.context_parallel_degree} devices: expected another size "
            "or number of devices"
        )


def check_method(pipeline: LuVePipeline, method: str | UpsamplingMethod) -> UpsamplingMethod:
    """The method, unless it is unknown, or needs a VLUer and there is none."""
    method = upsampling_method(method) if isinstance(method, str) else method
    if method.model == "vluer" and pipeline.vluer is None:
        raise ValueError(
            "upsampling: the pipeline has no VLUer: give vluer= to from_pretrained, or upsample by latent or rgb"
        )
    return method


def check_training(model: Any, wanted: str | None) -> None:
    """Refuse a transformer that was trained for another refinement than `wanted`; None is LuVe's, or none."""
    if (found := denoiser_of(model).trained_for) != wanted:
        origin = model.config.get("_name_or_path") or "the refiner"
        was = "was trained for none" if found is None else f"was trained for the refinement {found}"
        right = f"one for {wanted}, as experiments/rivals/{wanted}.yaml trains it" if wanted else "one for luve"
        raise ValueError(f"refinement: {origin} {was}; expected {right}")


def check_refinement(
    pipeline: LuVePipeline, method: Refinement, latents: Tensor, motion: Tensor | None, steps: int, skip: int
) -> None:
    """Refuse what a refinement method cannot do with latents; without `motion` they count as the first stage's."""
    sizes = [pipeline.codec.pixel_size(*x.shape[2:]) for x in (latents, latents if motion is None else motion)]
    (frames, height, width), (_, *low) = sizes
    check_training(pipeline.refinement_transformer, method.trained)
    method.check(pipeline, CascadeOptions(height, width, frames, low[0], low[1], steps=steps, skip_steps=skip))


def check_output_type(output_type: str) -> None:
    """Refuse an unknown type of output."""
    if output_type not in (known := get_args(VideoType)):
        raise ValueError(f"output_type: expected one of {', '.join(known)}, got {output_type!r}")


def chooser(pipeline: LuVePipeline, model: Any, experts: Experts, switch: float | SpectrumSwitch | None) -> Chooser:
    """Which expert of a transformer is active at a timestep; see `expert_chooser`."""
    return expert_chooser(model, experts, switch, pipeline.schedule().train_timesteps)
