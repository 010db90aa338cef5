"""Super-resolution networks from published weights, and videos enlarged by them to an exact size."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from luve_lightning.functional.pixels import resize_video, video_to_frames
from luve_lightning.model_folders import not_finite, odd_weights
from luve_lightning.models.super_resolution import CHUNK, TILE, PixelSuperResolver, RealBasicVSR, RRDBNet
from luve_lightning.terminal import amount

# Where a file may keep its tensors, and what may stand before their names: the first that is there counts, so that
# averaged weights, with which their makers test, go before the others.
_NESTS = ("state_dict", "params_ema", "params")
_PREFIXES = ("generator_ema.module.", "generator_ema.", "generator.", "module.")
_COUNTER = "step_counter"  # beside the weights of mmediting's files
_KINDS: tuple[tuple[type[RealBasicVSR | RRDBNet], tuple[str, ...]], ...] = (
    (RealBasicVSR, ("image_cleaning.", "basicvsr.")),
    (RRDBNet, ("body.0.rdb1.", "conv_body.")),
)


@torch.no_grad()
def super_resolved(
    net: PixelSuperResolver, video: Tensor, size: tuple[int, int], tile: int | None = TILE, chunk: int = CHUNK
) -> Tensor:
    """Frames of a video, enlarged by a network and then resized to exactly `size`, as `resize_video` does.

    Args:
        net: the network.
        video: B x 3 x T x H x W in [-1, 1].
        size: height and width of the result.
        tile: see `PixelSuperResolver.stream`.
        chunk: likewise.

    Returns:
        uint8 B x T x height x width x 3, on the CPU.
    """
    enlarged = net.stream(video, tile, chunk)
    return torch.cat([video_to_frames(resize_video(f[:, :, None].clamp(-1, 1), size)).cpu() for f in enlarged], dim=1)


def load_super_resolver(path: str | Path) -> PixelSuperResolver:
    """A network with the weights of a file, in float32 and eval mode: RealBasicVSR or Real-ESRGAN's RRDBNet.

    The names in the file tell which one and of what size. RealBasicVSR's files of mmediting and mmagic hold a
    generator, its average (`generator_ema.`) and maybe a discriminator; the average is taken where there is one, and
    of Real-ESRGAN's `params_ema` and `params` likewise.

    Args:
        path: .pth (read by an unpickler that runs nothing) or .safetensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or weights that do not fit; the message names some.
    """
    path = Path(path)
    tensors = _weights(path)
    kind = next((kind for kind, starts in _KINDS if any(name.startswith(starts) for name in tensors)), None)
    if kind is None:
        names = ", ".join(sorted(tensors)[:3]) or "none"
        raise ValueError(
            f"{path}: neither RealBasicVSR's weights (image_cleaning., basicvsr.) nor RRDBNet's (body.0.rdb1., "
            f"conv_body.): it has {names}"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    net = kind.of(shapes)
    if odd := odd_weights(shapes, net):
        told = "; ".join(f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in odd.items())
        raise ValueError(f"{path}: weights that do not fit {kind.__name__}: {told}")
    net.load_state_dict(tensors)
    if wrong := not_finite(net):
        raise ValueError(
            f"{path}: {amount(len(wrong), 'weight')} with values that are not finite, for instance {wrong[0]}"
        )
    return net.eval().requires_grad_(False)


def _weights(path: Path) -> dict[str, Tensor]:
    """The tensors of the network that a file holds, without what stands before their names."""
    content = _content(path)
    for nest in _NESTS:
        if isinstance(content.get(nest), Mapping):
            content = content[nest]
            break
    prefix = next((prefix for prefix in _PREFIXES if any(str(name).startswith(prefix) for name in content)), "")
    own = {str(name).removeprefix(prefix): x for name, x in content.items() if str(name).startswith(prefix)}
    own.pop(_COUNTER, None)
    if other := [name for name, x in own.items() if not isinstance(x, Tensor)]:
        raise ValueError(f"{path}: expected tensors by name, {other[0]} is a {type(own[other[0]]).__name__}")
    return own


def _content(path: Path) -> Mapping[Any, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{path}: expected weights as .pth or .safetensors: {reason[:150]}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected tensors by name, got a {type(content).__name__}")
    return content
