"""Clean-fid's resize and network, in batches, against clean-fid's own."""

from __future__ import annotations

import copy
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from luve_lightning.metrics.base import Unavailable
from luve_lightning.metrics.frame_networks import INCEPTION, InceptionFeatures, resize_clean
from luve_lightning.metrics.frechet_patch import FIDPatch
from luve_lightning.metrics.pretrained import WeightFile


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(size=st.one_of(st.integers(1, 40), st.integers(250, 700)), seed=st.integers(0, 99), hard=st.booleans())
def test_the_resize_is_clean_fids(size: int, seed: int, hard: bool) -> None:
    patch = noise(seed, 1, 3, size, size)
    if hard:  # black and white only: the filter overshoots at every edge, and both clamp
        patch = (patch > 127).to(torch.uint8) * 255
    want = build_resizer("clean")(patch[0].permute(1, 2, 0).numpy())
    got = resize_clean(patch)
    assert got.shape == (1, 3, 299, 299)
    np.testing.assert_allclose(got[0].permute(1, 2, 0).numpy(), want, atol=0.02)  # of 255 levels


def test_the_resize_of_a_batch_is_that_of_each() -> None:
    patches = noise(0, 5, 3, 64, 64)
    # What is cut from frames has channels last.
    batch = resize_clean(patches.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(batch, torch.cat([resize_clean(patch[None]) for patch in patches]), rtol=0, atol=1e-4)


class Layers(nn.Module):
    """Stands where Inception's layers are: N x 3 x 299 x 299 to N x 2048."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 32, stride=32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.out = nn.Linear(8, 2048)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.net(x))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small TorchScript file with Inception's name and interface."""
    path = tmp_path / "inception-2015-12-05.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.jit.save(torch.jit.script(Whole()), str(path))
    content = path.read_bytes()
    file = WeightFile(
        INCEPTION.name,
        INCEPTION.file_name,
        len(content),
        INCEPTION.url,
        "fid_patch",
        hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setattr(InceptionFeatures, "file", file)
    return path


def test_features_are_clean_fids(weights: Path) -> None:
    patches = noise(1, 4, 3, 256, 256)
    extractor = InceptionFeatures(weights)
    extractor.prepare("cpu")
    theirs = InceptionV3W(str(weights.parent), download=False, resize_inside=False)
    resize = build_resizer("clean")
    pixels = torch.stack(
        [torch.from_numpy(resize(patch.permute(1, 2, 0).numpy())).permute(2, 0, 1) for patch in patches]
    )
    with torch.no_grad():
        got, want = extractor(patches), theirs(pixels)
    assert got.shape == (4, extractor.dim)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert want.std() > 0.01  # the stand-in does look at its input


def test_a_copy_in_another_process_loads_the_network_itself(weights: Path) -> None:
    extractor = InceptionFeatures(weights)
    extractor.prepare("cpu")
    patches = noise(1, 2, 3, 32, 32)
    for other in (pickle.loads(pickle.dumps(extractor)), copy.deepcopy(extractor)):
        with pytest.raises(RuntimeError, match="call prepare"):
            other(patches)
        other.prepare("cpu")
        assert torch.equal(other(patches), extractor(patches))


def test_the_network_is_never_trained(weights: Path) -> None:
    extractor = InceptionFeatures(weights)
    extractor.prepare("cpu")
    extractor.train()
    assert not extractor.training
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    assert list(extractor.parameters())


def test_without_the_file_fid_patch_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUVE_WEIGHTS", str(tmp_path))
    metric = FIDPatch(weights=tmp_path)
    assert metric.name == "fid_patch"
    with pytest.raises(Unavailable) as raised:
        metric.prepare("cpu")
    text = str(raised.value)
    for part in ("inception-2015-12-05.pt", "96 MB", "https://nvlabs-fi-cdn.nvidia.com/", str(tmp_path)):
        assert part in text
    assert "\n" not in text


def test_another_network_under_inceptions_name_is_refused(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    other = tmp_path / "x" / weights.name
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    with pytest.raises(Unavailable, match="sha256 differs"):
        FIDPatch(weights=other).prepare("cpu")
