"""The file of the released VLUer: its weights, checked whole."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luve_lightning.models.vluer.released import ReleasedVLUer
from luve_lightning.models.vluer.released_blocks import BlockGroup

_BLOCK = re.compile(r"(.*)\.blocks\.\d+\.attn")
# What `position_bias` may differ by: sines of float32 angles on another machine.
_TOLERANCE = 1e-4


def read_released(path: str | Path, crop: bool = False) -> ReleasedVLUer:
    """The released VLUer with the weights of its file.

    Args:
        path: model.pth, `{model: {name, args, sd}, optimizer, lr_scheduler, iter}`. Only tensors and plain types are
            read of it, and only `sd` is used.
        crop: see ReleasedVLUer.

    Raises:
        FileNotFoundError: no such file.
        ValueError: for another kind of file, or a state that does not fit exactly.
    """
    state = _state(Path(path))
    # Without values first: the file brings them.
    with torch.device("meta"):
        net = ReleasedVLUer(crop=crop)
    _check(path, state, net)
    parameters = {name: state[name].float() for name, _ in net.named_parameters()}
    net = ReleasedVLUer(crop=crop)
    net.load_state_dict(parameters)
    _check_buffers(path, state, net)
    return net.eval()


def buffer_names(net: ReleasedVLUer) -> dict[str, tuple[BlockGroup, str]]:
    """The group and the buffer that each of a released state's buffers repeats, by the name there."""
    found = {}
    for name, group in net.named_modules():
        if isinstance(group, BlockGroup):
            for i in range(len(group.blocks)):
                found[f"{name}.blocks.{i}.attn.relative_position_index"] = (group, "index")
                if group.positions is not None:
                    found[f"{name}.blocks.{i}.attn.position_bias"] = (group, "positions")
    return found


def _state(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: cannot be read as a PyTorch file of plain tensors: {reason}") from error
    model = content.get("model") if isinstance(content, Mapping) else None
    state = model.get("sd") if isinstance(model, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"a dictionary of {', '.join(map(str, list(content)[:4]))}" if isinstance(content, Mapping) else ""
        raise ValueError(
            f"{path}: expected the released VLUer's file, {{model: {{name, args, sd}}, ...}}, "
            f"got {found or type(content).__name__}"
        )
    return state


def _check(path: str | Path, state: Mapping[str, Tensor], net: ReleasedVLUer) -> None:
    """Refuse a state of other names, shapes or values than the released one's."""
    expected: dict[str, tuple[int, ...]] = {name: tuple(each.shape) for name, each in net.named_parameters()}
    parameters = set(expected)
    for name, (group, buffer) in buffer_names(net).items():
        shape = tuple(getattr(group, buffer).shape)
        expected[name] = shape if buffer == "index" else (1, shape[0] * shape[1], shape[2])
    wrong = {
        "missing": [name for name in expected if name not in state],
        "unknown": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} ({_sides(state[name].shape)} instead of {_sides(shape)})"
            for name, shape in expected.items()
            if name in state and tuple(state[name].shape) != shape
        ],
        "not finite": [name for name in parameters & state.keys() if not state[name].isfinite().all()],
    }
    parts = [f"{len(names)} {what}, such as {sorted(names)[0]}" for what, names in wrong.items() if names]
    if parts:
        raise ValueError(
            f"{path}: {len(state)} tensors, expected the released VLUer's {len(expected)}: " + "; ".join(parts)
        )


def _check_buffers(path: str | Path, state: Mapping[str, Tensor], net: ReleasedVLUer) -> None:
    """Refuse buffers that differ from those that the windows give: they would belong to another network."""
    for name, (group, buffer) in buffer_names(net).items():
        own, given = getattr(group, buffer), state[name]
        same = torch.equal(given.long(), own) if buffer == "index" else _close(given, own)
        if not same:
            raise ValueError(f"{path}: {name} differs from that of windows of {_sides(group.window)}")


def _close(given: Tensor, own: Tensor) -> bool:
    return bool(((given.float() - own.flatten(0, 1)).abs() < _TOLERANCE).all())


def _sides(shape: Any) -> str:
    return " x ".join(map(str, shape))
