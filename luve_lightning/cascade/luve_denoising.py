"""LuVePipeline's denoising: prompts and options to what a run needs, and latents through the schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from luve_lightning.cascade.denoise import DenoisingStep, Tensors, denoise
from luve_lightning.cascade.expert_choice import Experts, expert_chooser
from luve_lightning.cascade.luve_latents import LuVeLatents
from luve_lightning.cascade.luve_run import ExpertUse, Run, Stage
from luve_lightning.cascade.options import CascadeOptions, Guidance
from luve_lightning.functional.flow_matching import noised
from luve_lightning.models.backbones import TextConditioner, family_of

Chooser = Callable[[float], str | None] | None


class LuVeDenoising(LuVeLatents):
    """What the stages that denoise share; see LuVeComponents for the rest."""

    def _begin(
        self,
        prompt: str | list[str] | None,
        also_guided: bool = False,
        *,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        steps: int = CascadeOptions.steps,
        guidance: Guidance | float | None = None,
        shift: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ("latents",),
        length: int | None = None,
        record: list[ExpertUse] | None = None,
    ) -> Run:
        """Check the options and encode the prompts; `also_guided` if a later stage needs the negative prompt."""
        for name, text, embeds in (
            ("prompt", prompt, prompt_embeds),
            ("negative_prompt", negative_prompt, negative_prompt_embeds),
        ):
            if text is not None and embeds is not None:
                raise ValueError(f"expected either {name} or {name}_embeds, got both")
        check_steps(steps, 0)
        guidance = Guidance() if guidance is None else Guidance.of(guidance)
        if self.context_parallel_degree > 1 and generator is None:
            raise ValueError(
                "context parallelism needs a generator of the same seed on every process: their noise would differ"
            )
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        inputs = list(callback_on_step_end_tensor_inputs)
        step = self.size_rules.step  # sizes were checked already
        self.check_inputs(prompt, negative_prompt, step, step, prompt_embeds, negative_prompt_embeds, inputs)
        self._guidance_scale, self._attention_kwargs = guidance.scale, attention_kwargs
        self._current_timestep, self._interrupt = None, False
        if self.text_encoder is not None:
            text = self.text(length)
            text.warn_of_cuts(_texts(prompt, negative_prompt))
            length = text.length
        embeds, negative_embeds = self.encode_prompt(
            prompt,
            negative_prompt,
            guidance.scale > 1 or also_guided,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=length,
            device=self._execution_device,
        )
        if isinstance(generator, list) and len(generator) != len(embeds):
            raise ValueError(
                f"{len(generator)} generators for {len(embeds)} prompts: expected one, or one for each"
            )
        return Run(
            embeds, negative_embeds, guidance, steps, self._schedule(shift), generator, attention_kwargs,
            callback_on_step_end, inputs, [] if record is None else record,
        )  # fmt: skip

    def _schedule(self, shift: float | None) -> Any:
        """The scheduler, or one of another shift."""
        if shift is None:
            return self.scheduler
        return type(self.scheduler).from_config(self.scheduler.config, flow_shift=shift)

    def text(self, length: int | None = None) -> TextConditioner:
        """The text encoder with its tokenizer; tokens of every prompt are `length`, or the backbone's own when None."""
        return family_of(self.transformer).text_class(self.tokenizer, self.text_encoder, length)

    def _from_noise(
        self,
        stage: Stage,
        size: tuple[int, int, int],
        run: Run,
        latents: Tensor | None = None,
        model: WanTransformer3DModel | None = None,
        choose: Chooser = None,
    ) -> Tensor:
        """Latents of a video of this size (frames, height, width in pixels), from pure noise."""
        frames, height, width = size
        model, device = model or self.transformer, self._execution_device
        run.scheduler.set_timesteps(run.steps, device=device)
        channels = model.config.in_channels
        shape = (len(run.embeds), channels, *self.codec.latent_size(*size))
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(
                f"latents to start from have shape {tuple(latents.shape)}, this video's are {shape}"
            )
        latents = self.prepare_latents(
            len(run.embeds), channels, height, width, frames, torch.float32, device, run.generator, latents
        )
        return self._denoised(stage, model, latents, run, choose=choose)

    def _refined(self, latents: Tensor, skip: int, choose: Chooser, run: Run) -> Tensor:
        if skip == run.steps:
            return latents
        device = self._execution_device
        run.scheduler.set_timesteps(run.steps, device=device)
        noise = randn_tensor(latents.shape, run.generator, device, torch.float32)
        # The first of UniPC's sigmas is 1 - 1e-6, of which the latents would be a millionth.
        x = noise
        if skip:
            x = noised(latents.to(device, torch.float32), noise, run.scheduler.sigmas[skip].to(device))
        return self._denoised("refined", self.refinement_transformer, x, run, skip, choose)

    def _denoised(
        self,
        stage: Stage,
        model: WanTransformer3DModel,
        latents: Tensor,
        run: Run,
        first: int = 0,
        choose: Chooser = None,
    ) -> Tensor:
        timesteps = run.scheduler.timesteps[first:]
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=len(timesteps)) as bar:
            bar.set_description(stage)

            def on_step(step: DenoisingStep, tensors: Tensors) -> Tensors | None:
                run.record.append(ExpertUse(stage, step.step, step.timestep, step.sigma, step.expert))
                bar.update()
                if run.callback is None:
                    return None
                given = {name: tensors.get(name) for name in run.callback_inputs}
                return run.callback(self, step.step - first, timesteps[step.step - first], given)

            latents = denoise(
                model,
                run.scheduler,
                latents,
                timesteps,
                run.embeds,
                run.negative_embeds,
                run.guidance,
                begin_index=first,
                choose_expert=choose,
                on_step=on_step,
                interrupted=lambda: bool(self.interrupt),
                attention_kwargs=run.attention_kwargs,
            )
        self.maybe_free_model_hooks()
        return latents

    def _chooser(self, model: WanTransformer3DModel, experts: Experts, switch: float | None) -> Chooser:
        return expert_chooser(model, experts, switch, self.scheduler.config.num_train_timesteps)


def _texts(*given: str | list[str] | None) -> list[str]:
    """Every text of some that are one, several or none."""
    return [
        text for some in given if some is not None for text in ([some] if isinstance(some, str) else some)
    ]


def check_steps(steps: int, skip: int) -> None:
    """Refuse a schedule without steps, and skipping what it does not have."""
    if int(steps) != steps or steps < 1:
        raise ValueError(f"steps {steps}: expected an integer >= 1")
    if int(skip) != skip or not 0 <= skip <= steps:
        raise ValueError(f"skip_steps {skip}: expected 0 to {steps}, the number of steps")
