"""A family of backbones from elsewhere goes the whole way without a line of the package changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from luve_lightning.__main__ import main
from luve_lightning.cascade import CascadeOptions, Guidance, LuVePipeline, SpeedOptions
from luve_lightning.models.backbones import Recompute, denoiser_of, family_of, latent_space_of, load_backbone
from luve_lightning.models.experts import add_expert, load_expert, save_expert
from luve_lightning.models.vluer import VLUer
from tests.helpers.attending import LearnedFrameAttention
from tests.helpers.run_luve import run_luve
from tests.helpers.second_family import RibbonBackbone, write_ribbon
from tests.helpers.tiny_luve import EXPERTS, seeded
from tests.helpers.tiny_wan import randomise
from tests.helpers.upsampling import tiny_vluer

Command = Callable[..., None]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ribbon(tmp_path_factory.mktemp("ribbon"), ["squares drift", "a red boat"])


@pytest.fixture(scope="module")
def stores(
    tmp_path_factory: pytest.TempPathFactory, repository: Path, backbone: Path, tiny_clips: Path
) -> tuple[Path, Path]:
    """Latents of the tiny clips and embeddings of their captions, made by `luve precompute` and `luve embed`."""
    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_BACKBONE", str(backbone))
        patch.setenv("TINY_WORLD", str(tiny_clips))
        patch.setenv("TINY_LATENTS", str(folder / "latents"))
        patch.setenv("TINY_RUN", str(folder))
        for verb, name in (("precompute", "mini.yaml"), ("precompute", "mini-experts.yaml"), ("embed", "mini.yaml")):
            files = [repository / part / verb / file
                     for part in ("experiments", "tests/conf")
                     for file in dict.fromkeys(("mini.yaml", name))]  # fmt: skip
            assert main([verb, *(word for file in files if file.is_file() for word in ("--config", str(file)))]) == 0
    return folder / "latents", folder / "texts"


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    repository: Path,
    backbone: Path,
    tiny_clips: Path,
    stores: tuple[Path, Path],
) -> Command:
    """Runs a verb with experiments' files, the tiny world's over them, and further words."""
    monkeypatch.setenv("TINY_BACKBONE", str(backbone))
    monkeypatch.setenv("TINY_WORLD", str(tiny_clips))
    monkeypatch.setenv("TINY_LATENTS", str(stores[0]))
    monkeypatch.setenv("TINY_TEXTS", str(stores[1]))
    monkeypatch.setenv("TINY_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    one_step = repository / "tests/conf/one_step.yaml"

    def run(verb: str, *words: object, repository: Path = repository) -> None:
        names = [word for word in words if str(word).endswith(".yaml")]
        files = [repository / "experiments" / str(name) for name in names]
        files += [one_step] if verb == "fit" else []
        files += [file for name in names if (file := repository / "tests/conf" / str(name)).is_file()]
        words = tuple(word for word in words if word not in names)
        options = [word for file in files for word in ("--config", file)]
        outcome = run_luve(capsys, verb, *options, *words)
        assert outcome.code == 0, outcome.err

    return run


def test_it_is_found_by_what_its_files_name(backbone: Path, tmp_path: Path) -> None:
    ours = load_backbone(backbone)
    assert {type(ours), type(load_backbone(backbone / "transformer"))} == {RibbonBackbone}
    denoiser, space = ours.denoiser(), ours.latent_space()
    assert family_of(denoiser.module) is family_of(space.vae) is RibbonBackbone
    assert type(denoiser_of(denoiser.module)) is type(denoiser)
    assert type(latent_space_of(space.vae)) is type(space)
    (tmp_path / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    known = r"no family of backbones is known for OtherPipeline; known are (.*, )?Ribbon"
    with pytest.raises(ValueError, match=known):
        load_backbone(tmp_path)


def test_what_it_computes_fits_together(backbone: Path) -> None:
    ours = load_backbone(backbone)
    denoiser, space = ours.denoiser(), ours.latent_space()
    video = torch.rand(2, 3, 5, 8, 12) * 2 - 1
    latents = space.encode(video)
    assert latents.shape == (2, 6, *space.latent_size(5, 8, 12)) == (2, 6, 3, 2, 3)
    assert space.decode(latents).shape == video.shape
    text = ours.text()(["a red boat", "squares"])
    assert text.shape == (2, 7, 10)
    velocity = denoiser.velocity(latents, torch.tensor([300.0, 900.0]), text)
    assert velocity.shape == latents.shape


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    """A VLUer for its latents, and both experts for its transformer."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_vluer(latent_channels=6).save_pretrained(folder / "vluer")
    transformer = load_backbone(backbone).denoiser().module
    for name, config in EXPERTS.items():
        add_expert(transformer, name, config)
        randomise(transformer, name)
        save_expert(transformer, name, folder / "experts" / name)
    return folder


def test_its_cascade_goes_stage_by_stage_and_is_saved_whole(backbone: Path, parts: Path, tmp_path: Path) -> None:
    pipeline = LuVePipeline.from_pretrained(backbone, parts / "vluer", parts / "experts")
    pipeline.set_progress_bar_config(disable=True)
    options = CascadeOptions(16, 24, 5, steps=8, skip_steps=1)
    output = pipeline("a red boat", options, generator=seeded(), keep_stages=True)
    shapes = {name: tuple(latents.shape) for name, latents in output.stages.items()}
    assert shapes == {"motion": (1, 6, 3, 2, 3), "upsampled": (1, 6, 3, 4, 6), "refined": (1, 6, 3, 4, 6)}
    assert output.frames.shape == (1, 5, 16, 24, 3)
    used = [use.expert for use in output.experts_used if use.stage == "refined"]
    assert set(used) == {"lfe", "hfe"}
    alone = pipeline("a red boat", options, generator=seeded(), experts="none")
    assert not np.array_equal(output.frames, alone.frames)
    pipeline.save_pretrained(tmp_path / "saved")
    again = LuVePipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(again("a red boat", options, generator=seeded()).frames, output.frames)
    with pytest.raises(ValueError, match=r"num_frames 6: expected 2k \+ 1, nearest are 5 and 7"):
        pipeline("a red boat", options, num_frames=6)


def test_it_is_refined_by_rivals_or_they_say_why_not(backbone: Path, parts: Path) -> None:
    pipeline = LuVePipeline.from_pretrained(backbone, parts / "vluer", parts / "experts")
    pipeline.set_progress_bar_config(disable=True)
    options = CascadeOptions(16, 24, 5, steps=4, skip_steps=0, refinement="demofusion")
    output = pipeline("a red boat", options, generator=seeded())
    assert output.frames.shape == (1, 5, 16, 24, 3)
    assert {use.expert for use in output.experts_used if use.stage == "refined"} == {"lfe", "hfe"}
    with pytest.raises(ValueError, match=r"^RibbonTransformer: its rotary embedding cannot be scaled$"):
        pipeline("a red boat", options, refinement="cinescale")


def test_it_is_sped_up_as_every_family(backbone: Path, parts: Path) -> None:
    pipeline = LuVePipeline.from_pretrained(backbone, parts / "vluer", parts / "experts")
    pipeline.set_progress_bar_config(disable=True)
    options = CascadeOptions(16, 24, 5, steps=8, skip_steps=0, upsampling="rgb", guidance=Guidance(1.0))
    want = pipeline("squares", options, generator=seeded(), experts="none").frames
    pipeline.apply(SpeedOptions(cache="taylorseer", cache_interval=2))
    cached = pipeline("squares", options, generator=seeded(), experts="none").frames
    assert abs(cached - want).max() > 0


def test_its_attention_is_replaced_saved_and_kept_by_its_experts(backbone: Path, parts: Path, tmp_path: Path) -> None:
    """A pipeline is saved with it, whose experts fit nothing else; recomputation keeps the gradients."""
    pipeline = LuVePipeline.from_pretrained(backbone, parts / "vluer", {})
    pipeline.set_progress_bar_config(disable=True)
    denoiser = denoiser_of(pipeline.transformer)
    denoiser.use_attention(LearnedFrameAttention())
    for branch in denoiser.branches.values():
        torch.nn.init.normal_(branch.weight)
    for name, config in EXPERTS.items():
        add_expert(denoiser.module, name, config)
        randomise(denoiser.module, name)
    options = CascadeOptions(16, 24, 5, steps=4, skip_steps=1)
    want = pipeline("a red boat", options, generator=seeded()).frames
    pipeline.save_pretrained(tmp_path)
    again = LuVePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(again("a red boat", options, generator=seeded()).frames, want)
    with pytest.raises(ValueError, match="trained with the attention LearnedFrameAttention"):
        load_expert(load_backbone(backbone).denoiser().module, tmp_path / "experts" / "lfe")

    def gradients(recompute: Recompute) -> list[torch.Tensor]:
        trained = load_backbone(tmp_path).denoiser()
        trained.module.train()
        trained.set_recompute(recompute)
        latents, text = torch.linspace(-1, 1, 6 * 3 * 4 * 5).view(1, 6, 3, 4, 5), torch.ones(1, 7, 10)
        trained.velocity(latents, torch.tensor([900.0]), text).square().mean().backward()
        assert all(branch.weight.grad is not None for branch in trained.branches.values())
        return [p.grad for p in trained.module.parameters() if p.grad is not None]

    whole = gradients("nothing")
    choices: tuple[Recompute, ...] = ("blocks", "all_but_attention")
    for recompute in choices:
        assert all(torch.equal(a, b) for a, b in zip(gradients(recompute), whole, strict=True))


def test_luve_generates_with_it_and_resumes(
    capsys: pytest.CaptureFixture[str], backbone: Path, parts: Path, tmp_path: Path
) -> None:
    def generate(*words: object) -> str:
        models = ("--backbone", backbone, "--vluer", parts / "vluer", "--experts", parts / "experts")
        size = ("--height", 16, "--width", 24, "--num_frames", 5, "--steps", 3, "--skip_steps", 1)
        output = ("--output", tmp_path / "out", "--keep_stages", "true", "--device", "cpu")
        outcome = run_luve(capsys, "generate", *models, *size, *output, *words, "a red boat")
        assert outcome.code == 0, outcome.err
        return outcome.out

    assert "written        1 video" in generate()
    assert "already there  1" in generate()
    other = generate("--switch", 0.5, "--overwrite", "true")
    assert "motion kept, upsampled kept" in other


def test_luve_plans_it(capsys: pytest.CaptureFixture[str], backbone: Path, parts: Path) -> None:
    size = ("--height", 16, "--width", 24, "--num_frames", 5, "--steps", 4, "--skip_steps", 1)
    outcome = run_luve(capsys, "plan", "--backbone", backbone, "--vluer", parts / "vluer", *size, "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    refine = next(line.split() for line in outcome.out.splitlines() if line.startswith("refine"))
    assert refine[:5] == ["refine", "3x4x6", "72", "3", "6"]


@pytest.mark.slow
def test_a_vluer_is_trained_on_it(command: Command, tmp_path: Path) -> None:
    """Latents encoded, one step with pixels decoded, compared with interpolation, exported."""
    command("fit", "vluer/mini.yaml", "--model.net.latent_channels=6")
    net = VLUer.from_pretrained(tmp_path / "run" / "vluer")
    assert net(torch.randn(1, 6, 2, 4, 5), (3, 8, 10)).shape == (1, 6, 3, 8, 10)


@pytest.mark.slow
@pytest.mark.parametrize("files", [["lfe"], ["lfe", "hfe"]])
def test_experts_are_trained_on_it(command: Command, tmp_path: Path, backbone: Path, files: list[str]) -> None:
    """Latents and texts embedded, one step, and the expert changes what its base predicts in its own place."""
    command("fit", *(f"experts/mini-{name}.yaml" for name in files), "--model.recompute=blocks")
    denoiser = load_backbone(backbone).denoiser()
    latents, text = torch.randn(1, 6, 3, 4, 5), torch.randn(1, 7, 10)
    before = denoiser.velocity(latents, torch.tensor([900.0]), text)
    load_expert(denoiser.module, tmp_path / "run", files[-1])
    after = denoiser.velocity(latents, torch.tensor([900.0]), text)
    assert not torch.equal(before, after)


@pytest.mark.slow
def test_a_new_one_is_trained_from_nothing(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repository: Path
) -> None:
    """Its VAE first, whose latents its transformer and text encoder then learn; the folder is a whole backbone."""

    def with_sizes(name: str, **sizes: object) -> None:
        """Copy an experiment and the tiny world's file over it, with the family's sizes in place of Wan's."""
        for folder in ("experiments", "tests/conf"):
            content = yaml.safe_load((repository / folder / name).read_text())
            content["model"]["init_args"] |= sizes
            if "extends" in content:
                content["extends"] = str((repository / "experiments" / name).parent / content["extends"])
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text(yaml.safe_dump(content))

    with_sizes("mini/vae.yaml", family="ribbon", vae={"hidden": 12})
    command("fit", "mini/vae.yaml", repository=tmp_path)
    monkeypatch.setenv("TINY_BACKBONE", str(tmp_path / "run" / "export"))
    monkeypatch.setenv("TINY_LATENTS", str(tmp_path / "latents"))
    command("precompute", "precompute/mini.yaml")
    with_sizes("mini/backbone.yaml", transformer={"width": 12}, text_encoder={"width": 6})
    command("fit", "mini/backbone.yaml", repository=tmp_path)
    made = load_backbone(tmp_path / "run" / "export")
    assert (made.denoiser().text_dim, made.text().dim, made.latent_space().channels) == (6, 6, 6)
