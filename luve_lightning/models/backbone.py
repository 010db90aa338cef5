"""The backbone's latent space: loading the VAE, normalisation, and every compression ratio.

A backbone is a diffusers pipeline folder or hub id. Nothing outside this module multiplies by 8 or 4, or touches
`latents_mean`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from luve_lightning.models.folders import is_local, load_whole
from luve_lightning.models.tiled_decode import decode_tiled
from luve_lightning.models.tiled_encode import encode_tiled
from luve_lightning.models.wan_tiles import DEFAULT_TILE
from luve_lightning.models.wan_whole_clip import decode_whole_clip, encode_whole_clip

# Pixels (batch x frames x height x width) up to which a clip is encoded or decoded in one pass. diffusers' chunked
# form bounds memory beyond it; both give the same numbers to rounding. 2**22 pixels are 114 frames at 192x192.
WHOLE_CLIP_PIXELS = 2**22


def load_vae(backbone: str | Path, dtype: torch.dtype | None = None) -> AutoencoderKLWan:
    """Load `vae/` of a backbone.

    Args:
        backbone: a local pipeline folder, or a hub id such as "Wan-AI/Wan2.1-T2V-1.3B-Diffusers".
        dtype: dtype of the weights; float32 when None, whatever is on disk.

    Raises:
        FileNotFoundError: when it is neither a folder with a VAE nor a hub id whose files can be had.
        ValueError: when its files are damaged or of another model.
    """
    local = is_local(backbone)
    if local and not (Path(backbone) / "vae" / "config.json").is_file():
        raise FileNotFoundError(
            f"backbone {backbone}: no vae/config.json there; expected a diffusers pipeline folder"
        )
    vae: AutoencoderKLWan = load_whole(
        AutoencoderKLWan,
        backbone,
        "vae",
        torch_dtype=dtype or torch.float32,
        local_files_only=local,
    )
    return vae


class LatentCodec(nn.Module):
    """Pixels to normalised latents and back, with the VAE frozen.

    Latents are (z - latents_mean) / latents_std with the statistics of the VAE's config, as diffusers' pipelines
    do it, so that they have about zero mean and unit variance per channel.

    Args:
        vae: a Wan2.1 VAE. Its parameters stop requiring gradients, and on a CPU they are laid out for speed.
        tile: greatest height and width in latents of the tiles in which larger frames are encoded and decoded, the
            same numbers to rounding in less memory (`models/tiled_decode`); None never does. It may be changed
            at any time.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, vae: AutoencoderKLWan, tile: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.tile = tile
        self.vae = vae.requires_grad_(False).eval()
        self.channels: int = vae.config.z_dim
        self.spatial_ratio: int = vae.config.scale_factor_spatial
        self.temporal_ratio: int = vae.config.scale_factor_temporal
        shape = (1, self.channels, 1, 1, 1)
        # float32 whatever the VAE's dtype: normalisation must not round.
        for name in ("latents_mean", "latents_std"):
            self.register_buffer(name, torch.tensor(vae.config[name]).view(shape), persistent=False)
        self._lay_out_weights()

    @classmethod
    def from_pretrained(cls, backbone: str | Path, dtype: torch.dtype | None = None) -> LatentCodec:
        """Load the VAE of a backbone folder or hub id; see `load_vae`."""
        return cls(load_vae(backbone, dtype))

    def train(self, mode: bool = True) -> LatentCodec:
        """Stay in eval mode: the codec is a fixed part of every task."""
        del mode
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LatentCodec:
        """What `to`, `cuda`, `half` and the like call."""
        super()._apply(fn, recurse)
        self._lay_out_weights()
        return self

    def _lay_out_weights(self) -> None:
        """Store convolutions channels last on a CPU: encoding, decoding and its gradient take 60 % of the time.

        Elsewhere the layout is PyTorch's own, whatever the weights went through.
        """
        for module in self.vae.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                formats = {2: torch.channels_last, 3: torch.channels_last_3d}
                on_cpu = module.weight.device.type == "cpu"
                layout = formats[len(module.kernel_size)] if on_cpu else torch.contiguous_format
                module.weight.data = module.weight.data.contiguous(memory_format=layout)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the VAE's weights."""
        return next(self.vae.parameters()).dtype

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, height and width of a clip.

        Raises:
            ValueError: for a size that the VAE would crop silently; the message names the nearest valid one.
        """
        s, t = self.spatial_ratio, self.temporal_ratio
        if frames < 1 or (frames - 1) % t:
            low = max(0, (frames - 1) // t) * t + 1
            raise ValueError(f"{frames} frames: expected {t}k + 1, nearest are {low} and {low + t}")
        for name, n in (("height", height), ("width", width)):
            if n < s or n % s:
                low = max(s, n // s * s)
                raise ValueError(f"{name} {n}: expected a multiple of {s}, nearest are {low} and {low + s}")
        return (frames - 1) // t + 1, height // s, width // s

    def pixel_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Frames, height and width of the clip that latents of this size decode to."""
        return (frames - 1) * self.temporal_ratio + 1, height * self.spatial_ratio, width * self.spatial_ratio

    def clips_at_once(self, frames: int, height: int, width: int) -> int:
        """Clips of this pixel size that `encode` and `decode` take in one pass; a larger batch takes several."""
        return max(1, WHOLE_CLIP_PIXELS // (frames * height * width))

    def _takes_whole(self, frames: int, height: int, width: int) -> bool:
        return frames * height * width <= WHOLE_CLIP_PIXELS and not self.vae.use_tiling

    def _tile_for(self, height: int, width: int) -> tuple[int, int] | None:
        """The tile in which latent frames of this size go; None for frames that are no larger."""
        fits = self.tile is None or (height <= self.tile[0] and width <= self.tile[1])
        return None if fits else self.tile

    def normalize(self, latents: Tensor) -> Tensor:
        """(z - mean) / std per channel, in float32 at least; B x C x T x h x w."""
        return (latents - self.latents_mean) / self.latents_std

    def denormalize(self, latents: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        return latents * self.latents_std + self.latents_mean

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents of a video: the mode of the posterior.

        Args:
            video: B x 3 x T x H x W in [-1, 1]; T = 4k + 1, H and W multiples of the spatial ratio. When frames go in
                tiles it may stay on the CPU.

        Returns:
            float32, B x C x (T-1)/4+1 x H/8 x W/8.

        Raises:
            ValueError: for a size the VAE would crop.
        """
        frames, height, width = video.shape[2:]
        _, h, w = self.latent_size(frames, height, width)
        if tile := self._tile_for(h, w):
            clips = [encode_tiled(self.vae, clip, tile) for clip in video.split(1)]
            return self.normalize(torch.cat(clips).chunk(2, dim=1)[0].float())
        whole = self._takes_whole(frames, height, width)
        means = []
        for part in video.to(self.dtype).split(self.clips_at_once(frames, height, width)):
            moments = (
                encode_whole_clip(self.vae, part) if whole else self.vae.encode(part).latent_dist.parameters
            )
            means.append(moments.chunk(2, dim=1)[0])
        return self.normalize(torch.cat(means).float())

    @torch.no_grad()
    def decode(self, latents: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Video of normalised latents, clamped to [-1, 1].

        Args:
            latents: B x C x t x h x w, normalised.
            out: where to write the video, for instance on the CPU, or as uint8 frames: see `decode_tiled`, which
                then does it, with its own tile when this codec has none.

        Returns:
            float32, B x 3 x 4(t-1)+1 x 8h x 8w; or `out`.
        """
        size = self.pixel_size(latents.shape[2], latents.shape[3], latents.shape[4])
        if out is not None or self._tile_for(latents.shape[3], latents.shape[4]):
            return self._decode_tiles(latents, out, (len(latents), 3, *size))
        whole = self._takes_whole(*size)
        videos = []
        for part in self.denormalize(latents.float()).to(self.dtype).split(self.clips_at_once(*size)):
            video = decode_whole_clip(self.vae, part) if whole else self.vae.decode(part).sample
            videos.append(video.float().clamp(-1, 1))
        return torch.cat(videos)

    def _decode_tiles(self, latents: Tensor, out: Tensor | None, size: tuple[int, ...]) -> Tensor:
        """Clip by clip into one tensor."""
        out = latents.new_empty(size, dtype=torch.float32) if out is None else out
        if len(out) != len(latents):
            raise ValueError(f"out: for {len(out)} clips; the latents are of {len(latents)}")
        for clip, place in zip(self.denormalize(latents.float()).split(1), out.split(1), strict=True):
            decode_tiled(self.vae, clip, self.tile or DEFAULT_TILE, out=place)
        return out

    def decode_differentiable(self, latents: Tensor) -> Tensor:
        """Video of normalised latents with gradients, without the clamp that would zero them out of range.

        Peak memory is one decoder block's activations: blocks are recomputed in the backward pass. The VAE's own
        parameters get no gradient.

        Args:
            latents: B x C x t x h x w, normalised.

        Returns:
            B x 3 x 4(t-1)+1 x 8h x 8w in the VAE's dtype (or autocast's), nominally in [-1, 1].
        """
        z = self.denormalize(latents.float()).to(self.dtype)
        return decode_whole_clip(self.vae, z, checkpointed=True)

    def fingerprint(self) -> str:
        """sha256 of the VAE's configuration and weights: what a stored latent depends on.

        Weights are hashed as float32, so the same VAE loaded as bfloat16 from a bfloat16 file agrees with itself.
        """
        config = {k: v for k, v in dict(self.vae.config).items() if not k.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
