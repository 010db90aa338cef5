"""The released VLUer, in code of our own, and its file, whose weights are checked whole."""

from __future__ import annotations

import itertools
import math
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  # a saved pipeline looks for it in its part's module
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from luve_lightning.functional.interpolation import Size3d, interpolate_latents, take_sorted
from luve_lightning.models.vluer.model import BaseVLUer
from luve_lightning.models.vluer.released_blocks import BlockGroup, DeepGroup, Fold, ScaleStage

MULTIPLE = 8  # rows and columns: the U-Nets halve them three times
WINDOW = (6, 8, 8)
# What `position_bias` may differ by: sines of float32 angles on another machine.
_TOLERANCE = 1e-4
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WAYS = ("same", "down", "down", "down", "up", "up", "up")


class WindowUNet(nn.Module):
    """Seven stages in the form of a U, then deep groups; the whole is residual.

    Args:
        in_channels: channels of the input.
        channels: channels of the stages and of the output.
        deep_channels: channels of the deep groups.
        heads: heads of every attention.
        blocks: blocks of a stage, with mutual attention and without.
        deep_blocks: blocks of each deep group.
        frame_groups: how many of the last deep groups attend within frames only.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        deep_channels: int,
        heads: int,
        blocks: tuple[int, int],
        deep_blocks: Sequence[int],
        frame_groups: int,
    ) -> None:
        super().__init__()
        self.conv_first = nn.Conv3d(in_channels, channels, (1, 3, 3), padding=(0, 1, 1))
        for i, way in enumerate(_WAYS, start=1):
            self.add_module(f"stage{i}", ScaleStage(way, channels, heads, blocks, WINDOW))
        widen = nn.Sequential(Fold("same"), nn.LayerNorm(channels), nn.Linear(channels, deep_channels))
        within = len(deep_blocks) - frame_groups
        self.stage8 = nn.ModuleList([widen])
        for i, count in enumerate(deep_blocks):
            window = WINDOW if i < within else (1, *WINDOW[1:])
            self.stage8.append(DeepGroup(deep_channels, count, heads, window))
        self.norm = nn.LayerNorm(deep_channels)
        self.conv_after_body = nn.Linear(deep_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """B x in_channels x T x h x w to B x channels x T x h x w; rows and columns are multiples of 8."""
        first = self.conv_first(x).permute(0, 2, 3, 4, 1)
        stages = [self.get_submodule(f"stage{i}") for i in range(1, len(_WAYS) + 1)]
        x1 = stages[0](first)
        x2 = stages[1](x1)
        x3 = stages[2](x2)
        x = stages[4](stages[3](x3))
        x = stages[5](x + x3)
        x = stages[6](x + x2) + x1
        del x1, x2, x3
        for group in self.stage8:
            x = group(x)
        return (first + self.conv_after_body(self.norm(x))).permute(0, 4, 1, 2, 3)


def cell_centres(n: int, device: torch.device) -> Tensor:
    """Centres of n cells that divide [-1, 1]; float32, by the steps of the original, whose rounding decides ties."""
    half = 1 / n
    return -1 + half + (2 * half) * torch.arange(n, device=device).float()


def sampled_cells(n_in: int, n_out: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The input cell that each output cell takes its features from, and the offset of its centre from that cell's.

    At scales such as 1.5 an output's centre lies right between two input cells. The original asks `grid_sample`, which
    rounds halves to even after a few roundings in float32; so does this, whatever the model's dtype.

    Returns:
        int64 indices and float32 offsets in half-cells of the input, each of shape (n_out,).
    """
    centres = cell_centres(n_out, device)
    grid = torch.stack((torch.zeros_like(centres), torch.zeros_like(centres), centres), dim=1)
    cells = torch.arange(n_in, dtype=torch.float32, device=device).view(1, 1, n_in, 1, 1)
    found = F.grid_sample(cells, grid.view(1, n_out, 1, 1, 3), mode="nearest", align_corners=False)
    index = found.flatten().long()
    return index, (centres - cell_centres(n_in, device)[index]) * n_in


class ReleasedMLP(nn.Module):
    """The MLP of the implicit upsampler: linear layers with ReLU between.

    Its first layer sees the 3x3x3 neighbourhood of the nearest features (zeros outside), then the offset t, y, x and
    the cell t, y, x, both in half-cells of the input. Only its last six columns depend on the query: the others are a
    convolution, which is computed once per input position.

    Args:
        channels: feature channels C.
        hidden: widths of the hidden layers.
        out_channels: D.
        query_chunk: queries at a time when no gradient is needed.
    """

    def __init__(self, channels: int, hidden: Sequence[int], out_channels: int, query_chunk: int) -> None:
        super().__init__()
        widths = [27 * channels + 6, *hidden, out_channels]
        layers: list[nn.Module] = []
        for wide, narrow in itertools.pairwise(widths):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        self.channels, self.query_chunk = channels, query_chunk

    def forward(self, features: Tensor, size: Size3d) -> Tensor:
        """B x C x T x h x w queried at every position of an output grid: B x D x size."""
        n_in, device = features.shape[2:], features.device
        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        around, coordinates = first.weight.split([27 * self.channels, 6], dim=1)
        # Columns are ordered by frame offset, channel, row and column offset.
        kernel = around.view(-1, 3, self.channels, 3, 3).transpose(1, 2)
        known = F.conv3d(features, kernel, first.bias, padding=1).permute(0, 2, 3, 4, 1)
        indices, tables = [], []
        for axis in range(3):
            index, offset = sampled_cells(n_in[axis], size[axis], device)
            table = offset[:, None] * coordinates[:, axis].float()
            table = table + 2 * n_in[axis] / size[axis] * coordinates[:, 3 + axis].float()
            indices.append(index)
            tables.append(table.to(known.dtype))
        plane = tables[1][:, None] + tables[2]
        frames = size[0]
        if not torch.is_grad_enabled():
            frames = max(1, self.query_chunk // (size[1] * size[2] * features.shape[0]))
        chunks = []
        for start in range(0, size[0], frames):
            t = slice(start, start + frames)
            x = known
            for axis, index in enumerate((indices[0][t], indices[1], indices[2])):
                # One more than in exact arithmetic: places are rounded.
                x = take_sorted(x, axis + 1, index, most=-(-size[axis] // n_in[axis]) + 1)
            chunks.append(self.layers[1:](x + (tables[0][t, None, None] + plane)))
        return torch.cat(chunks, dim=1).permute(0, 4, 1, 2, 3)


class ReleasedVLUer(BaseVLUer):
    """The VLUer as it was released, for its weights; `luve convert vluer` makes a folder of them.

    22.1 M parameters: a U-Net of window attention as encoder (VRT, arXiv 2201.12288), an MLP queried at the output's
    positions, the interpolated latents added, then a second, narrow U-Net as decoder. This code is our own. We ship no
    weights: VRT is licensed CC-BY-NC-4.0, and the released code and weights of LuVe come without a licence file.

    It takes at least 2 frames and 64 x 64 latents, and gives any number of frames; rows and columns of both are
    multiples of 8. The original cuts its input to multiples of 8 and stretches the rest to the whole output:
    `crop=True` does the same.

    Args:
        latent_channels: channels of the VAE's latents.
        channels: channels of the encoder's stages.
        deep_channels: channels of its deep groups.
        heads: heads of every attention.
        mutual_blocks: blocks with mutual attention in a stage of the encoder.
        self_blocks: blocks without, in the same stage.
        deep_groups: number of the encoder's deep groups.
        deep_blocks: blocks of each.
        frame_groups: how many of its last deep groups attend within frames only.
        hidden: widths of the MLP's hidden layers.
        decoder_channels: channels of the decoder's stages.
        decoder_deep_channels: channels of its deep groups.
        decoder_groups: number of its deep groups.
        query_chunk: queries at a time when no gradient is needed.
        crop: cut rows and columns of the input to multiples of 8, at the end, as the original does.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        channels: int = 120,
        deep_channels: int = 180,
        heads: int = 6,
        mutual_blocks: int = 6,
        self_blocks: int = 2,
        deep_groups: int = 6,
        deep_blocks: int = 4,
        frame_groups: int = 2,
        hidden: Sequence[int] = (512, 512, 256, 256),
        decoder_channels: int = 24,
        decoder_deep_channels: int = 48,
        decoder_groups: int = 3,
        query_chunk: int = 2**18,
        crop: bool = False,
    ) -> None:
        super().__init__()
        stages, deep = (channels, decoder_channels), (deep_channels, decoder_deep_channels)
        for name, widths, multiple in (("channels", stages, math.lcm(4, heads)), ("deep_channels", deep, heads)):
            if any(width < 1 or width % multiple for width in widths):
                raise ValueError(f"{name}: expected multiples of {multiple} with {heads} heads, got {widths}")
        self.encoder = WindowUNet(
            latent_channels,
            channels,
            deep_channels,
            heads,
            (mutual_blocks, self_blocks),
            [deep_blocks] * deep_groups,
            frame_groups,
        )
        self.imnet = ReleasedMLP(channels, hidden, latent_channels, query_chunk)
        self.decoder = WindowUNet(
            latent_channels, decoder_channels, decoder_deep_channels, heads, (0, 1), [1] * decoder_groups, 0
        )
        self.conv = nn.Conv2d(decoder_channels, latent_channels, 1)

    def forward(self, latents: Tensor, size: Size3d) -> Tensor:
        """Upsample (or resample) latents.

        Args:
            latents: normalised, B x C x T x h x w, with T >= 2, h and w at least 64 and, without `crop`, multiples
                of 8.
            size: output latent frames, height and width; the last two are multiples of 8.

        Returns:
            B x C x size in the dtype of `latents`.

        Raises:
            ValueError: for a wrong rank, channel count or size.
        """
        size = self.check_input(latents, size)
        self.check_grids((latents.shape[2], latents.shape[3], latents.shape[4]), size)
        if self.config.crop:
            latents = cropped(latents)
        x = latents.to(self.conv.weight.dtype)
        x = interpolate_latents(x, size, "bilinear") + self.imnet(self.encoder(x), size)
        more = self.decoder(x).transpose(1, 2).flatten(0, 1)
        more = self.conv(more).unflatten(0, (-1, size[0])).transpose(1, 2)
        return (x + more).to(latents.dtype)

    def check_grids(self, given: Size3d, wanted: Size3d) -> None:
        """See BaseVLUer."""
        frames, height, width = given
        if frames < 2 or min(height, width) < 64:
            raise ValueError(
                f"the released VLUer takes at least 2 latent frames of 64 x 64, got {frames} of {height} x {width}"
            )
        if not self.config.crop and (height % MULTIPLE or width % MULTIPLE):
            raise ValueError(
                f"the released VLUer takes latents whose height and width are multiples of {MULTIPLE}, got {height} x "
                f"{width}; crop=True (crop in its config.json) cuts off what is over, as the original does"
            )
        if wanted[1] % MULTIPLE or wanted[2] % MULTIPLE:
            raise ValueError(
                f"the released VLUer gives latents whose height and width are multiples of {MULTIPLE}, asked for "
                f"{wanted[1]} x {wanted[2]}"
            )


def cropped(latents: Tensor) -> Tensor:
    """Latents without the last rows and columns that make no multiple of 8, B x C x T x h x w."""
    height, width = (n // MULTIPLE * MULTIPLE for n in latents.shape[3:])
    return latents[..., :height, :width]


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
        raise FileNotFoundError(f"{path}: {'a folder, expected the file' if path.is_dir() else 'no such file'}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        # torch's own words are long, and advise to run whatever code the file holds.
        raise ValueError(
            f"{path}: cannot be read as a PyTorch file of plain tensors: it is damaged, of another kind, or "
            "holds code, which is not run"
        ) from error
    _check_sums(path)
    model = content.get("model") if isinstance(content, Mapping) else None
    state = model.get("sd") if isinstance(model, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"a dictionary of {', '.join(map(str, list(content)[:4]))}" if isinstance(content, Mapping) else ""
        raise ValueError(
            f"{path}: expected the released VLUer's file, {{model: {{name, args, sd}}, ...}}, "
            f"got {found or type(content).__name__}"
        )
    return state


def _check_sums(path: Path) -> None:
    """Refuse a file whose checksums differ, which torch.load does not compare."""
    if not zipfile.is_zipfile(path):  # before PyTorch 1.6: without checksums
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    if damaged is not None:
        raise ValueError(f"{path}: damaged: the checksum of {damaged} in it differs; download the file again")


def state_mismatch(state: Mapping[str, Tensor], net: ReleasedVLUer) -> str:
    """How a state's names, shapes and types differ from the released one's, in one line; "" where they do not."""
    expected: dict[str, tuple[int, ...]] = {name: tuple(each.shape) for name, each in net.named_parameters()}
    parameters = set(expected)
    for name, (group, buffer) in buffer_names(net).items():
        shape = tuple(getattr(group, buffer).shape)
        expected[name] = shape if buffer == "index" else (1, shape[0] * shape[1], shape[2])
    there = {name: state[name] for name in expected if isinstance(state.get(name), Tensor)}
    wrong = {
        "missing": [name for name in expected if name not in there],
        "unknown": [str(name) for name in state if name not in expected],
        "of another shape": [
            f"{name} ({_sides(each.shape)} instead of {_sides(expected[name])})"
            for name, each in there.items()
            if tuple(each.shape) != expected[name]
        ],
        "not plain numbers": [
            f"{name} ({each.dtype}, {each.layout}, {each.device})"
            for name, each in there.items()
            if not (each.layout == torch.strided and each.is_cpu and not each.is_complex())
            or (name in parameters and each.dtype not in _FLOATS)
        ],
    }
    parts = [f"{len(names)} {what}, such as {min(names)}" for what, names in wrong.items() if names]
    return f"{len(state)} tensors, expected the released VLUer's {len(expected)}: {'; '.join(parts)}" if parts else ""


def _check(path: str | Path, state: Mapping[str, Tensor], net: ReleasedVLUer) -> None:
    """Refuse a state of other names, shapes, types or values than the released one's."""
    wrong = state_mismatch(state, net)
    odd = [] if wrong else [name for name, _ in net.named_parameters() if not state[name].isfinite().all()]
    if wrong or odd:
        raise ValueError(f"{path}: {wrong or f'{len(odd)} not finite, such as {min(odd)}'}")


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
