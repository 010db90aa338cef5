"""A family of backbones from elsewhere goes the whole way without a line of the package changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from luve_lightning.models.backbones import denoiser_of, family_of, latent_space_of, load_backbone
from luve_lightning.models.experts import load_expert
from luve_lightning.models.vluer import VLUer
from tests.helpers.run_luve import run_luve
from tests.helpers.second_family import RibbonBackbone, write_ribbon

Command = Callable[..., None]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ribbon(tmp_path_factory.mktemp("ribbon"), ["squares drift", "a red boat"])


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    repository: Path,
    backbone: Path,
    tiny_clips: Path,
) -> Command:
    """Runs a verb with experiments' files, the tiny world's over them, and further words."""
    monkeypatch.setenv("TINY_BACKBONE", str(backbone))
    monkeypatch.setenv("TINY_WORLD", str(tiny_clips))
    monkeypatch.setenv("TINY_LATENTS", str(tmp_path / "latents"))
    monkeypatch.setenv("TINY_TEXTS", str(tmp_path / "run" / "texts"))
    monkeypatch.setenv("TINY_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(verb: str, *words: object) -> None:
        names = [word for word in words if str(word).endswith(".yaml")]
        files = [repository / "experiments" / str(name) for name in names]
        files += [repository / "tests/conf/one_step.yaml"] if verb == "fit" else []
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
    known = re.escape("no family of backbones is known for OtherPipeline; known are AutoencoderKLWan, Ribbon")
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


@pytest.mark.slow
def test_a_vluer_is_trained_on_it(command: Command, tmp_path: Path) -> None:
    """Latents encoded, one step with pixels decoded, compared with interpolation, exported."""
    command("precompute", "precompute/mini.yaml")
    command("fit", "vluer/mini.yaml", "--model.net.latent_channels=6")
    net = VLUer.from_pretrained(tmp_path / "run" / "vluer")
    assert net(torch.randn(1, 6, 2, 4, 5), (3, 8, 10)).shape == (1, 6, 3, 8, 10)


@pytest.mark.slow
@pytest.mark.parametrize("files", [["lfe"], ["lfe", "hfe"]])
def test_experts_are_trained_on_it(
    command: Command, tmp_path: Path, backbone: Path, files: list[str]
) -> None:
    """Latents and texts embedded, one step, and the expert changes what its base predicts in its own place."""
    command("precompute", "precompute/mini.yaml", "precompute/mini-experts.yaml")
    command("embed", "embed/mini.yaml")
    command("fit", *(f"experts/mini-{name}.yaml" for name in files), "--model.recompute=blocks")
    denoiser = load_backbone(backbone).denoiser()
    latents, text = torch.randn(1, 6, 3, 4, 5), torch.randn(1, 7, 10)
    before = denoiser.velocity(latents, torch.tensor([900.0]), text)
    load_expert(denoiser.module, tmp_path / "run", files[-1])
    after = denoiser.velocity(latents, torch.tensor([900.0]), text)
    assert not torch.equal(before, after)
