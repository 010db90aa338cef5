"""The recogniser: what its features depend on, and its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luve_lightning.models.recogniser import (
    FRAMES,
    RecognisedLabels,
    Recogniser,
    changes,
    correlations,
    grain,
    load_recogniser,
)

LABELS = RecognisedLabels(("", "a cat"), ("", "left", "right"), ("", "a star"), ("blur", "noise"))


@pytest.fixture(scope="module")
def network() -> Recogniser:
    torch.manual_seed(0)
    return Recogniser(LABELS, channels=(4, 4, 8, 8), width=8, clip_dim=6, patch_dim=5).eval()


def clips(count: int, frames: int = FRAMES, side: int = 192) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, frames, side, side, 3), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clip_s_features_do_not_depend_on_the_others(network: Recogniser, dtype: torch.dtype) -> None:
    three = clips(3)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        together, alone = network.clip_features(three), network.clip_features(three[1:2])
        found = network.of_clips(together)
    assert together.shape == (3, 6)
    assert {name: values.shape[1] for name, values in found.items()} == LABELS.sizes()
    torch.testing.assert_close(
        together[1:2].float(), alone.float(), rtol=1e-4, atol=0.02 if dtype == torch.bfloat16 else 1e-5
    )


def test_longer_and_smaller_clips_are_seen_alike(network: Recogniser) -> None:
    """Of 17 frames every second is used, and a clip is enlarged to the network's size."""
    long = clips(1, 17)
    with torch.no_grad():
        assert torch.equal(network.clip_features(long), network.clip_features(long[:, ::2]))
        assert network.clip_features(clips(1, side=96)).isfinite().all()
    with pytest.raises(ValueError, match="at least 9 frames, got uint8 1 x 8"):
        network.clip_features(long[:, :8])


def test_patches_of_any_size_have_features(network: Recogniser) -> None:
    with torch.no_grad():
        for side in (16, 64, 70):
            patches = clips(1, side=side)[0].permute(0, 3, 1, 2)
            assert network.patch_features(patches).shape == (FRAMES, 5)


def test_correlations_are_dot_products_with_displaced_cells() -> None:
    first, second = torch.randn(2, 2, 3, 4, 5)
    found = correlations(first, second, reach=1)
    assert found.shape == (2, 9, 4, 5)
    for number, (down, right) in enumerate((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)):
        for y, x in ((0, 0), (2, 3), (3, 4)):
            inside = 0 <= y + down < 4 and 0 <= x + right < 5
            want = first[:, :, y, x] @ second[:, :, y + down, x + right].T if inside else torch.zeros(2, 2)
            torch.testing.assert_close(found[:, number, y, x], want.diagonal())


def test_changes_show_what_stands_still_and_what_flickers() -> None:
    still = torch.full((1, 5, 48, 48, 3), 100, dtype=torch.uint8)
    assert torch.equal(changes(still), torch.zeros(1, 11))
    still[:, 2] += 50  # one frame is brighter: two changes from frame to frame
    steps, bends, brightness = changes(still).split([4, 3, 4], 1)
    assert (steps > 0).tolist() == (brightness > 0).tolist() == [[False, True, True, False]]
    assert bends.exp()[0].tolist() == pytest.approx([51, 101, 51])


def test_grain_is_the_deviation_of_noise_on_a_smooth_picture() -> None:
    """In levels of 255."""
    smooth = torch.linspace(-0.5, 0.5, 64).expand(1, 3, 64, 64)
    noise = 2 * torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)).expand(1, 3, -1, -1) / 255
    found = [grain(smooth + level * noise).expm1()[0] for level in (0.0, 4.0, 10.0)]
    assert found[0].max() < 0.01
    for level, (tenth, median, mean) in zip((4.0, 10.0), found[1:], strict=True):
        assert tenth < median
        assert mean.item() == pytest.approx(level, rel=0.1)


def test_what_is_saved_is_loaded(network: Recogniser, tmp_path: Path) -> None:
    network.save(tmp_path / "network.safetensors")
    loaded = load_recogniser(tmp_path / "network.safetensors")
    assert loaded.labels == LABELS
    assert not loaded.training
    want = network.state_dict()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-3, atol=1e-4)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_recogniser(tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load_recogniser(tmp_path / "other.safetensors")
