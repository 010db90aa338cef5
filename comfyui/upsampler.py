"""A VLUer for raw latents: normalise, upsample, denormalise. Nothing here needs ComfyUI."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:  # importing the package takes seconds, by which ComfyUI would start later
    from luve_lightning.models.backbones import LatentSpace
    from luve_lightning.models.vluer import BaseVLUer

WAN_CHANNELS = 16
"""Channels of Wan2.1's latents."""
# Memory of a pass per output latent and byte of a weight. `luve bench --subject vluer` measured 0.8 GiB for ours in
# bfloat16 and 33.3 GiB for the released code in float32, both to 13 x 184 x 320 latents.
_BYTES = {"VLUer": 600, "ReleasedVLUer": 12_000}


@dataclass(frozen=True)
class Upsampler:
    """A VLUer, and the latent space whose statistics it works with.

    ComfyUI passes latents as the VAE gives them; a VLUer takes and gives normalised ones.

    Attributes:
        name: of its folder, for messages.
        net: the VLUer.
        space: normalises, and knows the pixels of a latent. Its VAE is empty.
    """

    name: str
    net: BaseVLUer
    space: LatentSpace

    def check(self, latents: Tensor) -> None:
        """Refuse what holds no latents of this VLUer's space.

        Raises:
            ValueError: for another kind of latents.
        """
        if latents.is_nested or latents.ndim not in (4, 5):
            raise ValueError(
                "latents: expected those of images, B x C x h x w, or of videos, B x C x T x h x w, got "
                f"{'several kinds in one' if latents.is_nested else f'shape {tuple(latents.shape)}'}"
            )
        if latents.shape[1] != self.space.channels:
            raise ValueError(
                f"latents have {latents.shape[1]} channels, the VLUer {self.name} takes {self.space.channels}"
            )
        if not torch.count_nonzero(latents):
            raise ValueError("latents are empty (all zero): connect what a sampler or a VAE made")

    def size(self, latents: Tensor, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns of an output of this many pixels.

        Raises:
            ValueError: for pixels that are no whole latents; names the nearest that are.
        """
        frames = latents.shape[2] if latents.ndim == 5 else 1
        return self.space.latent_size(self.space.pixel_size(frames, 1, 1)[0], height, width)

    def size_by(self, latents: Tensor, factor: float) -> tuple[int, int, int]:
        """Latent frames, rows and columns of an output this many times as high and wide.

        Raises:
            ValueError: when that is no whole number of latents.
        """
        ratio = self.space.spatial_ratio
        pixels = []
        for name, given in (("height", latents.shape[-2]), ("width", latents.shape[-1])):
            count = given * factor
            if abs(count - round(count)) > 1e-6 * count:
                low = int(count) * ratio
                raise ValueError(
                    f"factor {factor:g}: {name} {given * ratio} would become {count * ratio:g}, expected a multiple of "
                    f"{ratio}, nearest are {low} and {low + ratio}; LuVe Upsample Latent takes a size"
                )
            pixels.append(round(count) * ratio)
        return self.size(latents, *pixels)

    def check_size(self, latents: Tensor, size: tuple[int, int, int]) -> None:
        """Refuse sizes that this VLUer cannot take.

        Raises:
            ValueError: for such a size.
        """
        self.net.check_grids((size[0], latents.shape[-2], latents.shape[-1]), size)

    def memory(self, size: tuple[int, int, int]) -> int:
        """Bytes to make free for the weights and a pass of one sample to this size."""
        weights = list(self.net.parameters())
        per_latent = _BYTES.get(type(self.net).__name__, max(_BYTES.values()))
        held = sum(each.numel() * each.element_size() for each in weights)
        return held + size[0] * size[1] * size[2] * per_latent * weights[0].element_size()

    def to(self, device: torch.device) -> None:
        """Move weights and statistics."""
        self.net.to(device)
        self.space.to(device)

    @torch.no_grad()
    def __call__(self, latents: Tensor, size: tuple[int, int, int]) -> Tensor:
        """Raw latents of another size.

        Args:
            latents: as the VAE gives them, B x C x T x h x w or B x C x h x w, on the weights' device.
            size: latent frames, rows and columns.

        Returns:
            Raw latents of that size and the same rank, in float32.
        """
        video = latents if latents.ndim == 5 else latents.unsqueeze(2)
        normalised = self.space.normalize(video.float())
        out = self.space.denormalize(self.net(normalised, size))
        return out if latents.ndim == 5 else out.squeeze(2)


def load(folder: Path, dtype: torch.dtype) -> Upsampler:
    """The VLUer of a folder, on the CPU.

    Args:
        folder: a saved VLUer. `vae/config.json` in it is the configuration of the VAE whose latents it upsamples;
            without one they are Wan2.1's.
        dtype: of the weights.

    Raises:
        FileNotFoundError: without a config.json there.
        ValueError: when files are damaged, or the VAE has another number of channels.
    """
    from luve_lightning.models.vluer import load_vluer

    net = load_vluer(folder, torch_dtype=dtype).eval().requires_grad_(False)
    channels = net.config.latent_channels
    own = (folder / "vae" / "config.json").is_file()
    if not own and channels != WAN_CHANNELS:
        raise ValueError(
            f"{folder}: takes {channels} latent channels, Wan2.1's have {WAN_CHANNELS}; copy the configuration of its "
            "backbone's VAE to vae/config.json in this folder"
        )
    space = latent_space(folder if own else None)
    if channels != space.channels:
        raise ValueError(f"{folder}: takes {channels} latent channels, its vae/config.json has {space.channels}")
    whose = "those of its vae/config.json" if own else "Wan2.1's"
    logging.info("LuVe: %s, %s parameters; latents are %s", folder, f"{net.num_parameters():,}", whose)
    return Upsampler(folder.name, net, space)


def latent_space(folder: Path | None = None) -> LatentSpace:
    """The latent space of a VAE's configuration, without the VAE's weights.

    Args:
        folder: holds `vae/config.json`; default Wan2.1's.

    Raises:
        ValueError: for a damaged configuration or an unknown VAE.
    """
    from luve_lightning.model_folders import read_config
    from luve_lightning.models.backbones import family_named, latent_space_of, load_backbone

    config: dict[str, Any] = {} if folder is None else read_config(folder, "vae")
    family = family_named("wan") if folder is None else type(load_backbone(folder / "vae"))
    with torch.device("meta"):
        vae = family.from_config("vae", config)
    # The statistics are made where the VAE's first parameter is; the weights' own have no place.
    vae.register_parameter("place", nn.Parameter(torch.empty(0), requires_grad=False))
    space = latent_space_of(vae)
    space.vae = nn.Identity()  # what has no values cannot be moved to a device
    return space


def resized_mask(mask: Tensor, rows: int, columns: int) -> Tensor:
    """A noise mask with the rows and columns of new latents; its other axes stay.

    Samplers resize a mask in the same way, so this changes nothing for them.
    """
    planes = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    return F.interpolate(planes, size=(rows, columns), mode="bilinear").reshape(*mask.shape[:-2], rows, columns)
