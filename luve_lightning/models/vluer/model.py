"""VLUer: encoder, implicit upsampler and decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from luve_lightning.functional.interpolation import (
    Size3d,
    cell_size,
    check_size,
    interpolate_latents,
    nearest_indices,
    relative_offsets,
    take_sorted,
)
from luve_lightning.model_folders import load_whole, read_config, saving


class ResidualPair(nn.Module):
    """x + Conv(SiLU(Conv(x))), 3x3x3, no normalisation (latents are normalised already).

    The second convolution starts at zero, so a deep stack starts as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """B x C x T x h x w to the same shape."""
        return x + self.conv2(F.silu(self.conv1(x)))


class Encoder(nn.Module):
    """A convolution into `channels`, then residual pairs.

    The released model's encoder attends in windows of (6, 8, 8) (VRT); convolutions of 3x3x3 have as many weights
    and run at the arithmetic limit of the GPU. See `luve bench --subject vluer`.
    """

    def __init__(self, in_channels: int, channels: int, pairs: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv3d(in_channels, channels, 3, padding=1)
        self.pairs = nn.ModuleList(ResidualPair(channels) for _ in range(pairs))

    def forward(self, latents: Tensor) -> Tensor:
        """B x in_channels x T x h x w to B x channels x T x h x w."""
        x = self.conv_in(latents)
        for pair in self.pairs:
            x = pair(x)
        return x


class ImplicitUpsampler(nn.Module):
    """An MLP over (nearest 3x3x3 features, relative coordinates, cell size).

    Args:
        channels: feature channels C.
        hidden: width of the MLP.
        layers: number of hidden-to-hidden layers after the first.
        out_channels: D.
        use_cell: give the MLP the size of the query's cell (LIIF's cell decoding); without it the output at a
            point does not know the scale.
        query_chunk: queries per chunk without gradients; bounds memory and changes nothing else.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        layers: int,
        out_channels: int,
        use_cell: bool = True,
        query_chunk: int = 2**18,
    ) -> None:
        super().__init__()
        self.first = nn.Conv3d(channels, hidden, 3, padding=1)
        # Columns: offset t, y, x, then cell t, y, x.
        self.coordinates = nn.Linear(6 if use_cell else 3, hidden, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.last = nn.Linear(hidden, out_channels)
        self.use_cell, self.query_chunk = use_cell, query_chunk

    def _axis_tables(self, n_in: Size3d, n_out: Size3d, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """For each axis, every output position's contribution to the first layer: (n, hidden)."""
        weight = self.coordinates.weight.to(torch.float32)
        tables = []
        for axis in range(3):
            offsets = relative_offsets(n_in[axis], n_out[axis], device)
            table = offsets[:, None] * weight[:, axis]
            if self.use_cell:
                table = table + cell_size(n_in[axis], n_out[axis]) * weight[:, 3 + axis]
            tables.append(table.to(dtype))
        return tables

    def _query(self, x: Tensor) -> Tensor:
        x = F.silu(x)
        for layer in self.hidden:
            x = F.silu(layer(x))
        return self.last(x)

    def forward(self, features: Tensor, size: Size3d) -> Tensor:
        """Query every position of an output grid.

        Args:
            features: B x C x T x h x w.
            size: output frames, height, width, each >= 1.

        Returns:
            B x D x size.
        """
        n_in: Size3d = (features.shape[2], features.shape[3], features.shape[4])
        device = features.device
        first = self.first(features).permute(0, 2, 3, 4, 1)
        add_t, add_y, add_x = self._axis_tables(n_in, size, device, first.dtype)
        index_t, index_y, index_x = (nearest_indices(i, o, device) for i, o in zip(n_in, size, strict=True))
        plane = add_y[:, None] + add_x

        frames_per_chunk = size[0]
        if not torch.is_grad_enabled():
            frames_per_chunk = max(1, self.query_chunk // (size[1] * size[2] * features.shape[0]))
        chunks = []
        for start in range(0, size[0], frames_per_chunk):
            t = slice(start, start + frames_per_chunk)
            x = first
            for axis, index in enumerate((index_t[t], index_y, index_x)):
                x = take_sorted(x, axis + 1, index, most=-(-size[axis] // n_in[axis]))
            x = x + (add_t[t, None, None] + plane)
            chunks.append(self._query(x))
        out = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)
        # Channels come last in memory, where the decoder's convolutions run fastest.
        return out.permute(0, 4, 1, 2, 3)


def widened_conv3d(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """`conv(x)`, by a convolution with as many output channels as input channels, those beyond `conv`'s being zero.

    cuDNN 9 computes the weight gradient of few bfloat16 output channels (64 to 16) without tensor cores wherever the
    grid is not a power of two: on an H100 158 ms at 11 x 192 x 192, and 1.7 ms with forty-eight channels of zeros.

    Args:
        conv: with a bias, stride 1, no groups and at most as many output channels as input channels.
        x: B x input channels x T x H x W.

    Returns:
        B x output channels x T x H x W.
    """
    assert conv.bias is not None
    missing = conv.in_channels - conv.out_channels
    weight = F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, 0, 0, missing))
    wide = F.conv3d(x, weight, F.pad(conv.bias, (0, missing)), padding=conv.padding)
    return wide[:, : conv.out_channels]


class Decoder(nn.Module):
    """A few 3x3x3 convolutions at the output resolution.

    `layers` residual ones come before the last, which starts at zero, so that an untrained VLUer is exactly its
    interpolation.
    """

    def __init__(self, channels: int, out_channels: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv3d(channels, channels, 3, padding=1) for _ in range(layers))
        self.conv_out = nn.Conv3d(channels, out_channels, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """B x channels x T x H x W to B x out_channels x T x H x W."""
        for layer in self.layers:
            x = x + F.silu(layer(x))
        x = F.silu(x)
        narrow = self.conv_out.out_channels < self.conv_out.in_channels
        if narrow and x.is_cuda and torch.is_grad_enabled() and self.conv_out.weight.requires_grad:
            return widened_conv3d(self.conv_out, x)
        out: Tensor = self.conv_out(x)
        return out


class BaseVLUer(ModelMixin, ConfigMixin):
    """A model that upsamples normalised video latents; its configuration has `latent_channels`.

    A subclass is named in `luve_lightning.models.vluer`, where `load_vluer` finds it.
    """

    _supports_gradient_checkpointing = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote; see diffusers.

        Raises:
            FileNotFoundError: when it does not exist.
            ValueError: when files are damaged, or hold other weights than the configuration requires.
        """
        if kwargs.pop("output_loading_info", False):
            return super().from_pretrained(str(pretrained_model_name_or_path), output_loading_info=True, **kwargs)
        if (Path(pretrained_model_name_or_path) / "config.json").is_file():
            read_config(pretrained_model_name_or_path, "")
        return load_whole(cls, pretrained_model_name_or_path, kwargs.pop("subfolder", None) or "", **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the model for `from_pretrained`, atomically; see diffusers."""
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with saving(save_directory) as new:
            super().save_pretrained(str(new), **kwargs)

    def forward(self, latents: Tensor, size: Size3d) -> Tensor:
        """Upsample latents B x C x T x h x w to `size`: latent frames, height and width."""
        raise NotImplementedError

    def check_grids(self, given: Size3d, wanted: Size3d) -> None:
        """Refuse latent sizes that the model cannot take or give; by default it takes all.

        Args:
            given: latent frames, height and width of the input.
            wanted: those of the output.

        Raises:
            ValueError: for such a size.
        """

    def check_input(self, latents: Tensor, size: Size3d) -> Size3d:
        """The output size as three integers.

        Raises:
            ValueError: for latents of a wrong rank or channel count, an empty axis, or a size below 1.
        """
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels:
            raise ValueError(f"latents must be B x {channels} x T x h x w, got shape {tuple(latents.shape)}")
        if 0 in latents.shape:
            raise ValueError(f"latents have an empty axis: shape {tuple(latents.shape)}")
        return check_size(size)


class VLUer(BaseVLUer):
    """Upsamples normalised video latents to any size, in space and in time.

    The defaults are the base size (17.7 M parameters, for Wan2.1). The mini world's is in
    experiments/vluer/mini.yaml.

    Args:
        latent_channels: channels of the VAE's latents.
        channels: feature channels of the encoder.
        pairs: number of residual pairs in the encoder.
        hidden: width of the implicit upsampler's MLP.
        layers: number of its hidden-to-hidden layers.
        query_channels: channels between the implicit upsampler and the decoder.
        decoder_layers: number of residual convolutions in the decoder.
        use_decoder: without it the implicit upsampler returns the latents itself (Table 12, "w/o decoder").
        use_cell: tell the implicit upsampler the query's cell size.
        query_chunk: queries at a time when no gradient is needed.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        channels: int = 192,
        pairs: int = 8,
        hidden: int = 256,
        layers: int = 2,
        query_channels: int = 64,
        decoder_layers: int = 2,
        use_decoder: bool = True,
        use_cell: bool = True,
        query_chunk: int = 2**18,
    ) -> None:
        super().__init__()
        sizes = {"latent_channels": latent_channels, "channels": channels, "hidden": hidden,
                 "query_channels": query_channels, "query_chunk": query_chunk}  # fmt: skip
        depths = {"pairs": pairs, "layers": layers, "decoder_layers": decoder_layers}
        for least, numbers in ((1, sizes), (0, depths)):
            for name, number in numbers.items():
                if number < least:
                    raise ValueError(f"{name}: expected {least} or more, got {number}")
        self.encoder = Encoder(latent_channels, channels, pairs)
        out = query_channels if use_decoder else latent_channels
        self.upsampler = ImplicitUpsampler(channels, hidden, layers, out, use_cell, query_chunk)
        self.decoder: nn.Module
        if use_decoder:
            self.decoder = Decoder(query_channels, latent_channels, decoder_layers)
        else:
            self.decoder = nn.Identity()
            for parameter in self.upsampler.last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, latents: Tensor, size: Size3d) -> Tensor:
        """Upsample (or resample) latents.

        Args:
            latents: normalised, B x C x T x h x w.
            size: output latent frames, height and width, each >= 1; scales may differ per axis and need not be
                integers.

        Returns:
            B x C x size in the dtype of `latents`.

        Raises:
            ValueError: for a wrong rank, channel count or size.
        """
        size = self.check_input(latents, size)
        x = latents.to(self.encoder.conv_in.weight.dtype)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        x = self.decoder(self.upsampler(self.encoder(x), size))
        return interpolate_latents(latents, size, "bilinear") + x.to(latents.dtype)
