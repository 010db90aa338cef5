"""The VLUer pipeline: what it returns, and the sizes it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.models.vluer import VLUer
from luve_lightning.pipelines import VLUerPipeline
from tests.helpers.upsampling import tiny_video, tiny_vluer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vluer")
    tiny_vluer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipeline(tiny_backbone: Path, folder: Path) -> VLUerPipeline:
    return VLUerPipeline.from_pretrained(tiny_backbone, folder)


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    return torch.stack([tiny_video(seed, size=24) for seed in (0, 1)])


def test_is_encoding_upsampling_and_decoding(pipeline: VLUerPipeline, video: torch.Tensor) -> None:
    codec = pipeline.codec
    with torch.no_grad():
        latents = pipeline.vluer(codec.encode(video), (2, 6, 6))
    assert torch.equal(pipeline(video, scale=2, output_type="latent").frames, latents)
    pixels = pipeline(video, scale=2, output_type="pt").frames
    assert pixels.shape == (2, 3, 5, 48, 48)
    assert torch.equal(pixels, codec.decode(latents))
    array = pipeline(video, scale=2).frames
    assert isinstance(array, np.ndarray)
    assert array.shape == (2, 5, 48, 48, 3)
    assert array.dtype == np.float32
    assert array.min() >= 0
    assert array.max() <= 1
    np.testing.assert_allclose(array, (pixels.permute(0, 2, 3, 4, 1).numpy() + 1) / 2, atol=1e-6)


def test_latents_instead_of_video_a_size_instead_of_a_scale_a_tuple_instead_of_an_object(
    pipeline: VLUerPipeline, video: torch.Tensor
) -> None:
    want = pipeline(video, scale=2, output_type="latent").frames
    latents = pipeline.codec.encode(video)
    assert torch.equal(pipeline(latents=latents, scale=2.0, output_type="latent").frames, want)
    (got,) = pipeline(latents=latents, size=(48, 48), output_type="latent", return_dict=False)
    assert torch.equal(got, want)


def test_each_axis_has_a_size_of_its_own(pipeline: VLUerPipeline, video: torch.Tensor) -> None:
    assert pipeline(video, size=(40, 32), num_frames=9, output_type="pt").frames.shape == (2, 3, 9, 40, 32)
    assert pipeline(video, size=(8, 16), num_frames=1, output_type="latent").frames.shape == (2, 16, 1, 1, 2)


def test_bfloat16_weights(
    tiny_backbone: Path, folder: Path, pipeline: VLUerPipeline, video: torch.Tensor
) -> None:
    half = VLUerPipeline.from_pretrained(str(tiny_backbone), str(folder), torch.bfloat16).to("cpu")
    assert half.codec.dtype == next(half.vluer.parameters()).dtype == torch.bfloat16
    got = half(video, scale=2, output_type="pt").frames
    assert got.dtype == torch.float32
    difference = got - pipeline(video, scale=2, output_type="pt").frames
    assert 0 < difference.abs().mean() < 0.01


@settings(max_examples=60, deadline=None)
@given(h=st.integers(1, 60), w=st.integers(1, 60), scale=st.sampled_from([0.5, 1, 1.1, 1.5, 2, 2.25, 3]))
def test_a_scale_gives_whole_latents_or_is_refused_with_scales_that_do(
    pipeline: VLUerPipeline, h: int, w: int, scale: float
) -> None:
    hundredths = round(scale * 100)
    if h * hundredths % 100 == 0 and w * hundredths % 100 == 0:
        assert pipeline.target_size(5, (h, w), None, scale) == (
            2,
            h * hundredths // 100,
            w * hundredths // 100,
        )
        return
    with pytest.raises(ValueError, match="nearest whole ones are") as error:
        pipeline.target_size(5, (h, w), None, scale)
    for part in str(error.value).split("nearest whole ones are ")[1].split(";")[0].split(" and "):
        k, n = (int(word) for word in part.split("scale ")[1].split(" = ")[0].split("/"))
        assert n == (h if "latent height" in str(error.value) else w)
        assert abs(k - n * scale) < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (44, 48)}, "height 44: expected a multiple of 8, nearest are 40 and 48"),
        ({"size": (48, 48), "num_frames": 7}, "7 frames: expected 4k [+] 1, nearest are 5 and 9"),
        (
            {"scale": 1.5},
            "makes a latent height of 3 into 4.5; nearest whole ones are 4 .scale 4/3 = 1.33333. and 5",
        ),
        ({"scale": 0.1}, "into 0.3; nearest whole ones are 1 "),
        ({"scale": 0.0}, "scale must be > 0, got 0"),
        ({"scale": -2.0}, "scale must be > 0"),
        ({"scale": float("nan")}, "scale must be > 0"),
        ({"scale": float("inf")}, "scale must be > 0"),
        ({}, "either size .height, width. or scale"),
        ({"scale": 2, "size": (48, 48)}, "either size .height, width. or scale"),
        ({"scale": 2, "output_type": "pil"}, "output_type: expected one of latent, pt, np, got 'pil'"),
        ({"scale": 2, "latents": torch.zeros(1, 16, 2, 3, 3)}, "either video or latents"),
        ({"scale": 2, "video": None}, "either video or latents"),
        ({"scale": 2, "video": torch.zeros(3, 5, 24, 24)}, "video must be B x 3 x frames x height x width"),
        ({"scale": 2, "video": torch.zeros(1, 3, 6, 24, 24)}, "6 frames: expected 4k [+] 1"),
        ({"scale": 2, "video": torch.zeros(1, 3, 5, 20, 24)}, "height 20: expected a multiple of 8"),
        (
            {"scale": 2, "video": None, "latents": torch.zeros(1, 4, 2, 3, 3)},
            "latents must be B x 16 x frames",
        ),
    ],
)
def test_what_is_impossible_is_refused(
    pipeline: VLUerPipeline, video: torch.Tensor, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**({"video": video} | arguments))


def test_parts_that_are_missing_or_do_not_fit(tiny_backbone: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"vluer .*: no config\.json there; expected a folder saved by VLUer"
    ):
        VLUerPipeline.from_pretrained(tiny_backbone, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"backbone .*: no vae/config\.json there"):
        VLUerPipeline.from_pretrained(tmp_path, folder)
    VLUer(latent_channels=4, channels=4, pairs=1, hidden=4, query_channels=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="takes 4 latent channels, the VAE has 16"):
        VLUerPipeline.from_pretrained(tiny_backbone, tmp_path)
