"""The published networks are loaded from folders, and are the networks that VBench runs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig, ViTModel

from luve_lightning import metrics
from luve_lightning.metrics import Unavailable, VideoMetric
from luve_lightning.metrics.pretrained import (
    ClipFeatures,
    DinoFeatures,
    WeightFile,
    load_aesthetic_head,
    load_clip,
    load_dino,
)
from tests.helpers.video_metrics import random_video

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}


@pytest.fixture(autouse=True)
def _nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither this machine's weights nor its hub's cache are seen."""
    monkeypatch.setenv("LUVE_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("LIBRARY", str(tmp_path / "library"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def small_dino(seed: int = 0) -> ViTModel:
    torch.manual_seed(seed)
    vit = ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8), add_pooling_layer=False).eval()
    for parameter in vit.parameters():  # biases and position embeddings too
        nn.init.normal_(parameter, std=0.3)
    return vit


def small_clip(size: int = 224, width: int = 24, features: int = 16) -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    config = CLIPVisionConfig(**SMALL | {"hidden_size": width}, projection_dim=features, image_size=size, patch_size=32)
    return CLIPVisionModelWithProjection(config).eval()


def dino_by_its_paper_and_code(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """DINO's ViT in plain operations: pre-normalised blocks, exact GELU, eps 1e-6, bicubic positions by scale."""

    def get(name: str) -> tuple[Tensor, Tensor]:
        found = [key for key in weights if key.endswith(f"{name}.weight")]
        assert len(found) == 1, (name, found)
        return weights[found[0]], weights[found[0].removesuffix("weight") + "bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = get(name)
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * weight + bias

    x = F.conv2d(images, *get("projection"), stride=8)
    rows, columns = x.shape[2:]
    x = torch.cat([weights["embeddings.cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1)
    positions = weights["embeddings.position_embeddings"]
    if (rows, columns) != (4, 4):
        grid = positions[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=((rows + 0.1) / 4, (columns + 0.1) / 4), mode="bicubic")
        assert grid.shape[2:] == (rows, columns)
        positions = torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, 24)], 1)
    x = x + positions
    for layer in range(2):
        y = norm(x, f"{layer}.layernorm_before")
        query, key, value = (
            F.linear(y, *get(f"{layer}.attention.{part}_proj")).unflatten(2, (3, 8)).transpose(1, 2) for part in "qkv"
        )
        y = ((query @ key.mT / 8**0.5).softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = x + F.linear(y, *get(f"{layer}.attention.o_proj"))
        y = F.linear(norm(x, f"{layer}.layernorm_after"), *get(f"{layer}.mlp.fc1"))
        x = x + F.linear(F.gelu(y), *get(f"{layer}.mlp.fc2"))
    return norm(x, "layernorm")[:, 0]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 60), (71, 40), (16, 16)])
def test_dinos_class_token(tmp_path: Path, height: int, width: int) -> None:
    vit = small_dino()
    vit.save_pretrained(tmp_path / "dino")
    weights = {name: value.double() for name, value in vit.state_dict().items()}
    images = torch.randn(2, 3, height, width)
    features = load_dino(tmp_path / "dino", "subject_consistency")(images)
    torch.testing.assert_close(
        features.double(), dino_by_its_paper_and_code(weights, images.double()), rtol=1e-4, atol=1e-5
    )


def test_clips_embedding(tmp_path: Path) -> None:
    clip = small_clip(64)
    clip.save_pretrained(tmp_path / "clip")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(load_clip(tmp_path / "clip", "x", "CLIP")(images), clip(images).image_embeds)


def test_the_head_is_a_linear_layer(tmp_path: Path) -> None:
    head = nn.Linear(768, 1)
    torch.save(head.state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth")
    features = torch.randn(3, 768)
    assert torch.equal(load_aesthetic_head(tmp_path)(features), head(features))
    torch.save(nn.Linear(512, 1).state_dict(), tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"not weights")
    for name in ("other.pth", "broken.pth"):
        with pytest.raises(Unavailable, match=rf"{name} is not LAION's linear aesthetic head [^\n]+$"):
            load_aesthetic_head(tmp_path / name)


def test_metrics_load_their_networks_from_folders(tmp_path: Path) -> None:
    small_dino().save_pretrained(tmp_path / "weights" / "dino-vitb16")
    small_clip().save_pretrained(tmp_path / "clip")
    small_clip(features=768).save_pretrained(tmp_path / "large")
    torch.save(nn.Linear(768, 1).state_dict(), tmp_path / "weights" / "sa_0_4_vit_l_14_linear.pth")
    video = random_video(3, 230, 240)
    found: list[tuple[VideoMetric, type[nn.Module]]] = [
        # Found among the other weights, by the repository's name.
        (metrics.SubjectConsistency(), DinoFeatures),
        (metrics.BackgroundConsistency(weights=tmp_path / "clip"), ClipFeatures),
        (metrics.AestheticQuality(weights=tmp_path / "large"), ClipFeatures),
        (metrics.Aesthetic(weights=tmp_path / "large", frames=2), ClipFeatures),
    ]
    for metric, kind in found:
        metric.prepare("cpu")
        assert isinstance(metric.backbone, kind)
        assert not any(p.requires_grad or module.training for module in metric.modules() for p in module.parameters())
        network = metric.backbone
        assert 0 <= abs(metric.score(video)) <= 1
        metric.prepare("cpu")
        assert metric.backbone is network, "loaded once"


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (
            metrics.SubjectConsistency,
            r"subject_consistency needs facebook/dino-vitb16 \(DINO ViT-B/16, 343 MB\).*weights/dino-vitb16",
        ),
        (metrics.BackgroundConsistency, r"background_consistency needs openai/clip-vit-base-patch32 \(.*605 MB\)"),
        (metrics.AestheticQuality, r"sa_0_4_vit_l_14_linear.pth .*weights"),
        (metrics.Aesthetic, r"sa_0_4_vit_l_14_linear.pth .*weights"),
    ],
)
def test_what_is_missing_is_one_line(metric: type[VideoMetric], words: str) -> None:
    for attempt in (lambda: metric().prepare("cpu"), lambda: metric().score(random_video(3, 230, 240))):
        with pytest.raises(Unavailable, match=rf"^[^\n]*{words}[^\n]*$"):
            attempt()


BYTES = b"weights"
FILE = WeightFile(
    "Some network", "net.pt", 95_607_719, "https://example.com/net.pt", "some_metric", caches=("$LIBRARY/hub",)
)
EXACT = replace(FILE, size_bytes=len(BYTES), sha256=hashlib.sha256(BYTES).hexdigest())


def put(path: Path, content: bytes = BYTES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_places_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = put(tmp_path / "library" / "hub" / "net.pt")
    assert FILE.find() == library
    own = put(tmp_path / "weights" / "net.pt")
    assert FILE.find() == own
    given = put(tmp_path / "elsewhere" / "renamed.pt")
    assert FILE.find(given) == given
    assert FILE.find(own.parent) == own
    monkeypatch.delenv("LUVE_WEIGHTS")
    assert FILE.find() == library
    home = put(tmp_path / "home" / ".cache" / "luve-lightning" / "net.pt")
    assert FILE.find() == home


def test_missing_weights_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as raised:
        FILE.find()
    assert str(raised.value) == (
        "some_metric needs Some network: net.pt was not found; put net.pt (96 MB, https://example.com/net.pt) into "
        f"{tmp_path / 'weights'} or give its path"
    )
    # A given path that is wrong is not made good by another file.
    put(tmp_path / "weights" / "net.pt")
    with pytest.raises(Unavailable, match=r"/nowhere/net.pt does not exist; put net.pt \(1.7 GB"):
        replace(FILE, size_bytes=1_710_000_000).find("/nowhere/net.pt")
    with pytest.raises(Unavailable, match=r"put net.pt \(8 kB"):
        replace(FILE, size_bytes=8_150).find("/nowhere/net.pt")


def test_a_file_with_a_known_hash_is_compared(tmp_path: Path) -> None:
    path = put(tmp_path / "net.pt")
    assert EXACT.find_exactly(path) == path
    put(path, BYTES[:-1])
    with pytest.raises(Unavailable, match="has 6 bytes where Some network has 7: cut short"):
        EXACT.find(path)
    put(path, BYTES[::-1])
    assert EXACT.find(path) == path
    with pytest.raises(Unavailable, match="is not Some network: its sha256 differs"):
        EXACT.find_exactly(path)
    assert FILE.find_exactly(path) == path
