"""The cascade and its stages."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from diffusers.callbacks import PipelineCallback
from PIL import Image
from torch import Tensor

from luve_lightning.cascade import ExpertUse, Guidance, LuVePipeline
from luve_lightning.cascade.stages import decode, generate_motion, refine, upsample
from luve_lightning.cascade.upsampling import LooseModels, upsampling_methods
from luve_lightning.functional.interpolation import interpolate_latents
from luve_lightning.models.backbones import latent_space_of
from tests.helpers.tiny_luve import EXPERTS, PLAIN, PROMPT, SMALL, noise, seeded, tiny_luve

LARGE = {"height": 64, "width": 96, "num_frames": 5}
RUN = {**LARGE, "steps": 4, "skip_steps": 1, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipeline(tiny_backbone: Path) -> LuVePipeline:
    """With a refiner, and experts in it."""
    return tiny_luve(tiny_backbone, EXPERTS, refiner=True)


def wan(pipeline: LuVePipeline) -> WanPipeline:
    names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    other = WanPipeline(**{name: getattr(pipeline, name) for name in names})
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.parametrize("scale", [5.0, 1.0])
@pytest.mark.parametrize("prompts", [PROMPT, [PROMPT, "text", "calm water"]])
def test_motion_is_wans_to_the_bit(pipeline: LuVePipeline, scale: float, prompts: Any) -> None:
    options = {**SMALL, "negative_prompt": "text"}
    want = wan(pipeline)(
        prompts, guidance_scale=scale, generator=seeded(), output_type="latent", num_inference_steps=3,
        max_sequence_length=16, **options,
    ).frames  # fmt: skip
    options |= {"steps": 3, "length": 16}
    got = generate_motion(pipeline, prompts, guidance=scale, generator=seeded(), **options)
    assert torch.equal(got, want)
    assert got.shape == (1 if prompts == PROMPT else 3, 16, 2, 4, 6)
    assert not torch.equal(got, generate_motion(pipeline, prompts, guidance=2.0, generator=seeded(), **options))
    assert not torch.equal(got, generate_motion(pipeline, prompts, guidance=scale, generator=seeded(1), **options))


def test_motion_is_wans_in_bfloat16_beside_experts_and_from_given_noise(tiny_backbone: Path) -> None:
    pipeline = tiny_luve(tiny_backbone, EXPERTS)
    pipeline.transformer.to(torch.bfloat16)
    latents = noise(1, 16, 2, 4, 6)
    clean = tiny_luve(tiny_backbone)
    clean.transformer.to(torch.bfloat16)
    options = {"num_inference_steps": 3, "max_sequence_length": 16, "latents": latents}
    want = wan(clean)(PROMPT, output_type="latent", **SMALL, **options).frames
    got = generate_motion(pipeline, PROMPT, **SMALL, steps=3, length=16, noise=latents)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_stage_by_stage_is_all_at_once_and_twice_the_same(pipeline: LuVePipeline) -> None:
    once = pipeline(PROMPT, **RUN, generator=seeded(), keep_stages=True)
    again = pipeline(PROMPT, **RUN, generator=seeded())
    assert torch.equal(once.frames, again.frames)
    assert once.experts_used == again.experts_used
    generator, options = seeded(), {"steps": 4}
    motion = generate_motion(pipeline, PROMPT, **SMALL, generator=generator, **options)
    upsampled = upsample(pipeline, motion, (64, 96))
    record: list[ExpertUse] = []
    refined = refine(pipeline, upsampled, PROMPT, skip_steps=1, generator=generator, record=record, **options)
    for name, latents in (("motion", motion), ("upsampled", upsampled), ("refined", refined)):
        assert torch.equal(once.stages[name], latents), name
    assert torch.equal(once.frames, refined)
    assert record == [use for use in once.experts_used if use.stage == "refined"]
    assert [use.expert for use in once.experts_used] == [None] * 4 + ["lfe", "hfe", "hfe"]
    assert not torch.equal(once.frames, pipeline(PROMPT, **RUN, generator=seeded(1)).frames)


def test_refinement_written_out(pipeline: LuVePipeline) -> None:
    """Noise to the sigma after the skipped steps, then UniPC with guidance and the step's expert."""
    latents = noise(1, 16, 2, 4, 6, seed=3)
    got = refine(pipeline, latents, PROMPT, skip_steps=2, steps=5, generator=seeded(), guidance=3.0)
    scheduler, net = pipeline.scheduler, pipeline.refiner
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    sigma = scheduler.sigmas[2]
    x = (1 - sigma) * latents + sigma * noise(*latents.shape)
    cond, uncond = (pipeline.encode_prompt(text, 16) for text in (PROMPT, ""))
    with torch.no_grad():
        for t in scheduler.timesteps[2:]:
            net.set_adapter("lfe" if t >= 875 else "hfe")
            v, other = (net(x, t.expand(1), e, return_dict=False)[0] for e in (cond, uncond))
            x = scheduler.step(other + 3.0 * (v - other), t, x, return_dict=False)[0]
    assert torch.equal(got, x)


def test_refinement_by_euler_written_out(pipeline: LuVePipeline) -> None:
    """DiffSynth-Studio's levels and steps; the expert is that of the timestep before bfloat16 rounds it."""
    latents = noise(1, 16, 2, 4, 6, seed=3)
    options = {"skip_steps": 2, "steps": 5, "guidance": 3.0, "shift": 4.0}
    got = refine(pipeline, latents, PROMPT, generator=seeded(), sampler="euler", **options)
    sigmas, net = torch.linspace(1, 0, 6), pipeline.refiner
    sigmas = 4.0 * sigmas / (1 + 3.0 * sigmas)
    x = (1 - sigmas[2]) * latents + sigmas[2] * noise(*latents.shape)
    cond, uncond = (pipeline.encode_prompt(text, 16) for text in (PROMPT, ""))
    with torch.no_grad():
        for sigma, following in pairwise(sigmas[2:]):
            net.set_adapter("lfe" if 1000 * sigma >= 875 else "hfe")
            t = (1000 * sigma).bfloat16().float().expand(1)
            v, other = (net(x, t, e, return_dict=False)[0] for e in (cond, uncond))
            x = x + (other + 3.0 * (v - other)) * (following - sigma)
    assert torch.equal(got, x)
    assert not torch.equal(got, refine(pipeline, latents, PROMPT, generator=seeded(), **options))


def test_skipping_every_step_leaves_the_latents_as_they_are(pipeline: LuVePipeline) -> None:
    latents, generator = noise(1, 16, 2, 4, 6), seeded()
    options = {"steps": 4, "generator": generator}
    assert torch.equal(refine(pipeline, latents, PROMPT, skip_steps=4, **options), latents)
    assert torch.equal(torch.randn(3, generator=generator), noise(3))  # nothing was drawn
    whole = pipeline(PROMPT, **RUN | {"skip_steps": 4}, keep_stages=True, generator=seeded())
    assert torch.equal(whole.frames, whole.stages["upsampled"])
    assert len(whole.experts_used) == 4


def test_skipping_no_step_starts_from_noise_alone(pipeline: LuVePipeline) -> None:
    options = {"steps": 3, "experts": "none"}
    for latents in (noise(1, 16, 2, 4, 6, seed=8), 100 * noise(1, 16, 2, 4, 6, seed=9)):
        got = refine(pipeline, latents, PROMPT, skip_steps=0, generator=seeded(), **options)
        direct = {"cascade": False, "with_refiner": True, "output_type": "latent"}
        want = pipeline(PROMPT, **SMALL, **direct, generator=seeded(), **options).frames
        assert torch.equal(got, want)


@pytest.mark.parametrize("refiner", [False, True])
def test_untrained_experts_change_no_bit(tiny_backbone: Path, refiner: bool) -> None:
    without = tiny_luve(tiny_backbone, refiner=refiner)(PROMPT, **RUN, generator=seeded())
    untrained = tiny_luve(tiny_backbone, EXPERTS, trained=False, refiner=refiner)
    fresh = untrained(PROMPT, **RUN, generator=seeded())
    assert torch.equal(without.frames, fresh.frames)
    assert [use.expert for use in without.experts_used] == [None] * 7
    assert [use.expert for use in fresh.experts_used] == [None] * 4 + ["lfe", "hfe", "hfe"]
    trained = tiny_luve(tiny_backbone, EXPERTS, refiner=refiner)
    assert torch.equal(trained(PROMPT, **RUN, generator=seeded(), experts="none").frames, without.frames)


@pytest.mark.slow
def test_every_ablation_of_the_experts_gives_another_video(tiny_backbone: Path) -> None:
    videos = []
    for experts in (EXPERTS, PLAIN):
        pipeline = tiny_luve(tiny_backbone, experts)
        for choice in ("all", "lfe", "hfe"):
            output = pipeline(PROMPT, **RUN, experts=choice, generator=seeded(), keep_stages=True)
            videos.append(output.frames)
            motion = output.stages["motion"]  # one transformer serves both stages here
            assert torch.equal(motion, generate_motion(pipeline, PROMPT, **SMALL, steps=4, generator=seeded()))
    moved = tiny_luve(tiny_backbone, EXPERTS)(PROMPT, **RUN, switch=0.7, generator=seeded())
    assert [use.expert for use in moved.experts_used[4:]] == ["lfe", "lfe", "hfe"]
    videos.append(moved.frames)
    for i, video in enumerate(videos):
        assert all((video - other).abs().max() > 1e-3 for other in videos[:i])


@pytest.mark.parametrize("frames", [5, 9])
@pytest.mark.parametrize("method", ["vluer", "latent", "rgb"])
def test_upsampling(pipeline: LuVePipeline, method: Any, frames: int) -> None:
    latents, target = noise(1, 16, 2, 4, 6), ((frames - 1) // 4 + 1, 6, 8)
    got = upsample(pipeline, latents, (48, 64), None if frames == 5 else frames, method)
    with torch.no_grad():
        want = {
            "vluer": lambda: pipeline.vluer(latents, target),
            "latent": lambda: interpolate_latents(latents, target, "bilinear"),
            "rgb": lambda: upsampling_methods()["rgb_bicubic"](
                latents, target, LooseModels(latent_space_of(pipeline.vae))
            ),
        }[method]()
    assert got.shape == (1, 16, *target)
    assert torch.equal(got, want)
    assert got.dtype == torch.float32


def test_the_cascade_upsamples_as_it_is_told(pipeline: LuVePipeline) -> None:
    options = RUN | {"steps": 1, "guidance": 1.0, "num_frames": 9, "motion_num_frames": 5}
    for method in ("latent", "rgb"):
        stages = pipeline(
            PROMPT,
            **options,
            motion_height=48,
            motion_width=64,
            upsampling=method,
            keep_stages=True,
            generator=seeded(),
        ).stages
        assert stages["motion"].shape == (1, 16, 2, 6, 8)
        assert torch.equal(stages["upsampled"], upsample(pipeline, stages["motion"], (64, 96), 9, method))
        assert stages["refined"].shape == (1, 16, 3, 8, 12)


def test_without_a_cascade(pipeline: LuVePipeline, tiny_backbone: Path) -> None:
    options = {**SMALL, "steps": 3, "generator": seeded()}
    output = pipeline(PROMPT, cascade=False, output_type="latent", keep_stages=True, **options)
    assert set(output.stages) == {"direct"}
    assert {(use.stage, use.expert) for use in output.experts_used} == {("direct", None)}
    motion = generate_motion(pipeline, PROMPT, **options | {"generator": seeded()})
    assert torch.equal(output.frames, motion)
    shared = tiny_luve(tiny_backbone, EXPERTS)
    output = shared(PROMPT, cascade=False, output_type="latent", **options | {"generator": seeded()})
    assert [use.expert for use in output.experts_used] == ["lfe", "lfe", "hfe"]
    assert not torch.equal(output.frames, motion)
    given = options | {"generator": None, "experts": "none", "noise": noise(1, 16, 2, 4, 6)}
    alone = shared(PROMPT, cascade=False, output_type="latent", **given).frames
    assert torch.equal(alone, motion)


def test_output_types(pipeline: LuVePipeline) -> None:
    options = RUN | {"steps": 1, "guidance": 1.0, "generator": seeded()}
    latents = pipeline(PROMPT, **options).frames
    video = latent_space_of(pipeline.vae).decode(latents)
    array = pipeline(PROMPT, **options | {"output_type": "np", "generator": seeded()}).frames
    assert isinstance(array, np.ndarray)
    assert array.shape == (1, 5, 64, 96, 3)
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, (video.permute(0, 2, 3, 4, 1).numpy() + 1) / 2, atol=1e-6)
    pixels = decode(pipeline, latents, "pt")
    np.testing.assert_array_equal(pixels.permute(0, 1, 3, 4, 2).numpy(), array)
    pictures = decode(pipeline, latents, "pil")
    assert isinstance(pictures[0][4], Image.Image)
    assert pictures[0][4].size == (96, 64)
    assert decode(pipeline, latents, "latent") is latents
    (tupled,) = pipeline(PROMPT, **options | {"generator": seeded()}, return_dict=False)
    assert torch.equal(tupled, latents)


def test_embeddings_instead_of_prompts(pipeline: LuVePipeline) -> None:
    prompts, negative = [PROMPT, "calm water", "text"], "slowly"
    want = pipeline(prompts, **RUN, negative_prompt=negative, generator=seeded()).frames
    embeds, negatives = (pipeline.encode_prompt(texts, 16) for texts in (prompts, [negative] * 3))
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negatives}
    assert torch.equal(pipeline(**RUN, **given, generator=seeded()).frames, want)
    encoder, pipeline.text_encoder = pipeline.text_encoder, None
    try:
        assert torch.equal(pipeline(**RUN, **given, generator=seeded()).frames, want)
    finally:
        pipeline.text_encoder = encoder


def test_each_sample_of_a_batch_is_its_own(pipeline: LuVePipeline) -> None:
    prompts = [PROMPT, "calm water", "text"]
    options = RUN | {"guidance": Guidance(3.0, 0.5, 0.95, batched=True)}
    together = pipeline(prompts, **options, generator=[seeded(i) for i in range(3)]).frames
    for i, prompt in enumerate(prompts):
        alone = pipeline(prompt, **options, generator=[seeded(i)]).frames
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-4, rtol=1e-3)


def test_guidance_of_the_refinement_alone(pipeline: LuVePipeline) -> None:
    """The negative prompt is encoded even where only the last stage is guided."""
    output = pipeline(PROMPT, **RUN, guidance=1.0, refine_guidance=4.0, keep_stages=True, generator=seeded())
    generator, options = seeded(), {"steps": 4}
    motion = generate_motion(pipeline, PROMPT, **SMALL, guidance=1.0, generator=generator, **options)
    assert torch.equal(output.stages["motion"], motion)
    upsampled = output.stages["upsampled"]
    refined = refine(pipeline, upsampled, PROMPT, skip_steps=1, guidance=4.0, generator=generator, **options)
    assert torch.equal(output.frames, refined)


def test_callbacks(pipeline: LuVePipeline) -> None:
    starts: list[tuple[str, int]] = []
    ends: dict[str, Tensor] = {}
    steps: list[tuple[int, int]] = []

    def on_step(pipe: LuVePipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert pipe is pipeline
        assert set(tensors) == {"latents", "prompt_embeds"}
        steps.append((step, int(timestep)))
        return tensors

    output = pipeline(
        PROMPT,
        **RUN,
        generator=seeded(),
        keep_stages=True,
        callback_on_stage_start=lambda stage, count: starts.append((stage, count)),
        callback_on_stage_end=ends.__setitem__,
        callback_on_step_end=on_step,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert starts == [("motion", 4), ("upsampled", 0), ("refined", 3)]
    assert list(ends) == list(output.stages) == ["motion", "upsampled", "refined"]
    assert all(torch.equal(ends[name], output.stages[name]) for name in ends)
    assert steps == [(0, 999), (1, 937), (2, 833), (3, 625), (0, 937), (1, 833), (2, 625)]


class Stop(PipelineCallback):
    """diffusers' kind of callback, which names its tensors itself."""

    tensor_inputs = ["latents"]  # noqa: RUF012

    def callback_fn(self, pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipeline._interrupt = step == 1
        return tensors


def test_diffusers_callbacks_and_interrupting(pipeline: LuVePipeline) -> None:
    record: list[ExpertUse] = []
    options = {"steps": 4, "generator": seeded(), "record": record}
    generate_motion(pipeline, PROMPT, **SMALL, **options, callback_on_step_end=Stop())
    assert [use.step for use in record] == [0, 1]
    generate_motion(pipeline, PROMPT, **SMALL, **options)  # the next run is not interrupted
    assert len(record) == 6


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"height": 200}, "^height 200: expected a multiple of 16, nearest are 192 and 208"),
    ({"width": 8}, "^width 8: expected a multiple of 16"),
    ({"motion_height": 40}, "^motion_height 40: expected a multiple of 16, nearest are 32 and 48"),
    ({"num_frames": 7}, r"^num_frames 7: expected 4k \+ 1, nearest are 5 and 9"),
    ({"skip_steps": 5}, "steps 4 and skip_steps 5: expected at least 1 step, and 0 to all skipped"),
    ({"skip_steps": -1}, "steps 4 and skip_steps -1: expected"),
    ({"steps": 0}, "steps 0 and skip_steps 1: expected at least 1 step"),
    ({"output_type": "mp4"}, "output_type: expected one of latent, np, pt, pil, got 'mp4'"),
    ({"upsampling": "cubic"}, "upsampling: expected one of .*nearest, bilinear, bicubic, latent, .*vluer, got 'cubic'"),
    ({"experts": "x"}, "no expert 'x'"),
    ({"switch": 2.0}, "switch: expected a sigma between 0 and 1, got 2.0"),
    ({"guidance": 0.0}, "guidance scale 0.0"),
    ({"refine_guidance": 0.0}, "guidance scale 0.0"),
    ({"prompt_embeds": torch.zeros(1, 16, 16)}, "expected either prompt or prompt_embeds, got both"),
    ({"prompt": None}, "expected prompt or prompt_embeds, got neither"),
    ({"callback_on_step_end_tensor_inputs": ["x"]}, "callback_on_step_end_tensor_inputs"),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE)
def test_what_is_impossible_is_refused_before_anything_is_computed(
    pipeline: LuVePipeline, changes: dict[str, Any], message: str
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a stage was begun")

    options = {"prompt": PROMPT, "callback_on_stage_start": never} | RUN | changes
    with pytest.raises(ValueError, match=message) as error:
        pipeline(**options)
    assert "\n" not in str(error.value)


def test_stages_refuse_what_is_impossible(pipeline: LuVePipeline, tiny_backbone: Path) -> None:
    latents = noise(1, 16, 2, 4, 6)
    for action, message in (
        (lambda: refine(pipeline, latents[0], PROMPT), "latents must be B x 16 x t x h x w"),
        (lambda: refine(pipeline, latents[..., :5], PROMPT), "latent width 5: the transformer takes multiples of 2"),
        (lambda: refine(pipeline, latents, [PROMPT] * 2), "2 prompts for 1 latents"),
        (lambda: refine(pipeline, latents, PROMPT, generator=[seeded()] * 2), "2 generators for 1 prompts"),
        (lambda: generate_motion(pipeline, PROMPT, **SMALL, noise=latents[:, :, :1]), "latents to start from have"),
        (lambda: upsample(pipeline, latents, (44, 48)), "height 44: expected a multiple of 16, nearest are 32 and 48"),
        (lambda: generate_motion(pipeline, PROMPT, height=40, width=48, num_frames=5), "height 40: expected"),
        (lambda: generate_motion(pipeline, PROMPT, height=48, width=48, num_frames=6), "num_frames 6: expected"),
        (lambda: upsample(tiny_luve(tiny_backbone, vluer=None), latents, (64, 96)), "the pipeline has no VLUer"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            action()
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidance_scale'"):
        generate_motion(pipeline, PROMPT, **SMALL, guidance_scale=3.0)
