"""RealBasicVSR and RRDBNet against plain forms of their papers, in tiles and chunks, at any size, batch and dtype."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from luve_lightning.models.super_resolution import PixelSuperResolver, RealBasicVSR, RRDBNet, SPyNet, tiled, warp
from tests.helpers.tiny_luve import seeded


def tiny(kind: type[RealBasicVSR | RRDBNet] = RealBasicVSR, seed: int = 0, **options: float) -> PixelSuperResolver:
    """A small network whose random weights move pixels visibly, the flow by some pixels."""
    sizes = {"channels": 6, "blocks": 1} | ({"cleaning_blocks": 1} if kind is RealBasicVSR else {"growth": 4})
    torch.manual_seed(seed)
    net = kind(**(sizes | options))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.ndim == 4:
                weight.normal_(std=(1.4 if "spynet" in name else 0.7) / weight[0].numel() ** 0.5)
    return net.eval().requires_grad_(False)


def video(*shape: int, seed: int = 1) -> Tensor:
    """Smooth shapes in [-1, 1] that move, B x 3 x T x H x W."""
    batch, frames, height, width = shape
    noise = torch.rand(batch, 3, frames, height // 6 + 2, width // 6 + 2, generator=seeded(seed))
    return F.interpolate(noise, size=(frames, height, width), mode="trilinear") * 2 - 1


def fetched(image: Tensor, flow: Tensor, border: bool) -> Tensor:
    """The plain reference of warping: four neighbours of every position, one by one."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            at_x, at_y = x + flow[0, y, x].item(), y + flow[1, y, x].item()
            if border:
                at_x, at_y = min(max(at_x, 0), width - 1), min(max(at_y, 0), height - 1)
            left, top = int(at_x // 1), int(at_y // 1)
            for j, i in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                share = (1 - abs(at_x - i)) * (1 - abs(at_y - j))
                if 0 <= i < width and 0 <= j < height:
                    out[:, y, x] += share * image[:, j, i]
    return out


@pytest.mark.parametrize("border", [False, True])
def test_warping_fetches_along_the_flow(border: bool) -> None:
    image, flow = torch.rand(2, 3, 5, 7, generator=seeded(0)), 6 * torch.rand(2, 2, 5, 7, generator=seeded(1)) - 3
    expected = torch.stack([fetched(one, way, border) for one, way in zip(image, flow, strict=True)])
    torch.testing.assert_close(warp(image, flow, "border" if border else "zeros"), expected, rtol=1e-4, atol=1e-5)


class Plain:
    """BasicVSR's and RealBasicVSR's formulas on one video, written from the tensors' names alone."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(x, weight, self.weights[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def trunk(self, name: str, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv(f"{name}.main.0", x), 0.1)
        numbers = [re.match(rf"{re.escape(name)}\.main\.2\.(\d+)", key) for key in self.weights]
        for i in range(1 + max(int(found[1]) for found in numbers if found)):
            x = x + self.conv(f"{name}.main.2.{i}.conv2", F.relu(self.conv(f"{name}.main.2.{i}.conv1", x)))
        return x

    def flow(self, near: Tensor, far: Tensor) -> Tensor:
        name = "basicvsr.spynet"
        height, width = near.shape[-2:]
        up = [32 * ((side + 31) // 32) for side in (height, width)]
        images = [F.interpolate(image, size=up, mode="bilinear") for image in (near, far)]
        images = [(image - self.weights[f"{name}.mean"]) / self.weights[f"{name}.std"] for image in images]
        flow = torch.zeros(1, 2, up[0] // 32, up[1] // 32)
        for level in range(6):
            a, b = (F.avg_pool2d(image, 2 ** (5 - level)) for image in images)
            if level:
                flow = F.interpolate(flow, size=a.shape[-2:], mode="bilinear", align_corners=True) * 2
            x = torch.cat([a, warp(b, flow, "border"), flow], dim=1)
            for layer in range(5):
                x = self.conv(f"{name}.basic_module.{level}.basic_module.{layer}.conv", x)
                x = x if layer == 4 else F.relu(x)
            flow = flow + x
        flow = F.interpolate(flow, size=(height, width), mode="bilinear")
        return torch.stack([flow[:, 0] * width / up[1], flow[:, 1] * height / up[0]], dim=1)

    def cleaned(self, frames: Tensor, threshold: float) -> tuple[Tensor, int]:
        """T x 3 x H x W, and how many times it was cleaned."""
        times, residue = 0, frames.new_full((1,), torch.inf)
        while times < 3 and not residue.abs().mean() < threshold / 255:
            residue = self.conv("image_cleaning.1", self.trunk("image_cleaning.0", frames))
            frames, times = frames + residue, times + 1
        return frames, times

    def enlarged(self, frames: Tensor) -> Tensor:
        count = len(frames)
        x = [frames[i : i + 1] for i in range(count)]
        channels = len(self.weights["basicvsr.backward_resblocks.main.0.bias"])
        zeros = x[0].new_zeros(1, channels, *frames.shape[-2:])
        back: list[Tensor] = [zeros] * count
        for i in range(count - 1, -1, -1):
            state = zeros if i == count - 1 else warp(back[i + 1], self.flow(x[i], x[i + 1]))
            back[i] = self.trunk("basicvsr.backward_resblocks", torch.cat([x[i], state], dim=1))
        made, state = [], zeros
        for i in range(count):
            state = zeros if i == 0 else warp(state, self.flow(x[i], x[i - 1]))
            state = self.trunk("basicvsr.forward_resblocks", torch.cat([x[i], state], dim=1))
            y = F.leaky_relu(self.conv("basicvsr.fusion", torch.cat([back[i], state], dim=1)), 0.1)
            for name in ("upsample1", "upsample2"):
                y = F.leaky_relu(F.pixel_shuffle(self.conv(f"basicvsr.{name}.upsample_conv", y), 2), 0.1)
            y = self.conv("basicvsr.conv_last", F.leaky_relu(self.conv("basicvsr.conv_hr", y), 0.1))
            made.append(y + F.interpolate(x[i], scale_factor=4, mode="bilinear"))
        return torch.cat(made)


def by_formula(net: PixelSuperResolver, one: Tensor, threshold: float) -> Tensor:
    """What a video, 3 x T x H x W, becomes."""
    plain = Plain(net.state_dict())
    frames, _ = plain.cleaned((one.transpose(0, 1) + 1) / 2, threshold)
    return (2 * plain.enlarged(frames) - 1).transpose(0, 1)


@pytest.mark.parametrize(("height", "width", "frames"), [(40, 33, 4), (7, 5, 2), (64, 64, 1)])
def test_it_cleans_carries_and_enlarges_as_its_papers_say(height: int, width: int, frames: int) -> None:
    net, one = tiny(threshold=5.0), video(1, frames, height, width)
    made = net(one)
    assert made.shape == (1, 3, frames, 4 * height, 4 * width)
    torch.testing.assert_close(made[0], by_formula(net, one[0], 5.0), rtol=1e-4, atol=2e-4)


def test_the_flow_matters_here() -> None:
    """The comparisons above would hold for a network that ignores its flow, were this not so."""
    net, one = tiny(), video(1, 2, 40, 33)
    spynet = net.get_submodule("basicvsr.spynet")
    assert isinstance(spynet, SPyNet)
    flow = spynet(*((one[:, :, i] + 1) / 2 for i in (0, 1)))
    assert 0.5 < flow.abs().mean() < 20


@pytest.mark.parametrize(("threshold", "times"), [(0.0, 3), (255.0, 1)])
def test_cleaning_goes_on_until_little_changes(threshold: float, times: int) -> None:
    net, frames = tiny(threshold=threshold), (video(1, 3, 20, 20) + 1) / 2
    assert isinstance(net, RealBasicVSR)
    expected, cleaned = Plain(net.state_dict()).cleaned(frames[0].transpose(0, 1), threshold)
    assert cleaned == times
    made = torch.cat(net.cleaned(list(frames.unbind(2))))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_each_video_of_a_batch_decides_for_itself() -> None:
    net = tiny(threshold=255.0).double()
    assert isinstance(net, RealBasicVSR)
    quiet, loud = torch.full((1, 3, 2, 12, 12), 0.5).double(), 20 * video(1, 2, 12, 12).double()
    sizes = [float(net.image_cleaning(x[:, :, 0]).abs().mean()) for x in (quiet, loud)]
    assert sizes[0] < sizes[1]
    net.threshold = sum(sizes) / 2
    alone = [torch.stack(net.cleaned(list(x.unbind(2)))) for x in (quiet, loud)]
    both = torch.stack(net.cleaned(list(torch.cat([quiet, loud]).unbind(2))))
    torch.testing.assert_close(both, torch.cat(alone, dim=1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [RealBasicVSR, RRDBNet])
@pytest.mark.parametrize(("tile", "chunk"), [(None, 2), (9, 5), (10, 1)])
def test_tiles_and_chunks_give_the_whole(kind: type[RealBasicVSR | RRDBNet], tile: int | None, chunk: int) -> None:
    net, clips = tiny(kind), video(3, 4, 24, 20)
    torch.testing.assert_close(net(clips, tile, chunk), net(clips, None, 99), rtol=1e-4, atol=1e-4)


def test_features_of_one_chunk_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a chunk's features of the way back, and one state a chunk, whatever the length."""
    net, alive = tiny(), 0
    assert isinstance(net, RealBasicVSR)
    most, back = 0, net.basicvsr.backward_resblocks

    def counted(module: torch.nn.Module, given: object, made: Tensor) -> None:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        weakref.finalize(made, gone)

    def gone() -> None:
        nonlocal alive
        alive -= 1

    back.register_forward_hook(counted)
    for _ in net.stream(video(1, 24, 8, 8), None, chunk=3):
        pass
    assert most <= 24 // 3 + 3 + 1


@pytest.mark.parametrize("kind", [RealBasicVSR, RRDBNet])
def test_half_precision_is_close(kind: type[RealBasicVSR | RRDBNet]) -> None:
    net, clip = tiny(kind), video(1, 2, 24, 20)
    exact, rough = net(clip), tiny(kind).to(torch.bfloat16)(clip.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize(("height", "width"), [(9, 8), (1, 1), (12, 16)])
@pytest.mark.parametrize("scale", [2, 4])
def test_real_esrgans_network_enlarges_each_frame(scale: int, height: int, width: int) -> None:
    net, one = tiny(RRDBNet, scale=scale), video(1, 2, height, width)
    weights, plain = net.state_dict(), Plain(net.state_dict())
    x = (one[0].transpose(0, 1) + 1) / 2
    if scale == 2:
        x = F.pixel_unshuffle(F.pad(x, (0, width % 2, 0, height % 2), mode="replicate"), 2)
    first = y = plain.conv("conv_first", x)
    for block in range(1 + max(int(key.split(".")[1]) for key in weights if key.startswith("body."))):
        before = y
        for dense in ("rdb1", "rdb2", "rdb3"):
            start, seen = y, [y]
            for i in range(1, 5):
                seen.append(F.leaky_relu(plain.conv(f"body.{block}.{dense}.conv{i}", torch.cat(seen, 1)), 0.2))
            y = start + 0.2 * plain.conv(f"body.{block}.{dense}.conv5", torch.cat(seen, 1))
        y = before + 0.2 * y
    y = first + plain.conv("conv_body", y)
    for name in ("conv_up1", "conv_up2"):
        y = F.leaky_relu(plain.conv(name, y.repeat_interleave(2, 2).repeat_interleave(2, 3)), 0.2)
    y = plain.conv("conv_last", F.leaky_relu(plain.conv("conv_hr", y), 0.2))
    expected = 2 * y[..., : scale * height, : scale * width] - 1
    torch.testing.assert_close(net(one)[0].transpose(0, 1), expected, rtol=1e-4, atol=1e-4)


def test_tiles_reach_as_far_as_they_must() -> None:
    """A tile without its surroundings differs, so that the equality above says something."""
    image, kernel = torch.rand(1, 1, 20, 20, generator=seeded(0)), torch.rand(1, 1, 5, 5, generator=seeded(1))

    def blurred(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, padding=2)

    torch.testing.assert_close(tiled(blurred, image, 7, halo=2), blurred(image))
    assert not torch.allclose(tiled(blurred, image, 7, halo=1), blurred(image))


def test_bad_input_is_refused() -> None:
    net = tiny()
    with pytest.raises(ValueError, match="expected floating point B x 3 x T x H x W, got float32 1 x 4 x 2 x 8 x 8"):
        net(torch.zeros(1, 4, 2, 8, 8))
    with pytest.raises(ValueError, match="expected tile >= 1 or None and chunk >= 1, got 0 and 16"):
        net(torch.zeros(1, 3, 2, 8, 8), 0)
    with pytest.raises(ValueError, match="scale: expected 2 or 4, got 3"):
        RRDBNet(scale=3)
