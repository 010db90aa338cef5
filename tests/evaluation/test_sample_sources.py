"""What a training run is judged by: videos that its model makes, and the real ones beside them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from luve_lightning.data.clips import read_clip
from luve_lightning.data.store import StoreError
from luve_lightning.evaluation.sample_sources import GeneratedVideos, UpsampledVideos
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.functional.pixels import fit_frames, video_to_frames
from luve_lightning.models.backbones import TextConditioner, load_backbone
from luve_lightning.models.experts import ExpertConfig, activate
from luve_lightning.models.experts.routing import state_of
from luve_lightning.tasks import BackboneTask
from tests.helpers.sampling import pairs, vluer_task
from tests.helpers.tiny_flow import World
from tests.helpers.tiny_wan import flow_scheduler, randomise

CAPTION = "Coloured squares drift to the left."
NET = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1, "freq_dim": 16}
TEXT = {"d_model": 16, "num_heads": 2, "d_kv": 8, "d_ff": 16, "num_layers": 1, "dropout_rate": 0.0}


@pytest.fixture
def world(held_out_world: World) -> World:
    return held_out_world


def ready(data: Any) -> Any:
    data.setup("fit")
    return data


@torch.no_grad()
def make(source: Any, task: Any, data: Any, indices: tuple[int, ...] = (0,)) -> list[np.ndarray]:
    with source.open(task.eval(), ready(data), nullcontext) as samples:
        return [samples.make(i).frames.numpy() for i in indices]


def by_diffusers(world: World, task: Any, text: TextConditioner, seed: int, guidance: float) -> np.ndarray:
    """The whole pipeline with its own text encoder and VAE, uint8 T x H x W x 3."""
    pipeline = WanPipeline(
        tokenizer=text.tokenizer, text_encoder=text.encoder, transformer=task.transformer,
        vae=load_backbone(world.backbone).vae(), scheduler=flow_scheduler(task.shift),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline(
        prompt=CAPTION, height=16, width=32, num_frames=5, num_inference_steps=3, guidance_scale=guidance,
        max_sequence_length=text.length, generator=torch.Generator().manual_seed(seed), output_type="np",
    ).frames[0]  # fmt: skip
    return (video * 255).round().astype(np.uint8)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_generated_videos_are_diffusers(world: World, guidance: float) -> None:
    """From stored embeddings, decoded by our codec: the frames of the pipeline with everything in it."""
    task = world.adaptation()
    source = GeneratedVideos(16, 32, 5, prompts=[CAPTION] * 2, steps=3, guidance=guidance, seed=7)
    found = make(source, task, world.data(), (1, 0))
    text = load_backbone(world.backbone).text(length=16)
    with torch.no_grad():
        expected = [by_diffusers(world, task, text, seed, guidance) for seed in (8, 7)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (5, 16, 32, 3)
        assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert not np.array_equal(*found), "each has noise of its own"


def test_a_backbone_embeds_prompts_itself(world: World) -> None:
    torch.manual_seed(0)
    task = BackboneTask(
        backbone=world.backbone, index=world.clips / "clips.csv", transformer=dict(NET), text_encoder=dict(TEXT),
        length=9,
    )  # fmt: skip
    source = GeneratedVideos(16, 32, 5, prompts=[CAPTION], steps=3, guidance=4.0)
    [found] = make(source, task, world.data(texts=None))
    with torch.no_grad():
        expected = by_diffusers(world, task, task.text_encoder, 0, 4.0)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_an_expert_acts_in_its_band_only(world: World) -> None:
    task = world.expert(ExpertConfig("attention", 4, 4.0, None, SigmaBand(0.875, 1.0)))
    randomise(task.transformer, "lfe")
    seen: list[tuple[int, bool]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((int(kwargs["timestep"][0]), bool(state_of(module).active)))

    source = GeneratedVideos(16, 32, 5, prompts=[CAPTION], steps=12, guidance=1.0)
    with source.open(task.eval(), ready(world.data()), nullcontext) as samples:
        handle = task.transformer.register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad():
            routed = samples.make(0).frames
        handle.remove()
    assert len(seen) == 12
    assert [acts for _, acts in seen] == [timestep >= 875 for timestep, _ in seen]
    assert 1 < sum(acts for _, acts in seen) < 11
    assert list(state_of(task.transformer).active) == ["lfe"], "training goes on with the expert"

    videos = []
    for band in (SigmaBand(0.0, 1e-6), SigmaBand()):  # nowhere, and everywhere
        state = state_of(task.transformer)
        state.configs["lfe"] = ExpertConfig("attention", 4, 4.0, None, band)
        videos.append(make(source, task, world.data())[0])
    base = world.adaptation()
    [alone] = make(source, base, world.data())
    assert np.array_equal(videos[0], alone)
    assert not np.array_equal(routed.numpy(), videos[0])
    assert not np.array_equal(routed.numpy(), videos[1])


@pytest.mark.parametrize("chosen", [None, "lfe"])
def test_what_was_routed_before_is_routed_after_also_when_it_fails(world: World, chosen: str | None) -> None:
    def fail(*_: Any) -> None:
        raise ArithmeticError

    task = world.expert()
    activate(task.transformer, chosen)
    with GeneratedVideos(16, 32, 5, prompts=[CAPTION], steps=3).open(
        task.eval(), ready(world.data()), nullcontext
    ) as samples:
        task.transformer.register_forward_hook(fail)
        with pytest.raises(ArithmeticError):
            samples.make(0)
    assert list(state_of(task.transformer).active) == ([] if chosen is None else [chosen])


def test_held_out_captions_and_clips_are_the_default(world: World) -> None:
    data = ready(world.data())
    source = GeneratedVideos(32, 32, 5, clips=3)
    with source.open(world.adaptation(), data, nullcontext) as samples:
        assert list(samples.captions) == [CAPTION] * 3
        assert len(set(samples.names)) == len(samples.real_names) == 3
        assert samples.paired
        real = samples.real(1)
    with GeneratedVideos(32, 32, 5, prompts=[CAPTION]).open(world.adaptation(), data, nullcontext) as samples:
        assert not samples.paired, "the clips show something else"
    entry, key = data.datasets["val"].items[1]
    pixels = torch.from_numpy(read_clip(entry.path, key.frames[0], 9))
    assert torch.equal(real, video_to_frames(fit_frames(pixels, (32, 32))))


def test_upsampled_clips_and_their_originals(world: World) -> None:
    task, data = vluer_task(world).eval(), ready(pairs(world))
    with UpsampledVideos(2.0, clips=3).open(task, data, nullcontext) as samples, torch.no_grad():
        made, real = samples.make(2), samples.real(2)
    entry = data.pairs["val"][2]
    low, high = (data.store.read(key).float() for key in (entry.lr_keys[2.0], entry.hr_key))
    with torch.no_grad():
        decoded = task.codec.decode(task.net(low[None], tuple(high.shape[1:])))
    assert torch.equal(made.frames, video_to_frames(decoded)[0])
    original = fit_frames(torch.from_numpy(read_clip(entry.entry.path, 0, 9)), (48, 48))
    assert made.reference is not None
    assert torch.equal(made.reference, video_to_frames(original))
    assert torch.equal(real, made.reference)
    assert samples.fps == 16
    assert len(samples.names) == 3


def test_a_diverged_model_makes_black_frames(world: World) -> None:
    task = vluer_task(world)
    torch.nn.init.constant_(task.net.decoder.conv_out.weight, float("nan"))
    assert make(UpsampledVideos(2.0), task, pairs(world))[0].max() == 0


@pytest.mark.parametrize(
    ("source", "kind", "error", "message"),
    [
        (GeneratedVideos(16, 32, 5), "vluer", ValueError, "GeneratedVideos needs a task that generates"),
        (UpsampledVideos(2.0), "adaptation", ValueError, "UpsampledVideos needs a VLUerTask and latent pairs"),
        (UpsampledVideos(1.5), "vluer", ValueError, "scale 1.5 is none of the data's: 2"),
        (GeneratedVideos(24, 32, 5), "adaptation", ValueError, "latent height 3: the transformer takes multiples"),
        (GeneratedVideos(20, 32, 5), "adaptation", ValueError, "height 20: expected a multiple of 8"),
        (GeneratedVideos(16, 32, 6), "adaptation", ValueError, r"6 frames: expected 4k \+ 1"),
        (GeneratedVideos(16, 32, 5, ["a whale"]), "adaptation", StoreError, 'no embedding of caption "a whale"'),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_told_on_opening(
    world: World, source: Any, kind: str, error: type[Exception], message: str
) -> None:
    vluer = kind == "vluer"
    task = vluer_task(world) if vluer else world.adaptation()
    data = ready(pairs(world) if vluer else world.data())
    with pytest.raises(error, match=message), source.open(task, data, nullcontext):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts: expected at least one"),
        ({"steps": 0}, "expected steps >= 1"),
        ({"seed": -1}, "seed >= 0"),
        ({"clips": 0}, "clips >= 1"),
        ({"vae_dtype": "float16"}, "vae_dtype: expected float32 or bfloat16"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeneratedVideos(16, 32, 5, **changes)
    with pytest.raises(ValueError, match="clips: expected at least 1"):
        UpsampledVideos(2.0, clips=0)
