"""MUSIQ and its like: what they are shown, how their scores are averaged, and how pyiqa's are built."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision.transforms as T
from torch import Tensor, nn

from luve_lightning.metrics import Dover, ImagingQuality, ImagingQualityTiles, Maniqa, Musiq, Niqe, Unavailable
from tests.helpers.video_metrics import Projection, random_video


def vbench_view(images: Tensor) -> Tensor:
    """VBench 0.1.5's mode `longer`."""
    height, width = images.shape[2:]
    if max(height, width) > 512:
        scale = 512.0 / max(height, width)
        images = T.Resize(size=(int(scale * height), int(scale * width)), antialias=False)(images)
    return images / 255.0


@pytest.mark.parametrize(("height", "width"), [(40, 60), (300, 533), (700, 520)])
def test_a_videos_number_is_vbenchs(height: int, width: int) -> None:
    network = Projection(1)
    video = random_video(3, height, width)
    images = vbench_view(torch.Tensor(video.numpy()).permute(0, 3, 1, 2))
    scores = [network(image[None]).item() for image in images]
    network.seen.clear()
    assert ImagingQuality(network, batch_size=2).score(video) == pytest.approx(sum(scores) / 3 / 100, abs=1e-7)
    assert network.seen == [(2, *images.shape[1:]), (1, *images.shape[1:])]
    assert Musiq(resized=True, backbone=network).score(video) == pytest.approx(sum(scores) / 3, abs=1e-5)


def test_videos_count_alike() -> None:
    metric = ImagingQuality(Projection(1))
    videos = [random_video(1, seed=1), random_video(6, seed=2)]
    for video in videos:
        metric.update(video)
    assert metric.compute().item() == pytest.approx(sum(map(metric.score, videos)) / 2, abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "factor"),
    [
        (ImagingQualityTiles(Projection(1), frames=1), 100),
        (Musiq(backbone=Projection(1), frames=1), 1),
        (Maniqa(backbone=Projection(1), frames=1), 1),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_tiles_are_native_pixels(metric: Musiq, factor: float) -> None:
    video = random_video(3, 520, 1024)
    tiles = [video[1, 4:516, left : left + 512].permute(2, 0, 1) / 255 for left in (0, 512)]
    expected = Projection(1)(torch.stack(tiles)).mean().item()
    assert metric.score(video) * factor == pytest.approx(expected, abs=1e-5)
    assert "native" in metric.resolution
    with pytest.raises(ValueError, match=rf"^{metric.name}: frames are 520x511, smaller than a tile of 512$"):
        metric.score(video[:, :, :511])


class Bare(nn.Sequential):
    """A bare number for one image, as pyiqa's NIQE gives it."""

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = super().forward(images)
        return scores.squeeze()


def test_niqe_sees_whole_frames() -> None:
    network = Projection(1)
    video = random_video(4, 41, 73)
    expected = network(video[[1, 3]].permute(0, 3, 1, 2) / 255).mean().item()
    metric = Niqe(backbone=Bare(network), frames=2)
    assert metric.score(video) == pytest.approx(expected, abs=1e-6)
    assert network.seen[1:] == [(1, 3, 41, 73)] * 2
    assert not metric.higher_is_better


def test_names_tell_the_resolutions_apart() -> None:
    for kind, name in ((Musiq, "musiq"), (Maniqa, "maniqa"), (Niqe, "niqe")):
        assert (kind().name, kind(resized=True).name) == (name, f"{name}_resized")
        assert "native" in kind().resolution
        assert "512" in kind(resized=True).resolution


def test_dover_takes_the_network_it_is_given() -> None:
    class Scorer(nn.Module):
        def forward(self, frames: Tensor) -> Tensor:
            return frames.float().mean() / 255

    video = random_video()
    assert Dover(Scorer()).score(video) == pytest.approx(video.float().mean().item() / 255)
    with pytest.raises(Unavailable, match=r"^dover needs a network: pyiqa has none; [^\n]*VQAssessment/DOVER[^\n]*$"):
        Dover().prepare("cpu")
    with pytest.raises(ValueError, match=r"^dover: backbone must give one number, got shape \(1, 3\)$"):
        Dover(nn.Flatten(0, 2)).score(video[:1, :1, :1])


@pytest.fixture
def pyiqa(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In the place of pyiqa: a linear network, built as it builds MANIQA; what it was asked is recorded."""
    asked: dict[str, Any] = {"downloads": 0}

    def create_timm_model(name: str, pretrained: bool = False) -> nn.Module:
        asked["downloads"] += pretrained
        return nn.Identity()

    timm = SimpleNamespace(create_model=create_timm_model)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            timm.create_model("vit", pretrained=True)
            self.score = nn.Linear(3, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.score(images.mean((2, 3)))

        def load_weights(self, path: str, weight_keys: str | None) -> None:
            assert weight_keys is None
            self.load_state_dict(torch.load(path, weights_only=True))

    def create_metric(name: str, device: str, **options: Any) -> nn.Module:
        asked["name"], asked["options"] = name, options
        return Network() if "pretrained" in options else Projection(1)

    package, archs, maniqa = (ModuleType("pyiqa"), ModuleType("pyiqa.archs"), ModuleType("pyiqa.archs.maniqa_arch"))
    package.create_metric, maniqa.timm = create_metric, timm  # type: ignore[attr-defined]
    for module in (package, archs, maniqa):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    asked["timm"] = timm, create_timm_model
    return asked


@pytest.mark.parametrize(
    ("metric", "name", "file"),
    [
        (ImagingQuality, "musiq-spaq", "musiq_spaq_ckpt-358bb6af.pth"),
        (Musiq, "musiq", "musiq_koniq_ckpt-e95806b9.pth"),
        (Maniqa, "maniqa", "ckpt_koniq10k.pt"),
    ],
)
def test_pyiqas_networks_are_built_from_files_without_a_download(
    metric: type[Musiq], name: str, file: str, pyiqa: dict[str, Any], tmp_path: Path
) -> None:
    weights = nn.Linear(3, 1)
    torch.save({f"score.{key}": value for key, value in weights.state_dict().items()}, tmp_path / file)
    measured = metric(weights=tmp_path)
    measured.prepare("cpu")
    assert (pyiqa["name"], pyiqa["options"], pyiqa["downloads"]) == (name, {"pretrained": False}, 0)
    timm, untouched = pyiqa["timm"]
    assert timm.create_model is untouched
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(measured.backbone(images), weights(images.mean((2, 3))))
    (tmp_path / file).write_bytes(b"not weights")
    with pytest.raises(Unavailable, match=rf"{metric(weights=tmp_path).name}: pyiqa cannot load [^\n]*{file}[^\n]*$"):
        metric(weights=tmp_path).prepare("cpu")


def test_niqes_statistics_are_a_file(pyiqa: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "niqe_modelparameters.mat"
    file.write_bytes(b"statistics")
    Niqe(weights=file).prepare("cpu")
    assert (pyiqa["name"], pyiqa["options"]) == ("niqe", {"pretrained_model_path": str(file)})


@pytest.mark.parametrize("metric", [ImagingQuality, ImagingQualityTiles, Musiq, Maniqa, Niqe])
def test_a_missing_package_or_file_is_one_line(
    metric: type[Musiq], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("LUVE_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(Unavailable, match=r"^[^\n]*pip install 'luve-lightning\[iqa\]'[^\n]* [kM]B, https[^\n]*$"):
        metric().prepare("cpu")
    request.getfixturevalue("pyiqa")
    with pytest.raises(Unavailable, match=rf"^[^\n]*was not found; put [^\n]*{tmp_path}[^\n]*$"):
        metric().prepare("cpu")
