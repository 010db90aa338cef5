"""Training a small backbone: it exports a whole pipeline, continues from it, and draws what it generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from luve_lightning.callbacks import EMA, Export, SampleMetrics
from luve_lightning.data.video_files import read_video
from luve_lightning.evaluation.sample_sources import GeneratedVideos
from luve_lightning.models.attention.dense import Dense
from luve_lightning.models.backbones import load_backbone
from luve_lightning.tasks import BackboneTask
from tests.helpers.attending import LearnedFrameAttention
from tests.helpers.tiny_flow import World, make_trainer
from tests.helpers.tiny_wan import flow_scheduler

NET = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1, "freq_dim": 16}
TEXT = {"d_model": 16, "num_heads": 2, "d_kv": 8, "d_ff": 16, "num_layers": 1, "dropout_rate": 0.1}
PROMPTS = ["Coloured squares drift to the left.", "squares drift", "left"]


def task(world: World, **changes: Any) -> BackboneTask:
    torch.manual_seed(0)
    options: dict[str, Any] = {"backbone": world.backbone, "length": 9, "shift": 3.0, "lr": 1e-2} | changes
    return BackboneTask(index=world.clips / "clips.csv", transformer=dict(NET), text_encoder=dict(TEXT), **options)


def samples(folder: Path) -> SampleMetrics:
    source = GeneratedVideos(16, 32, 5, PROMPTS, steps=2, guidance=3.0, seed=4)
    return SampleMetrics(source, every_n_steps=1, videos=3, output=folder)


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BackboneTask]:
    """The folder of a run of two steps with `export/` and `samples/`, and its task."""
    folder = tmp_path_factory.mktemp("run")
    model = task(world)
    callbacks = [samples(folder / "samples"), Export(folder / "export")]
    options: dict[str, Any] = {"limit_val_batches": None, "val_check_interval": 2}
    trainer = make_trainer(folder, max_steps=2, callbacks=callbacks, **options)
    trainer.fit(model, world.data(texts=None, passes=1))
    return folder, model


def pipeline_of(model: BackboneTask) -> WanPipeline:
    return WanPipeline(
        tokenizer=model.text_encoder.tokenizer, text_encoder=model.text_encoder.encoder, transformer=model.transformer,
        vae=load_backbone(model.backbone).vae(), scheduler=flow_scheduler(model.shift),
    )  # fmt: skip


def videos(pipeline: WanPipeline, seed: int) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    result: np.ndarray = pipeline(
        prompt=PROMPTS[1], height=16, width=32, num_frames=5, num_inference_steps=2, guidance_scale=3.0,
        max_sequence_length=9, generator=torch.Generator().manual_seed(seed), output_type="np",
    ).frames[0]  # fmt: skip
    return result


def test_the_export_is_a_pipeline(trained: tuple[Path, BackboneTask], world: World) -> None:
    folder, model = trained
    pipeline = WanPipeline.from_pretrained(folder / "export", torch_dtype=torch.float32)
    assert pipeline.scheduler.config.flow_shift == 3.0
    assert pipeline.tokenizer.model_max_length == 9
    for name, module in (("transformer", model.transformer), ("text_encoder", model.text_encoder.encoder)):
        loaded = getattr(pipeline, name).state_dict()
        assert all(torch.equal(v.half().float(), loaded[k]) for k, v in module.state_dict().items())
    assert sum(f.stat().st_size for f in (folder / "export" / "vae").iterdir()) == sum(
        f.stat().st_size for f in (world.backbone / "vae").iterdir()
    )
    video = videos(pipeline, 0)
    assert video.shape == (5, 16, 32, 3)
    model.eval()
    np.testing.assert_allclose(video, videos(pipeline_of(model), 0), atol=0.02)
    for file in (folder / "export").rglob("*.json"):
        assert str(world.backbone.parent) not in file.read_text(), "a path of this machine"


def test_both_parts_learn(trained: tuple[Path, BackboneTask], world: World) -> None:
    fresh = dict(task(world).named_parameters())
    moved = {name for name, p in trained[1].named_parameters() if not torch.equal(p, fresh[name])}
    assert any(name.startswith("text_encoder.") for name in moved)
    assert any(name.startswith("transformer.") for name in moved)


def test_it_continues_in_the_folder_it_came_from(trained: tuple[Path, BackboneTask], world: World) -> None:
    folder = trained[0] / "export"
    model = task(world, backbone=folder, init_from=str(folder))
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    for part, loaded in (
        (model.transformer, pipeline.transformer),
        (model.text_encoder.encoder, pipeline.text_encoder),
    ):
        want = loaded.state_dict()
        assert all(torch.equal(v, want[k]) for k, v in part.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.text_encoder.modules()), "dropout is off"
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in (folder / "vae").iterdir()}
    weights = (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    make_trainer(trained[0], max_steps=1, callbacks=[Export(folder)]).fit(model, world.data(texts=None))
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in (folder / "vae").iterdir()} == before
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() != weights
    WanPipeline.from_pretrained(folder)


@pytest.mark.slow
def test_samples_are_drawn_and_leave_training_alone(
    trained: tuple[Path, BackboneTask], world: World, tmp_path: Path
) -> None:
    steps = sorted((trained[0] / "samples").glob("step-*"))
    assert [folder.name for folder in steps] == ["step-000001", "step-000002"]
    for folder in steps:
        names = [f"{i:03d}-{prompt.strip('.').replace(' ', '-')}.mp4" for i, prompt in enumerate(PROMPTS)]
        assert sorted(file.name for file in folder.iterdir()) == names
        frames, _ = read_video(folder / names[0])
        assert frames.shape == (5, 16, 32, 3)
        assert len(np.unique(frames.reshape(-1, 3), axis=0)) > 20
    # Two steps without samples: the same weights, whatever drew from the random numbers in between.
    plain = task(world)
    options: dict[str, Any] = {"limit_val_batches": None, "val_check_interval": 1}
    make_trainer(tmp_path, max_steps=2, callbacks=[EMA(0.5)], **options).fit(plain, world.data(texts=None, passes=1))
    drawn = task(world)
    both = [samples(tmp_path), EMA(0.5)]
    make_trainer(tmp_path, max_steps=2, callbacks=both, **options).fit(drawn, world.data(texts=None, passes=1))
    assert len(list(tmp_path.glob("step-*/*.mp4"))) == 6
    want = plain.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in drawn.state_dict().items())


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients_under_the_same_names(world: World) -> None:
    plain, compiled = task(world), task(world, compile="aot_eager")
    latents = torch.randn(2, 16, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 0.9])
    for model in (plain, compiled):
        model.eval()  # without dropout
        text = model.text({"caption": PROMPTS[:2]})
        model.losses_of(latents, text, sigma, torch.ones_like(latents)).mean().backward()
    found = dict(compiled.named_parameters())
    assert [name for name, _ in plain.named_parameters()] == list(found)
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name].grad, parameter.grad, msg=name)


def test_another_attention_is_exported_with_its_parameters(world: World, tmp_path: Path) -> None:
    """And continued with, unless another one is asked for."""
    model = task(world, attention=LearnedFrameAttention())
    make_trainer(tmp_path, max_steps=1).fit(model, world.data(texts=None, passes=1))
    own = [branch.weight for branch in model.denoiser.branches.values()]
    assert all(weight.any() for weight in own)
    model.export(tmp_path / "export", None)
    again = task(world, backbone=tmp_path / "export", init_from=str(tmp_path / "export"))
    for branch, weight in zip(again.denoiser.branches.values(), own, strict=True):
        torch.testing.assert_close(branch.weight, weight, atol=1e-3, rtol=1e-3)  # float16
        assert branch.weight.requires_grad
    dense = task(world, backbone=tmp_path / "export", init_from=str(tmp_path / "export"), attention=Dense())
    assert dense.denoiser.attention == Dense()


def test_mistakes(world: World, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"backbone: {tmp_path} has no vae/config.json"):
        task(world, backbone=tmp_path)
    with pytest.raises(ValueError, match=r"data.texts: expected none, the backbone's own text encoder"):
        make_trainer(tmp_path, max_steps=1).fit(task(world), world.data())
