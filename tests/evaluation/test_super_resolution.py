"""Published weights by their exact names, what is refused, and videos enlarged to an exact size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from luve_lightning.evaluation.super_resolution import load_super_resolver, super_resolved
from luve_lightning.functional.pixels import resize_video, video_to_frames
from luve_lightning.models.super_resolution import RealBasicVSR, RRDBNet
from tests.models.test_super_resolution import tiny, video

Shapes = dict[str, tuple[int, ...]]


def convolution(name: str, channels: int, channels_in: int, side: int = 3) -> Shapes:
    return {f"{name}.weight": (channels, channels_in, side, side), f"{name}.bias": (channels,)}


def trunk(name: str, channels_in: int, blocks: int = 20) -> Shapes:
    found = convolution(f"{name}.main.0", 64, channels_in)
    for i in range(blocks):
        found |= convolution(f"{name}.main.2.{i}.conv1", 64, 64) | convolution(f"{name}.main.2.{i}.conv2", 64, 64)
    return found


def published_realbasicvsr() -> Shapes:
    """Names and shapes of the generator in realbasicvsr_c64b20_1x30x8_lr5e-5_150k_reds, and in RealBasicVSR_x4.pth."""
    found = trunk("image_cleaning.0", 3) | convolution("image_cleaning.1", 3, 64)
    found |= {"basicvsr.spynet.mean": (1, 3, 1, 1), "basicvsr.spynet.std": (1, 3, 1, 1)}
    for level in range(6):
        for layer, (a, b) in enumerate([(8, 32), (32, 64), (64, 32), (32, 16), (16, 2)]):
            name = f"basicvsr.spynet.basic_module.{level}.basic_module.{layer}.conv"
            found |= convolution(name, b, a, 7)
    found |= trunk("basicvsr.backward_resblocks", 67) | trunk("basicvsr.forward_resblocks", 67)
    found |= convolution("basicvsr.fusion", 64, 128, 1)
    found |= convolution("basicvsr.upsample1.upsample_conv", 256, 64)
    found |= convolution("basicvsr.upsample2.upsample_conv", 256, 64)
    return found | convolution("basicvsr.conv_hr", 64, 64) | convolution("basicvsr.conv_last", 3, 64)


def published_real_esrgan(channels_in: int, blocks: int) -> Shapes:
    """Names and shapes of RealESRGAN_x4plus (3, 23), RealESRGAN_x2plus (12, 23) and x4plus_anime_6B (3, 6)."""
    found = convolution("conv_first", 64, channels_in)
    for i in range(blocks):
        for k in (1, 2, 3):
            for n in range(5):
                found |= convolution(f"body.{i}.rdb{k}.conv{n + 1}", 64 if n == 4 else 32, 64 + 32 * n)
    for name in ("conv_body", "conv_up1", "conv_up2", "conv_hr"):
        found |= convolution(name, 64, 64)
    return found | convolution("conv_last", 3, 64)


def filled(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def holds(net: torch.nn.Module, tensors: dict[str, Tensor]) -> bool:
    state = net.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("layout", ["ema", "mmagic", "generator", "bare", "safetensors"])
def test_the_published_layout_of_realbasicvsr_loads_whole(layout: str, tmp_path: Path) -> None:
    average, last = filled(published_realbasicvsr(), 1), {"generator.conv": torch.zeros(1)}
    odd = {"step_counter": torch.zeros(1), "discriminator.conv_0.weight": torch.zeros(1)}
    path = tmp_path / ("x.safetensors" if layout == "safetensors" else "x.pth")
    files: dict[str, Any] = {
        "ema": {"meta": {"epoch": 1}, "state_dict": named("generator_ema.", average) | last | odd},
        "mmagic": {"state_dict": named("generator_ema.module.", average) | {"generator_ema.steps": torch.ones(1)}},
        "generator": {"state_dict": named("generator.", average) | odd},
        "bare": average,
        "safetensors": named("generator.", average),
    }
    (save_file if path.suffix == ".safetensors" else torch.save)(files[layout], path)
    net = load_super_resolver(path)
    assert isinstance(net, RealBasicVSR)
    assert holds(net, average)
    assert not net.training


@pytest.mark.parametrize(("channels_in", "blocks", "scale"), [(3, 6, 4), (12, 23, 2)])
def test_the_published_layout_of_real_esrgan_loads_whole(
    channels_in: int, blocks: int, scale: int, tmp_path: Path
) -> None:
    average = filled(published_real_esrgan(channels_in, blocks), 1)
    torch.save({"params": {"conv_first.weight": torch.zeros(1)}, "params_ema": average}, tmp_path / "x.pth")
    net = load_super_resolver(tmp_path / "x.pth")
    assert isinstance(net, RRDBNet)
    assert (net.scale, len(net.body)) == (scale, blocks)
    assert holds(net, average)


def test_another_size_of_network_is_told_from_the_names(tmp_path: Path) -> None:
    net = tiny(seed=3)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    again = load_super_resolver(tmp_path / "x.pth")
    clip = video(1, 2, 8, 8)
    again.threshold = net.threshold
    assert torch.equal(again(clip), net(clip))


def damaged(change: str) -> dict[str, Any]:
    state: dict[str, Any] = dict(tiny().state_dict())
    if change == "missing":
        del state["basicvsr.fusion.bias"], state["basicvsr.conv_hr.weight"]
    elif change == "more":
        state["basicvsr.backbone.weight"] = torch.zeros(1)
    elif change == "shape":
        state["basicvsr.fusion.weight"] = torch.zeros(6, 11, 1, 1)
    elif change == "nan":
        state["basicvsr.fusion.bias"] = torch.full((6,), torch.nan)
    elif change == "value":
        state["basicvsr.fusion.bias"] = "text"
    return {"resnet.weight": torch.zeros(1)} if change == "other" else state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "do not fit RealBasicVSR: 2 missing: basicvsr.conv_hr.weight, basicvsr.fusion.bias"),
        ("more", "do not fit RealBasicVSR: 1 not used: basicvsr.backbone.weight"),
        ("shape", "do not fit RealBasicVSR: 1 other shapes: basicvsr.fusion.weight"),
        ("nan", "1 weight with values that are not finite, for instance basicvsr.fusion.bias"),
        ("value", "expected tensors by name, basicvsr.fusion.bias is a str"),
        ("other", r"neither RealBasicVSR's weights .* nor RRDBNet's .*: it has resnet.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change: str, message: str, tmp_path: Path) -> None:
    torch.save(damaged(change), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        load_super_resolver(tmp_path / "x.pth")


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.pth: no such file"):
        load_super_resolver(tmp_path / "x.pth")
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).write_text("no weights")
        with pytest.raises(ValueError, match=r"expected weights as \.pth or \.safetensors"):
            load_super_resolver(tmp_path / name)
    torch.save({"state_dict": {}, "code": Path}, tmp_path / "code.pth")  # a pickle that asks for a class
    with pytest.raises(ValueError, match=r"expected weights as \.pth or \.safetensors"):
        load_super_resolver(tmp_path / "code.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="got a list"):
        load_super_resolver(tmp_path / "list.pth")


@pytest.mark.parametrize("size", [(32, 40), (25, 31), (70, 64)])
def test_a_video_is_enlarged_to_an_exact_size(size: tuple[int, int]) -> None:
    net, clips = tiny(), video(2, 3, 8, 10)
    made = super_resolved(net, clips, size)
    assert made.shape == (2, 3, *size, 3)
    expected = video_to_frames(resize_video(net(clips).clamp(-1, 1), size))
    assert (made.int() - expected.int()).abs().max() <= 1
