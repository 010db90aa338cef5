"""VLUer, the video latent upsampler of LuVe (arXiv 2602.11564): z_hat = Decoder(U(F, Q)) + interpolation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from luve_lightning.functional.interpolation import Size3d, check_size, interpolate_latents
from luve_lightning.models.folders import load_whole, read_config, saving
from luve_lightning.models.vluer.decoder import Decoder
from luve_lightning.models.vluer.encoder import Encoder
from luve_lightning.models.vluer.implicit import ImplicitUpsampler


class VLUer(ModelMixin, ConfigMixin):
    """Upsamples normalised video latents to any size, in space and in time.

    The defaults are the base size (17.9 M parameters, for Wan2.1). The mini world's is in experiments/vluer/mini.yaml.

    Args:
        latent_channels: channels of the VAE's latents.
        channels: feature channels of the encoder.
        pairs: residual pairs of the encoder.
        hidden: width of the implicit upsampler's MLP.
        layers: its hidden-to-hidden layers.
        query_channels: channels between the implicit upsampler and the decoder.
        decoder_layers: residual convolutions of the decoder.
        use_decoder: without it the implicit upsampler gives the latents itself (Table 12, "w/o decoder").
        use_cell: tell the implicit upsampler the query's cell size.
        query_chunk: queries at a time when no gradient is needed.
    """

    _supports_gradient_checkpointing = False

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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote; see diffusers.

        Raises:
            FileNotFoundError: when it is not there.
            ValueError: when files are damaged, or hold other weights than the configuration asks for.
        """
        if kwargs.pop("output_loading_info", False):
            return super().from_pretrained(
                str(pretrained_model_name_or_path), output_loading_info=True, **kwargs
            )
        if (Path(pretrained_model_name_or_path) / "config.json").is_file():
            read_config(pretrained_model_name_or_path, "")
        return load_whole(cls, pretrained_model_name_or_path, kwargs.pop("subfolder", None) or "", **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the model for `from_pretrained`: the folder holds the old model or the whole new one; see diffusers."""
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with saving(save_directory) as new:
            super().save_pretrained(str(new), **kwargs)

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
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels:
            raise ValueError(f"latents must be B x {channels} x T x h x w, got shape {tuple(latents.shape)}")
        if 0 in latents.shape:
            raise ValueError(f"latents have an empty axis: shape {tuple(latents.shape)}")
        size = check_size(size)
        x = latents.to(self.encoder.conv_in.weight.dtype)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        x = self.decoder(self.upsampler(self.encoder(x), size))
        return interpolate_latents(latents, size, "bilinear") + x.to(latents.dtype)

    def num_parameters(self, *args: Any, **kwargs: Any) -> int:
        """Number of parameters; see diffusers' ModelMixin."""
        return int(super().num_parameters(*args, **kwargs))
