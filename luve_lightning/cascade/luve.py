"""LuVe's three-stage cascade as a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Unpack

import torch
from torch import Tensor

from luve_lightning.cascade.expert_choice import Experts
from luve_lightning.cascade.luve_denoising import LuVeDenoising, check_steps
from luve_lightning.cascade.luve_run import LuVePipelineOutput, RunOptions, Stage, VideoType
from luve_lightning.cascade.options import CascadeOptions, Guidance

StageStart = Callable[[Stage, int], Tensor | None]
StageEnd = Callable[[Stage, Tensor], None]


class LuVePipeline(LuVeDenoising):
    """Text to video at high resolution by LuVe (arXiv 2602.11564).

    1. `generate_motion`: Wan2.1 as it is, at a low resolution.
    2. `upsample`: the VLUer brings the latents to the final size.
    3. `refine`: noise of a middle level is added and removed again at full resolution, by the low-frequency expert
       first and the high-frequency expert then.

    Each takes latents and returns latents; calling the pipeline runs all three and decodes.

    Example:
        >>> pipeline = LuVePipeline.from_pretrained("data/mini/wan", "data/mini/vluer")  # doctest: +SKIP
        >>> output = pipeline("a red circle", height=192, width=192, num_frames=17)  # doctest: +SKIP
        >>> export_to_video(output.frames[0], "circle.mp4")  # doctest: +SKIP
    """

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
        """Run the cascade, or with `cascade=False` a single stage at full size (see `generate_direct`).

        Args:
            prompt: one, or one for each video.
            options: how the video is made.
            motion_num_frames: of the first stage; those of the video when None.
            experts: see `refine`.
            with_refiner: see `generate_direct`.
            output_type: see `decode`.
            keep_stages: return every stage's latents, too.
            callback_on_stage_start: called with a stage and its number of denoising steps. Latents that it returns are
                taken as the stage's, which is not run then.
            callback_on_stage_end: called with a stage and its latents.
            return_dict: False returns the frames in a tuple.
            more: fields of CascadeOptions that differ from `options`, and RunOptions.

        Raises:
            ValueError: for what is impossible, before anything is computed.
        """
        options = _options(options, more).resolved(self.size_rules)
        cascade, steps = options.cascade, options.steps
        refiner = self.refinement_transformer
        motion = (motion_num_frames or options.num_frames, *options.motion[1:])
        model = refiner if cascade or with_refiner else self.transformer
        self.check_size(model, options.size)
        if cascade:
            self.check_size(self.transformer, motion, "motion_")
            self.check_upsampling(options.method)
        self.check_output_type(output_type)
        choose = self._chooser(model, experts, options.switch)
        run = self._begin(
            prompt, cascade and options.refining.scale > 1, steps=steps, guidance=options.guidance,
            shift=options.shift, length=options.length, **more,
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
            latents = stage("motion", steps, lambda: self._from_noise("motion", motion, run))
            size = options.num_frames, options.height, options.width
            latents = stage("upsampled", 0, lambda: self.upsample(latents, size[1:], size[0], options.method))
            run.guidance, skip = options.refining, options.skip_steps
            latents = stage("refined", steps - skip, lambda: self._refined(latents, skip, choose, run))
        else:
            latents = stage(
                "direct", steps, lambda: self._from_noise("direct", options.size, run, None, model, choose)
            )
        frames = self.decode(latents, output_type)
        if not return_dict:
            return (frames,)
        return LuVePipelineOutput(frames, stages if keep_stages else None, run.record)

    @torch.no_grad()
    def generate_motion(
        self,
        prompt: str | list[str] | None = None,
        *,
        height: int,
        width: int,
        num_frames: int,
        latents: Tensor | None = None,
        **options: Unpack[RunOptions],
    ) -> Tensor:
        """Stage 1, LMG: latents of a video at low resolution, exactly as diffusers' WanPipeline makes them.

        Args:
            prompt: one, or one for each video.
            height: in pixels.
            width: in pixels.
            num_frames: in pixels.
            latents: noise to start from; drawn when None.
            options: see RunOptions.

        Returns:
            Normalised latents, float32, B x C x t x h x w.

        Raises:
            ValueError: for an impossible size, naming the nearest possible ones, and other impossible options.
        """
        self.check_size(self.transformer, (num_frames, height, width))
        return self._from_noise(
            "motion", (num_frames, height, width), self._begin(prompt, **options), latents
        )

    @torch.no_grad()
    def generate_direct(
        self,
        prompt: str | list[str] | None = None,
        *,
        height: int,
        width: int,
        num_frames: int,
        with_refiner: bool = False,
        experts: Experts = "all",
        switch: float | None = None,
        latents: Tensor | None = None,
        **options: Unpack[RunOptions],
    ) -> Tensor:
        """Latents of a video at full size without a cascade, as UltraWan and the paper's row "UHR scaling" do it.

        Args:
            prompt: see `generate_motion`, as `height`, `width`, `num_frames` and `latents`.
            height: in pixels.
            width: in pixels.
            num_frames: in pixels.
            with_refiner: by the third stage's transformer instead of the first's.
            experts: see `refine`; a transformer that has none runs alone.
            switch: see `refine`.
            latents: noise to start from; drawn when None.
            options: see RunOptions.

        Returns:
            Normalised latents, float32, B x C x t x h x w.

        Raises:
            ValueError: for what is impossible.
        """
        model = self.refinement_transformer if with_refiner else self.transformer
        self.check_size(model, (num_frames, height, width))
        choose = self._chooser(model, experts, switch)
        run = self._begin(prompt, **options)
        return self._from_noise("direct", (num_frames, height, width), run, latents, model, choose)

    @torch.no_grad()
    def refine(
        self,
        latents: Tensor,
        prompt: str | list[str] | None = None,
        *,
        skip_steps: int = CascadeOptions.skip_steps,
        experts: Experts = "all",
        switch: float | None = None,
        **options: Unpack[RunOptions],
    ) -> Tensor:
        """Stage 3, HCR: noise latents to the level after `skip_steps` of the schedule's steps, and denoise them.

        Args:
            latents: normalised, B x C x t x h x w.
            prompt: one for each sample.
            skip_steps: LuVe's S. The paper takes 5 of 50, its released checkpoints 10. 0 starts from pure noise, all
                steps leave the latents as they are.
            experts: "all", "none", a name or several. Each step uses the one whose band of sigma holds the
                scheduler's timestep: LuVe's low-frequency expert from timestep 875 on, the high-frequency one below.
            switch: the sigma where their bands meet instead of the one they were saved with.
            options: see RunOptions.

        Returns:
            Normalised latents, float32, the shape of `latents`.

        Raises:
            ValueError: for what is impossible.
        """
        if latents.ndim != 5 or latents.shape[1] != self.vae.config.z_dim:
            raise ValueError(
                f"latents must be B x {self.vae.config.z_dim} x t x h x w, got shape {tuple(latents.shape)}"
            )
        model = self.refinement_transformer
        self.check_tokens(model, (latents.shape[2], latents.shape[3], latents.shape[4]))
        check_steps(options.get("steps", CascadeOptions.steps), skip_steps)
        choose = self._chooser(model, experts, switch)
        run = self._begin(prompt, **options)
        if len(run.embeds) != len(latents):
            raise ValueError(f"{len(run.embeds)} prompts for {len(latents)} latents: expected one for each")
        return self._refined(latents, skip_steps, choose, run)


def _options(options: CascadeOptions | None, more: dict[str, Any]) -> CascadeOptions:
    """Options with the fields among `more`, which are taken out of it."""
    changes = {field.name: more.pop(field.name) for field in fields(CascadeOptions) if field.name in more}
    for name in ("guidance", "refine_guidance"):
        if changes.get(name) is not None:
            changes[name] = Guidance.of(changes[name])
    return CascadeOptions(**changes) if options is None else replace(options, **changes)
