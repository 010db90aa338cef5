"""What encodes videos and captions for a denoiser: interfaces of latent spaces and texts; sizes that fit a backbone."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from luve_lightning.functional.interpolation import Size3d

# The two sizes of a cascade may differ in shape by a few percent, as the paper's 720x1280 and 1472x2560 do, and by
# the rounding of small ones to whole tokens.
_SHAPE_TOLERANCE = 0.1
_SHOWN = 60  # most characters shown of a cut text


Written = Callable[[int], None]
"""Hears how many of a clip's frames are decoded."""


def unheard(frames: int) -> None:
    """A `Written` that does nothing."""


class LatentSpace(nn.Module, ABC):
    """Pixels to normalised latents and back, with the VAE frozen.

    Latents have about zero mean and unit variance per channel. Only this class knows the compression ratios:
    nothing else multiplies by them. It is made on the VAE's device; later, `to` moves both.

    Args:
        vae: the family's VAE. Its parameters stop requiring gradients.
        tile: greatest height and width in latents of the tiles in which larger frames are encoded and decoded,
            with equal results up to rounding in less memory; None never tiles. It may be changed at any time.
        mean: mean of each channel before normalisation.
        std: standard deviation of each channel before normalisation.
        spatial_ratio: pixels per latent in height and width.
        temporal_ratio: frames per latent frame; the first one is a single frame.
    """

    default_tile: ClassVar[tuple[int, int]] = (64, 64)
    """Tiles of `decode` into a given tensor when `tile` is None, in latents."""
    latents_mean: Tensor
    latents_std: Tensor

    def __init__(
        self,
        vae: nn.Module,
        tile: tuple[int, int] | None,
        mean: Sequence[float],
        std: Sequence[float],
        spatial_ratio: int,
        temporal_ratio: int,
    ) -> None:
        super().__init__()
        self.tile = tile
        self.vae = vae.requires_grad_(False).eval()
        self.channels = len(mean)
        self.spatial_ratio, self.temporal_ratio = spatial_ratio, temporal_ratio
        device = next(vae.parameters()).device
        # float32 whatever the VAE's dtype: normalisation must not round.
        for name, values in (("latents_mean", mean), ("latents_std", std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(1, -1, 1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> LatentSpace:
        """Stay in eval mode: the latent space is a fixed part of every task."""
        del mode
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the VAE's weights."""
        return next(self.vae.parameters()).dtype

    def latent_size(self, frames: int, height: int, width: int) -> Size3d:
        """Latent frames, height and width of a clip.

        Raises:
            ValueError: for a size that the VAE would silently crop; the message names the nearest valid one.
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

    def pixel_size(self, frames: int, height: int, width: int) -> Size3d:
        """Frames, height and width of the clip that latents of this size decode to."""
        return (frames - 1) * self.temporal_ratio + 1, height * self.spatial_ratio, width * self.spatial_ratio

    def normalize(self, latents: Tensor) -> Tensor:
        """(z - mean) / std per channel, in float32 at least; B x C x T x h x w."""
        return (latents - self.latents_mean) / self.latents_std

    def denormalize(self, latents: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        return latents * self.latents_std + self.latents_mean

    @abstractmethod
    def clips_at_once(self, frames: int, height: int, width: int) -> int:
        """Number of clips of this pixel size per pass of `encode` and `decode`; a larger batch takes several."""

    @abstractmethod
    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents of a video: the mode of the posterior, without gradients.

        Args:
            video: B x 3 x T x H x W in [-1, 1]. It may stay on the CPU when frames go in tiles.

        Returns:
            float32, B x C x t x h x w as `latent_size` says.

        Raises:
            ValueError: for a size that the VAE would crop.
        """

    @abstractmethod
    def decode(self, latents: Tensor, *, out: Tensor | None = None, written: Written = unheard) -> Tensor:
        """Video of normalised latents, clamped to [-1, 1], without gradients.

        Args:
            latents: B x C x t x h x w, normalised.
            out: tensor to write the video to, for instance on the CPU: floating B x 3 x T x H x W, or uint8 frames
                B x T x H x W x 3. It is then decoded in tiles, of `default_tile` when `tile` is None.
            written: where `streams`, called after each part with the number of a clip's frames in `out` so far.

        Returns:
            float32, B x 3 x T x H x W as `pixel_size` says; or `out`.
        """

    @abstractmethod
    def decode_differentiable(self, latents: Tensor) -> Tensor:
        """Video of normalised latents with gradients, not clamped: a pixel outside [-1, 1] keeps its gradient.

        Args:
            latents: B x C x t x h x w, normalised.

        Returns:
            B x 3 x T x H x W in the VAE's dtype (or autocast's), nominally in [-1, 1]. The VAE's own parameters get
            no gradient.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of the VAE's configuration and weights, whatever the dtype; stored latents depend on it."""

    def decode_in_tiles(self, latents: Tensor, tile: tuple[int, int]) -> Tensor:
        """The result of `decode`, in tiles of at most this many latents and in the VAE's dtype."""
        before, self.tile = self.tile, tile
        try:
            return self.decode(latents).to(self.dtype)
        finally:
            self.tile = before

    def dry_decode_in_tiles(
        self, latents: Tensor, tile: tuple[int, int], times: Callable[[int], AbstractContextManager[Any]]
    ) -> None:
        """Do what `decode_in_tiles` does on the meta device for counting, equal work once.

        The operations inside `times(n)` count n times.
        """
        with times(1):
            self.decode_in_tiles(latents, tile)

    @property
    def feature_channels(self) -> int:
        """Channels of `features`."""
        return self.channels

    def features(self, video: Tensor) -> Tensor:
        """The encoder's features of a video, B x D x t x h x w: the latents, unless the family has richer ones."""
        return self.encode(video)

    def forget_decoder(self) -> None:
        """Free what only decoding needs, where that is possible."""

    def streams(self, latents: Tensor) -> bool:
        """Whether these latents are decoded a few at a time, so that `out` may be elsewhere without tiles."""
        del latents
        return False

    def build_kernels(self) -> None:  # most families need nothing here
        """Build what decoding on this device would build at its first use, which may take longer than decoding."""

    def wake(self) -> None:  # most families need nothing here
        """Move a VAE that a pipeline has offloaded to the device where it will run."""

    # Training the VAE itself. These take the VAE, whose parameters are trained, not frozen.

    @staticmethod
    @abstractmethod
    def moments(vae: nn.Module, video: Tensor) -> Tensor:
        """Posterior moments with gradients: mean and log-variance stacked, B x 2C x t x h x w, not normalised."""

    @staticmethod
    @abstractmethod
    def pixels(vae: nn.Module, latents: Tensor) -> Tensor:
        """Video of latents that are not normalised, with gradients to latents and VAE, not clamped."""

    @staticmethod
    @abstractmethod
    def set_statistics(vae: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        """Write the statistics that normalise latents into the VAE's configuration."""


@dataclass(frozen=True)
class SizeRules:
    """The multiples that a video's pixels and frames must be.

    Attributes:
        step: divides height and width: the size of one token, 16 for Wan2.1.
        frames: divides the number of frames minus one: 4 for Wan2.1.
    """

    step: int
    frames: int

    def nearest(self, pixels: float) -> int:
        """The possible height or width nearest to a number of pixels."""
        return max(self.step, round(pixels / self.step) * self.step)

    def check(self, num_frames: int, **sides: int) -> None:
        """Refuse what the models would silently crop; `sides` are heights and widths by option name.

        Raises:
            ValueError: names the option and the nearest possible values.
        """
        for name, pixels in sides.items():
            if pixels < self.step or pixels % self.step:
                low = max(self.step, pixels // self.step * self.step)
                raise ValueError(
                    f"{name} {pixels}: expected a multiple of {self.step}, nearest are {low} and {low + self.step}"
                )
        if num_frames < 1 or (num_frames - 1) % self.frames:
            low = max(0, (num_frames - 1) // self.frames) * self.frames + 1
            raise ValueError(
                f"num_frames {num_frames}: expected {self.frames}k + 1, nearest are {low} and {low + self.frames}"
            )

    def check_cascade(self, motion: tuple[int, int], output: tuple[int, int]) -> None:
        """Refuse a video whose height and width are smaller than its first stage's, or of another shape.

        Raises:
            ValueError: gives values that fit.
        """
        height, width = motion
        if height > output[0] or width > output[1]:
            raise ValueError(
                f"motion_height x motion_width {height}x{width}: larger than the video's {output[0]}x{output[1]}"
            )
        same = output[1] * height / output[0]  # the width of exactly this shape
        if abs(width - same) > max(_SHAPE_TOLERANCE * same, self.step):
            scale = (height * width / (output[0] * output[1])) ** 0.5
            fits = [self.nearest(side * scale) for side in output]
            raise ValueError(
                f"motion_height x motion_width {height}x{width}: another shape than the video's "
                f"{output[0]}x{output[1]}; {fits[0]}x{fits[1]} would fit"
            )


class CutTextWarning(UserWarning):
    """A text is longer than the text encoder reads."""


@dataclass(frozen=True)
class CutText:
    """What a text encoder does not see of a text.

    Attributes:
        tokens: number of tokens of the whole text, including the end token.
        length: number of tokens it sees.
        rest: the words from the first that is not seen whole.
    """

    tokens: int
    length: int
    rest: str

    def __str__(self) -> str:
        shown = self.rest if len(self.rest) <= _SHOWN else f"{self.rest[:_SHOWN]}..."
        return f"{self.tokens} tokens, of which the text encoder sees {self.length}; cut off: {shown!r}"


class TextConditioner(nn.Module, ABC):
    """Captions to the embeddings for the transformer's cross-attention, all padded to one length.

    Args:
        tokenizer: the family's tokenizer.
        encoder: the family's text encoder.
        length: tokens per caption, padding included; default the backbone's own.
    """

    length: int

    def __init__(self, tokenizer: Any, encoder: nn.Module, length: int | None = None) -> None:
        super().__init__()
        self.tokenizer, self.encoder = tokenizer, encoder
        self.length = self.own_length(tokenizer) if length is None else length
        if self.length < 1:
            raise ValueError(f"length: expected at least 1 token, got {self.length}")

    @staticmethod
    @abstractmethod
    def own_length(tokenizer: Any) -> int:
        """Default number of tokens per caption."""

    @staticmethod
    @abstractmethod
    def states(encoder: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The text encoder's output for token ids B x L, B x L x dim; padding is masked where `mask` is 0."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """Width of an embedding."""

    @abstractmethod
    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask (1 where there is a token), both int64 B x `length`, on the CPU.

        A caption's own tokens come first; padding follows.
        """

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings of tokens, B x length x dim, zero past each caption's end."""
        device = next(self.encoder.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        states = self.states(self.encoder, ids, mask)
        # Not `.to(device)`: an offloaded encoder's weights are on another device.
        return states * mask.gt(0).unsqueeze(-1).to(states)

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Embeddings of captions, B x length x dim, on the encoder's device."""
        return self.embed(*self.tokenize(captions))

    @abstractmethod
    def cut(self, text: str) -> CutText | None:
        """What is cut off a text that is longer than `length` tokens; None when nothing is."""

    @abstractmethod
    def vocabulary(self) -> Mapping[str, int]:
        """Every token with its number."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of tokenizer, configuration and weights; stored embeddings depend on it and on the length."""

    def warn_of_cuts(self, texts: Iterable[str]) -> bool:
        """Warn of texts that are cut, with a count and the first of them; returns whether there was any."""
        cuts = [(text, cut) for text in dict.fromkeys(texts) if (cut := self.cut(text)) is not None]
        if cuts:
            text, cut = cuts[0]
            more = f" (the first of {len(cuts)})" if len(cuts) > 1 else ""
            warnings.warn(f"the prompt {text[:_SHOWN]!r}... has {cut}{more}", CutTextWarning, stacklevel=3)
        return bool(cuts)
