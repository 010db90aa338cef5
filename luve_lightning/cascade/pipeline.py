"""LuVe's three-stage cascade as a diffusers pipeline."""

# No `from __future__ import annotations`: diffusers reads the types of `__init__` at run time.

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from luve_lightning.cascade.expert_choice import Experts, switch_expert
from luve_lightning.cascade.lora_loading import LoraLoading, plain_loras
from luve_lightning.cascade.options import CascadeOptions, Guidance
from luve_lightning.cascade.pipeline_files import EXPERTS, check_fit, dtypes_of, expert_folders, load_parts
from luve_lightning.cascade.run import LuVePipelineOutput, RefinementRun, Stage, begin, from_noise
from luve_lightning.cascade.speed import SpeedOptions, apply_speed
from luve_lightning.cascade.stages import (
    VideoType,
    check_method,
    check_output_type,
    check_size,
    check_training,
    chooser,
    decode,
    upsample,
)
from luve_lightning.model_folders import is_local, loading, saving
from luve_lightning.models.attention import Attention, branches_set_aside, load_branches, save_branches
from luve_lightning.models.backbones import (
    LatentSpace,
    Sampler,
    Schedule,
    SizeRules,
    TextConditioner,
    denoiser_of,
    family_of,
    latent_space_of,
)
from luve_lightning.models.experts import expert_names, experts_set_aside, load_expert, save_expert
from luve_lightning.models.vluer import BaseVLUer

StageStart = Callable[[Stage, int], Tensor | None]
StageEnd = Callable[[Stage, Tensor], None]


class LuVePipeline(DiffusionPipeline, LoraLoading):
    """Text to video at high resolution by LuVe (arXiv 2602.11564), on any backbone of `models.backbones`.

    1. `generate_motion`: the backbone as it is, at a low resolution.
    2. `upsample`: the VLUer brings the latents to the final size.
    3. `refine`: noise of a middle level is added and removed again at full resolution, by the low-frequency expert
       first and then the high-frequency expert.

    Each takes latents and returns latents; calling the pipeline runs all three and decodes.

    Args:
        tokenizer: the text encoder's.
        text_encoder: encodes prompts.
        vae: encodes and decodes video.
        scheduler: a scheduler of flow matching.
        transformer: denoises the first stage and in direct generation.
        refiner: denoises the third stage; adapted to the high resolution, with the experts. None where
            `transformer` serves both, and has the experts.
        vluer: upsamples latents; None where latents or pixels are interpolated instead.
        transformer_2: a second transformer for low noise, as in Wan2.2; must be None, like the two options that go
            with it.
        boundary_ratio: see there.
        expand_timesteps: see there.

    Raises:
        ValueError: for a backbone of two transformers, and a VLUer for other latents.

    Example:
        >>> pipeline = LuVePipeline.from_pretrained("data/mini/wan", "data/mini/vluer")
        >>> size = {"height": 64, "width": 64, "num_frames": 5}
        >>> pipeline("a photograph of old coins .", **size, steps=2, skip_steps=1).frames.shape
        (1, 5, 64, 64, 3)
    """

    model_cpu_offload_seq = "text_encoder->transformer->vluer->refiner->vae"
    _optional_components = ["transformer", "transformer_2", "refiner", "vluer"]  # noqa: RUF012
    _lora_loadable_modules = ["transformer", "refiner"]  # noqa: RUF012

    decode_tile: tuple[int, int] | None = None
    """Height and width in latents of the tiles in which video is decoded and encoded: equal up to rounding, in much
    less memory. None uses whole frames."""
    decode_half: bool = False
    """Whether video is decoded in bfloat16."""
    context_parallel_degree: int = 1

    # diffusers' callbacks read these.
    guidance_scale: float = 1.0
    attention_kwargs: dict[str, Any] | None = None
    num_timesteps: int = 0
    _interrupt: bool = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: nn.Module,
        vae: nn.Module,
        scheduler: SchedulerMixin,
        transformer: nn.Module,
        refiner: nn.Module | None = None,
        vluer: BaseVLUer | None = None,
        transformer_2: nn.Module | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        super().__init__()
        if transformer_2 is not None or boundary_ratio is not None or expand_timesteps:
            raise ValueError("the backbone is a Wan2.2 one (transformer_2, boundary_ratio): expected one transformer")
        if vluer is not None and vluer.config.latent_channels != (found := latent_space_of(vae).channels):
            raise ValueError(f"the VLUer takes {vluer.config.latent_channels} latent channels, the VAE has {found}")
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=scheduler,
            transformer_2=None,
            refiner=refiner,
            vluer=vluer,
        )
        self.register_to_config(boundary_ratio=None, expand_timesteps=False)
        self.video_processor = VideoProcessor()

    @property
    def refinement_transformer(self) -> Any:
        """The transformer of the third stage, which has the experts."""
        return self.transformer if self.refiner is None else self.refiner

    @property
    def transformers(self) -> list[Any]:
        """Every transformer once."""
        return [self.transformer] if self.refiner is None else [self.transformer, self.refiner]

    @property
    def codec(self) -> LatentSpace:
        """The latent space, on the VAE's device."""
        return latent_space_of(self.vae, self.decode_tile)

    @property
    def size_rules(self) -> SizeRules:
        """The multiples that a video's height, width and frames must be."""
        codec, patch = self.codec, denoiser_of(self.transformer).patch
        return SizeRules(codec.spatial_ratio * patch[1], codec.temporal_ratio * patch[0])

    @property
    def interrupt(self) -> bool:
        """Whether the run should end before its next step; a callback sets `_interrupt`."""
        return self._interrupt

    def text(self, length: int | None = None) -> TextConditioner:
        """The text encoder with its tokenizer; every prompt has `length` tokens, default the backbone's own."""
        return family_of(self.transformer).text_class(self.tokenizer, self.text_encoder, length)

    def schedule(self, shift: float | None = None, sampler: Sampler = CascadeOptions.sampler) -> Schedule:
        """The schedule, or a copy with another shift, or another sampler's."""
        return family_of(self.transformer).schedule_class(self.scheduler).sampled_by(sampler, shift)

    @torch.no_grad()
    def encode_prompt(self, prompt: str | list[str], length: int | None = None) -> Tensor:
        """Embeddings of prompts, B x length x dim; warns about what is cut off a prompt."""
        texts, conditioner = [prompt] if isinstance(prompt, str) else prompt, self.text(length)
        conditioner.warn_of_cuts(texts)
        embeds: Tensor = conditioner(texts).to(self._execution_device)
        return embeds

    @classmethod
    def from_pretrained(
        cls,
        backbone: str | Path,
        vluer: str | Path | BaseVLUer | None = None,
        experts: str | Path | Mapping[str, str | Path] | None = None,
        refiner: str | Path | nn.Module | None = None,
        torch_dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        shift: float | None = None,
        attention: Attention | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a backbone with its additions, or what `save_pretrained` wrote.

        Args:
            backbone: pipeline folder or hub id.
            vluer: folder of a saved VLUer of any class; see `load_vluer`.
            experts: folder with one folder per expert (lfe/ and hfe/, as training exports them), or folders by the
                experts' names. None uses those saved with the pipeline, {} none.
            refiner: the third stage's transformer: a folder written by its `save_pretrained`, a file, or a backbone.
            torch_dtype: dtype of the transformers' and the text encoder's weights; float32 when None. The VAE and
                the VLUer stay float32, as in Wan's own examples. A mapping from components to dtypes ("default"
                for the others) overrides this.
            shift: shift of the schedule; None keeps the backbone's. LuVe, and Wan at 720p, use 5, Wan at 480p 3.
            attention: replaces the self-attention of the third stage's transformer, whatever it and its experts were
                trained with. None keeps what is saved with it, and refuses experts of another one.
            kwargs: options of diffusers' `from_pretrained`, for instance components themselves (`transformer` may be
                given as `refiner` is), or `dtype`, its newer name for `torch_dtype`.

        Raises:
            FileNotFoundError: when something is missing.
            ValueError: when parts do not fit together.
        """
        dtypes, local = dtypes_of(kwargs.pop("dtype", torch_dtype)), is_local(backbone)
        parts = load_parts(backbone, vluer, refiner, dtypes, kwargs)
        with loading(backbone, "components"):
            pipeline = super().from_pretrained(str(backbone), dtype=dtypes, local_files_only=local, **parts)
        check_fit(latent_space_of(pipeline.vae), pipeline.text(), pipeline.transformer, pipeline.refiner)
        schedule = family_of(pipeline.transformer).schedule_class(pipeline.scheduler, backbone)
        if shift is not None:
            pipeline.scheduler = schedule.shifted(shift).scheduler
        for folder in ("transformer", "refiner"):
            if folder not in parts and getattr(pipeline, folder) is not None:  # diffusers has loaded it
                load_branches(denoiser_of(getattr(pipeline, folder)), backbone, folder)
        if attention is not None:
            denoiser_of(pipeline.refinement_transformer).use_attention(attention)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        own = Path(backbone) / EXPERTS
        if experts is None and local and own.is_dir():
            experts = own
        for name, expert in expert_folders(experts).items():
            load_expert(pipeline.refinement_transformer, expert, name, any_attention=attention is not None)
        switch_expert(pipeline.refinement_transformer, None)
        return pipeline

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write everything that `from_pretrained` reads back, bit for bit, with the experts in folders of their own.

        Without its experts/, the folder is a diffusers pipeline folder; an expert's folder is in PEFT's format.

        Raises:
            ValueError: while LoRAs are loaded, which would come back as experts or not at all.
        """
        for part in self.transformers:
            if loras := plain_loras(part):
                raise ValueError(
                    f"the LoRA {loras[0]!r} is loaded, which a saved pipeline does not keep: unload it first"
                )
        folder, transformer = Path(save_directory), self.refinement_transformer
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        with saving(folder) as new:
            with experts_set_aside(transformer), ExitStack() as aside:
                for name in ("transformer", "refiner"):
                    if getattr(self, name) is not None:
                        denoiser = denoiser_of(getattr(self, name))
                        save_branches(denoiser, new / name)  # first: diffusers may push the folder to the hub
                        aside.enter_context(branches_set_aside(denoiser))
                super().save_pretrained(str(new), **kwargs)
            for name in expert_names(transformer):
                save_expert(transformer, name, new / EXPERTS / name)
            if (folder / EXPERTS).is_dir():  # an earlier save's, some of which may be gone now
                (new / EXPERTS).mkdir(exist_ok=True)
        if (folder / EXPERTS).is_dir() and not expert_names(transformer):
            shutil.rmtree(folder / EXPERTS)

    def apply(self, options: SpeedOptions) -> None:
        """Apply options of speed and memory; see `apply_speed`."""
        apply_speed(self, options)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        options: CascadeOptions | None = None,
        *,
        motion_num_frames: int | None = None,
        experts: Experts = "all",
        with_refiner: bool = False,
        output_type: VideoType = "np",
        keep_stages: bool = False,
        callback_on_stage_start: StageStart | None = None,
        callback_on_stage_end: StageEnd | None = None,
        return_dict: bool = True,
        **more: Any,
    ) -> LuVePipelineOutput | tuple[Any, ...]:
        """Run the cascade or, with `cascade=False`, a single stage at full size, like UltraWan.

        Args:
            prompt: one, or one for each video.
            options: options of the video.
            motion_num_frames: frames of the first stage; default those of the video.
            experts: see `refine`.
            with_refiner: run the single stage at full size with the refiner instead of the first transformer.
            output_type: see `decode`.
            keep_stages: also return every stage's latents.
            callback_on_stage_start: called with a stage and its number of denoising steps. If it returns latents,
                the stage is not run and they are used instead.
            callback_on_stage_end: called with a stage and its latents.
            return_dict: False returns the frames in a tuple.
            more: fields of CascadeOptions that differ from `options`, and RunOptions.

        Raises:
            ValueError: for impossible options, before anything is computed.
        """
        options = _options(options, more).resolved(self.size_rules)
        cascade, steps, refinement = options.cascade, options.steps, options.refined_by
        refiner = self.refinement_transformer
        motion = (motion_num_frames or options.num_frames, *options.motion[1:])
        model = refiner if cascade or with_refiner else self.transformer
        check_size(self, model, options.size)
        check_training(model, refinement.trained if cascade else None)
        if cascade:
            check_size(self, self.transformer, motion, "motion_")
            if check_method(self, options.method).model == "vluer":
                self.vluer.check_grids(self.codec.latent_size(*motion), self.codec.latent_size(*options.size))
            refinement.check(self, options)
        check_output_type(output_type)
        choose = chooser(self, model, experts, options.handover)
        run = begin(
            self, prompt, cascade and options.refining.scale > 1, steps=steps, guidance=options.guidance,
            shift=options.shift, sampler=options.sampler, length=options.length, **more,
        )  # fmt: skip
        stages: dict[str, Tensor] = {}

        def stage(name: Stage, steps: int, make: Callable[[], Tensor]) -> Tensor:
            found = None if callback_on_stage_start is None else callback_on_stage_start(name, steps)
            latents = make() if found is None else found.to(self._execution_device)
            if keep_stages:
                stages[name] = latents
            if callback_on_stage_end is not None:
                callback_on_stage_end(name, latents)
            return latents

        if cascade:
            low = stage("motion", steps, lambda: from_noise(self, "motion", self.transformer, motion, run))
            size = options.num_frames, options.height, options.width
            latents = stage("upsampled", 0, lambda: upsample(self, low, size[1:], size[0], options.method))
            run.guidance, skip = options.refining, options.skip_steps
            given = RefinementRun(self, latents, low, skip, choose, run)
            latents = stage("refined", refinement.steps(steps, skip), lambda: refinement(given))
        else:
            latents = stage("direct", steps, lambda: from_noise(self, "direct", model, options.size, run, choose))
        frames = decode(self, latents, output_type)
        if not return_dict:
            return (frames,)
        return LuVePipelineOutput(frames, stages if keep_stages else None, run.record)


def _options(options: CascadeOptions | None, more: dict[str, Any]) -> CascadeOptions:
    """Options, with the fields among `more` moved into them."""
    changes = {field.name: more.pop(field.name) for field in fields(CascadeOptions) if field.name in more}
    for name in ("guidance", "refine_guidance"):
        if changes.get(name) is not None:
            changes[name] = Guidance.of(changes[name])
    return CascadeOptions(**changes) if options is None else replace(options, **changes)
