"""Clips or videos upsampled by several methods, written as lossless videos, one folder per method."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luve_lightning.cascade.upsampling import LatentUpsampler
from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.clips import read_clip
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.video_files import write_picture, write_video
from luve_lightning.data.video_index import ClipEntry
from luve_lightning.evaluation.super_resolution import super_resolved
from luve_lightning.evaluation.video_sets import PROMPT
from luve_lightning.files import Behind, find_json, one_ahead, one_behind, write_text
from luve_lightning.functional.frame_times import exact_rate, refusal
from luve_lightning.functional.pixels import fit_frames, frames_to_video, resize_video, video_to_frames
from luve_lightning.machine import UnitTimes
from luve_lightning.models.backbones import LatentSpace
from luve_lightning.models.super_resolution import PixelSuperResolver

REFERENCE = "reference"
# The high-resolution latents themselves: the VAE's reconstruction of the clip, the ceiling for upsamplers of latents.
CEILING = "vae"
# Two to four clips per pass decode fastest on a CPU: for one, PyTorch uses a slower convolution; more miss the cache.
DECODED_TOGETHER = 3
_VERSION = 1  # version of the output; raise it when the same recipe gives other pixels


@dataclass(frozen=True)
class UpsamplingRecipe:
    """What is made from each clip.

    Attributes:
        size: height and width of the high resolution, pixels; clips are cropped to its shape and downscaled.
        scale: high over low resolution.
        frames: frames of each clip, 4k + 1.
        start: first of them.
        stride: read every stride-th frame.
        caption: column of the index that becomes the prompt.
        fps: read clips as ones of this many frames a second, see `read_clip`; None takes their frames as they are.
    """

    size: tuple[int, int]
    scale: float
    frames: int
    start: int = 0
    stride: int = 1
    caption: str = "Summarized Description"
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.fps is not None:
            exact_rate(self.fps)

    def low_size(self, codec: LatentSpace) -> tuple[int, int]:
        """Height and width of the low resolution.

        Raises:
            ValueError: a size or scale that the VAE cannot make.
        """
        codec.latent_size(self.frames, *self.size)
        if not 1 < self.scale < float("inf"):
            raise ValueError(f"scale: expected a number > 1, got {self.scale}")
        exact = Fraction(str(self.scale))  # 1.1 is 11/10 here, not the nearest binary fraction
        low = [side / exact for side in self.size]
        if any(side.denominator != 1 for side in low):
            made = " x ".join(f"{float(side):g}" for side in low)
            raise ValueError(f"scale {self.scale:g} makes {self.size[0]} x {self.size[1]} into {made} pixels")
        height, width = int(low[0]), int(low[1])
        codec.latent_size(self.frames, height, width)
        return height, width


@dataclass(frozen=True)
class EnlargingRecipe:
    """What is made from each video, which is the low resolution itself.

    Attributes:
        size: height and width of the high resolution, pixels; None is `scale` times each video's own.
        scale: high over low resolution, where `size` is None.
        frames: the first frames that are taken; None takes all.
    """

    size: tuple[int, int] | None = None
    scale: float | None = None
    frames: int | None = None

    def __post_init__(self) -> None:
        if (self.size is None) == (self.scale is None):
            raise ValueError("videos: expected size, or scale and not both")
        if self.scale is not None and not 1 < self.scale < float("inf"):
            raise ValueError(f"scale: expected a number > 1, got {self.scale}")
        if min(*(self.size or (1, 1)), self.frames or 1) < 1:
            raise ValueError(f"expected size and frames of at least 1, got {self.size} and {self.frames}")

    def of(self, entry: ClipEntry) -> UpsamplingRecipe:
        """What is made from one video.

        Raises:
            ClipError: it has too few frames, or is too large.
        """
        size, frames = self.size, self.frames or entry.total_frames
        if size is None:
            exact = Fraction(str(self.scale))
            size = (round(entry.height * exact), round(entry.width * exact))
        if frames > entry.total_frames:
            raise ClipError(entry.path, f"has {entry.total_frames} frames, {frames} are wanted")
        if size[0] < entry.height or size[1] < entry.width:
            raise ClipError(
                entry.path, f"frames of {entry.height}x{entry.width} are larger than {size[0]}x{size[1]} already"
            )
        return UpsamplingRecipe(size, size[0] / entry.height, frames, caption=PROMPT)


@dataclass
class Totals:
    """The counts of a run: videos written and found, and (clip_id, reason) of unreadable clips."""

    written: int
    there: int
    unreadable: list[tuple[str, str]]


@dataclass
class _Clip:
    """A clip with the hash of its file, the names of the missing videos and, where there are any, its pixels."""

    entry: ClipEntry
    digest: str
    missing: list[str]
    video: Tensor | None = None  # 1 x 3 x T x H x W, on the CPU until it is taken

    def take(self) -> Tensor:
        """The pixels, which are not kept any longer."""
        video, self.video = self.video, None
        assert video is not None
        return video


class ClipUpsampler:
    """Writes each method's version of a clip, as `folder/<method>/<clip_id>.mp4` with a JSON file beside it.

    A still's version is `<clip_id>.png`.
    `reference` is the clip's own pixels at the high resolution, `vae` the VAE's reconstruction of them, the
    ceiling for upsamplers of latents. The others get the VAE's latents of the downscaled clip, or of the video where
    that is the low resolution; then there is neither a reference nor a ceiling. Networks of super-resolution get what
    these latents decode to, so that all see the same, or the video itself; what they make is resized to the exact
    size. A video is finished when its JSON file exists with the recipe; that one is written last.

    Args:
        codec: the VAE.
        methods: functions from latents to latents, by folder name; without `reference` and `vae`, which are always
            made.
        identities: what a method's pixels depend on besides the VAE and the recipe, such as a digest of its
            weights.
        recipe: what to make.
        folder: folder of the methods' folders.
        hashes: hashes of the clips.
        device: device of the models.
        networks: networks of super-resolution by folder name.
        encoder_threads: threads that write a video file; its frames are the same.
    """

    def __init__(
        self,
        codec: LatentSpace,
        methods: Mapping[str, LatentUpsampler],
        identities: Mapping[str, str],
        recipe: UpsamplingRecipe | EnlargingRecipe,
        folder: Path,
        hashes: ClipHashes,
        device: torch.device,
        networks: Mapping[str, PixelSuperResolver] | None = None,
        encoder_threads: int = 1,
    ) -> None:
        self.networks = dict(networks or {})
        taken = {REFERENCE, CEILING} & (methods.keys() | self.networks.keys())
        if taken:
            raise ValueError(f"methods: {', '.join(sorted(taken))} is made in any case")
        self.codec, self.methods, self.recipe, self.folder = codec, dict(methods), recipe, folder
        self.identities, self.hashes, self.device = identities, hashes, device
        self.encoder_threads = encoder_threads
        self.low_size = recipe.low_size(codec) if isinstance(recipe, UpsamplingRecipe) else None
        self.vae = codec.fingerprint()

    @property
    def names(self) -> list[str]:
        """The names of the folders."""
        made = [*self.methods, *self.networks]
        return made if self.low_size is None else [REFERENCE, *made, CEILING]

    def run(
        self, entries: Sequence[ClipEntry], advance: Callable[[], None] = lambda: None, times: UnitTimes | None = None
    ) -> Totals:
        """Write what is missing for each clip.

        Beside the work on the device, one thread reads the next clip and another writes up to two videos.

        Args:
            entries: the clips.
            advance: called for every clip whose videos are made; the last two may still be written.
            times: counts those of which something was missing.
        """
        times = times or UnitTimes("clip")
        totals = Totals(0, 0, [])
        # One may wait: a clip's own pixels come right after the last clip's last video.
        with one_behind(waiting=1) as behind, one_ahead(self._read, entries) as readings:
            for entry in entries:
                times.begin()
                try:
                    clip = next(readings).result()
                except ClipError as error:
                    totals.unreadable.append((entry.clip_id, error.reason))
                else:
                    if clip.missing:
                        times.spend("reading")
                        self._make(clip, partial(self._write, behind, times, clip))
                        times.advance()
                    totals.written += len(clip.missing)
                    totals.there += len(self.names) - len(clip.missing)
                advance()
        return totals

    def _read(self, entry: ClipEntry) -> _Clip:
        """A clip's pixels at the high resolution, or those of a video to enlarge; none where nothing is missing.

        Raises:
            ClipError: it cannot be read.
        """
        recipe = self._of(entry)
        try:
            digest = self.hashes.digest(entry.path, entry.matte)
        except OSError as error:
            raise ClipError(entry.path, error.strerror or str(error)) from error
        missing = [name for name in self.names if not self._finished(entry, name, digest)]
        if not missing:
            return _Clip(entry, digest, missing)
        if recipe.fps is not None and (reason := refusal(entry.total_frames, entry.fps, recipe.fps)):
            raise ClipError(entry.path, reason)
        frames = read_clip(
            entry.path, recipe.start, recipe.frames, stride=recipe.stride, fps=recipe.fps, matte=entry.matte
        )
        if self.low_size is None:
            return _Clip(entry, digest, missing, frames_to_video(frames)[None])
        if min(frames.shape[1] - recipe.size[0], frames.shape[2] - recipe.size[1]) < 0:
            raise ClipError(
                entry.path,
                f"frames of {frames.shape[1]}x{frames.shape[2]} are smaller than {recipe.size[0]}x{recipe.size[1]}",
            )
        return _Clip(entry, digest, missing, fit_frames(torch.from_numpy(frames), recipe.size)[None])

    def _of(self, entry: ClipEntry) -> UpsamplingRecipe:
        """What is made from one clip or video."""
        if isinstance(self.recipe, UpsamplingRecipe):
            return self.recipe
        recipe = self.recipe.of(entry)
        if self.methods:
            try:
                self.codec.latent_size(recipe.frames, entry.height, entry.width)
                self.codec.latent_size(recipe.frames, *recipe.size)
            except ValueError as error:
                raise ClipError(entry.path, str(error)) from None
        return recipe

    @torch.no_grad()
    def _make(self, clip: _Clip, write: Callable[[str, Tensor], None]) -> None:
        """Have what is missing of a clip written."""
        recipe = self._of(clip.entry)
        names = [name for name in clip.missing if name in self.methods or name == CEILING]
        networks = [name for name in clip.missing if name in self.networks]
        latents, low = self._encode(clip, names, bool(networks), write)
        at_once = min(DECODED_TOGETHER, self.codec.clips_at_once(recipe.frames, *recipe.size)) if names else 1
        for first in range(0, len(names), at_once):
            self._decode({name: latents[name] for name in names[first : first + at_once]}, at_once, write)
        for name in networks:
            seen = low if self.low_size is None else self.codec.decode(low)
            write(name, super_resolved(self.networks[name], seen, recipe.size))

    def _encode(
        self, clip: _Clip, names: Sequence[str], networks: bool, write: Callable[[str, Tensor], None]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Latents at the high resolution by name, and what networks are to see: latents, or a video to enlarge.

        The pixels are not needed any longer then: decoding takes the most memory.
        """
        recipe, latents = self._of(clip.entry), dict[str, Tensor]()
        low = clip.take().to(self.device)
        if REFERENCE in clip.missing:
            write(REFERENCE, low)
        if CEILING in names:
            latents[CEILING] = self.codec.encode(low)
        if self.low_size is not None:
            low = resize_video(low, self.low_size)
        methods = [name for name in names if name in self.methods]
        if methods or (networks and self.low_size is not None):
            encoded = self.codec.encode(low)
            low = low if networks and self.low_size is None else encoded
            for name in methods:
                size = self.codec.latent_size(recipe.frames, *recipe.size)
                latents[name] = self.methods[name](encoded, size).float()
        return latents, low

    def _decode(self, latents: Mapping[str, Tensor], at_once: int, write: Callable[[str, Tensor], None]) -> None:
        # Filled up, because convolutions round differently for other batch sizes: an interrupted run, or one with
        # another method added, makes the same bits.
        filled = [*latents.values()]
        decoded = self.codec.decode(torch.cat(filled + filled[-1:] * (at_once - len(filled))))
        for name, made in zip(latents, decoded.split(1), strict=False):
            write(name, made)

    def _write(self, behind: Behind, times: UnitTimes, clip: _Clip, name: str, made: Tensor) -> None:
        """Have a video written, 1 x 3 x T x H x W, or frames, uint8 1 x T x H x W x 3, while the next ones are made."""
        frames = (made if made.dtype == torch.uint8 else video_to_frames(made))[0]
        # A GPU copies into page-locked memory, which PyTorch keeps for the next video, at the bus's own pace.
        host = torch.empty_like(frames, device="cpu", pin_memory=True).copy_(frames) if frames.is_cuda else frames.cpu()
        times.spend("upsampling")
        behind(partial(self._write_files, self._path(clip.entry, name), clip.entry, clip.digest, name, host.numpy()))
        times.spend("writing")

    def _write_files(self, path: Path, entry: ClipEntry, digest: str, name: str, frames: np.ndarray) -> None:
        # First of all: an existing recipe vouches for the video.
        path.with_suffix(".json").unlink(missing_ok=True)
        recipe = self._of(entry)
        fps = (recipe.fps or entry.fps) / recipe.stride
        if entry.still:
            write_picture(path, frames[0])
        else:
            write_video(path, frames, fps, lossless=True, threads=self.encoder_threads)
        known = self.low_size is not None or PROMPT in entry.captions
        about: dict[str, Any] = {"prompt": entry.captions[recipe.caption]} if known else {}
        about |= {"fps": fps, "recipe": self._recipe(entry, name, digest)}
        if self.low_size is None:
            about["enlarged_from"] = os.path.relpath(entry.path, path.parent)
        if name in self.networks:
            net = self.networks[name]
            about["enlarged"] = (
                f"{net.scale}x by {type(net).__name__}, then resized to {recipe.size[0]}x{recipe.size[1]} by an "
                "antialiased bicubic filter"
            )
        write_text(path.with_suffix(".json"), json.dumps(about, indent=1, ensure_ascii=False) + "\n")

    def _path(self, entry: ClipEntry, name: str) -> Path:
        return self.folder / name / f"{entry.clip_id}{'.png' if entry.still else '.mp4'}"

    def _finished(self, entry: ClipEntry, name: str, digest: str) -> bool:
        path = self._path(entry, name)
        about = find_json(path.with_suffix(".json"))
        # The prompt of an index's clip is part of the recipe, by its column.
        if self.low_size is None and about.get("prompt") != entry.captions.get(PROMPT):
            return False
        return about.get("recipe") == self._recipe(entry, name, digest) and path.is_file()

    def _recipe(self, entry: ClipEntry, name: str, digest: str) -> dict[str, Any]:
        own = self._of(entry)
        recipe: dict[str, Any] = {"version": _VERSION, "method": name, "clip": digest, **asdict(own)}
        recipe["size"] = list(own.size)
        if own.fps is None:
            del recipe["fps"]  # videos made before there was such a thing
        if name in (REFERENCE, CEILING):
            del recipe["scale"]
        if self.low_size is None:
            del recipe["scale"]  # follows from both sizes
        if name != REFERENCE and not (self.low_size is None and name in self.networks):
            recipe |= {"vae": self.vae, "dtype": str(self.codec.dtype)}
        if name in self.networks:
            recipe |= {"network": type(self.networks[name]).__name__, "network_dtype": str(self.networks[name].dtype)}
        if name in self.identities:
            recipe["identity"] = self.identities[name]
        return recipe
