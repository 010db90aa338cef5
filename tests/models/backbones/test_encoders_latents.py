"""What all latent spaces do; the sizes of video a backbone can make, and the nearest ones that a refusal names."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.models.backbones import SizeRules, latent_space_of, load_backbone
from tests.helpers.noise import noise
from tests.helpers.second_family import SPACE, RibbonLatents, RibbonVAE

WAN = SizeRules(16, 4)


def test_the_rules_are_in_the_backbones_configuration(tiny_backbone: Path, tmp_path: Path) -> None:
    assert load_backbone(tiny_backbone).size_rules() == WAN
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_backbone(tmp_path / "nowhere").size_rules()
    with pytest.raises(FileNotFoundError, match=re.escape("no model_index.json there")):
        load_backbone(tmp_path).size_rules()


@given(st.integers(-5, 5000), st.integers(-5, 300))
def test_a_refusal_names_values_that_pass(pixels: int, frames: int) -> None:
    """The nearest ones on both sides, which a plain search over all possible values finds."""
    possible = {"height": range(16, 6000, 16), "num_frames": range(1, 500, 4)}
    try:
        WAN.check(frames, height=pixels)
    except ValueError as error:
        name, near = re.fullmatch(r"(\w+) .* nearest are (.*)", str(error)).groups()  # type: ignore[union-attr]
        value = {"height": pixels, "num_frames": frames}[name]
        low, high = map(int, near.split(" and "))
        assert {low, high} <= set(possible[name])
        assert value not in possible[name]
        assert min(abs(low - value), abs(high - value)) == min(abs(n - value) for n in possible[name])
    else:
        assert pixels in possible["height"]
        assert frames in possible["num_frames"]


def test_the_papers_sizes_fit_and_others_are_refused() -> None:
    for output in ((1472, 2560), (2176, 3840)):
        WAN.check(49, height=output[0], width=output[1])
        WAN.check_cascade((720, 1280), output)
    WAN.check_cascade((96, 96), (96, 96))
    with pytest.raises(ValueError, match="720x1280: larger than the video's 192x192"):
        WAN.check_cascade((720, 1280), (192, 192))
    with pytest.raises(ValueError, match="another shape than the video's 2560x1472; 1264x720 would fit"):
        WAN.check_cascade((720, 1280), (2560, 1472))


@given(st.floats(0, 5000))
def test_the_nearest_possible_side(pixels: float) -> None:
    assert abs(WAN.nearest(pixels) - pixels) == min(abs(n - pixels) for n in range(16, 6000, 16))


def test_a_family_with_neither_tiles_nor_features_of_its_own() -> None:
    """Its tiles are one whole, and its features are the latents."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        space = RibbonLatents(RibbonVAE())
    video = noise(2, 3, 3, 2 * SPACE, 3 * SPACE).clamp(-1, 1)
    latents = space.encode(video)
    assert torch.equal(space.features(video), latents)
    assert space.feature_channels == latents.shape[1] == 6
    assert torch.equal(space.decode_in_tiles(latents, (1, 1)), space.decode(latents))
    assert space.tile is None, "as it was before"
    counted: list[int] = []
    space.dry_decode_in_tiles(latents, (1, 1), lambda times: counted.append(times) or nullcontext())
    assert counted == [1]


def test_it_is_made_where_its_vae_is() -> None:
    """The meta device stands for a GPU: what is mixed from two devices is refused there, too."""
    space = latent_space_of(RibbonVAE(channels=6).to("meta"))
    latents = torch.empty(2, 6, 3, 4, 5, device="meta")
    assert space.normalize(latents).is_meta
    assert space.denormalize(latents).is_meta
    assert space.decode(latents).shape == (2, 3, *space.pixel_size(3, 4, 5))
