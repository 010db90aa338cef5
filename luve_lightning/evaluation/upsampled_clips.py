"""Clips upsampled by several methods, written as lossless videos, one folder per method."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luve_lightning.cascade.upsampling import LatentUpsampler
from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.clips import read_clip
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.video_files import write_picture, write_video
from luve_lightning.data.video_index import ClipEntry
from luve_lightning.files import find_json, write_text
from luve_lightning.functional.frame_times import exact_rate, refusal
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.pixels import fit_frames, resize_video, video_to_frames
from luve_lightning.machine import UnitTimes
from luve_lightning.models.backbones import LatentSpace

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


@dataclass
class Totals:
    """The counts of a run: videos written and found, and (clip_id, reason) of unreadable clips."""

    written: int
    there: int
    unreadable: list[tuple[str, str]]


class ClipUpsampler:
    """Writes each method's version of a clip, as `folder/<method>/<clip_id>.mp4` with a JSON file beside it.

    A still's version is `<clip_id>.png`.
    `reference` is the clip's own pixels at the high resolution, `vae` the VAE's reconstruction of them, the
    ceiling for upsamplers of latents. The others get the VAE's latents of the downscaled clip. A video is finished
    when its JSON file exists with the recipe; that one is written last.

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
    """

    def __init__(
        self,
        codec: LatentSpace,
        methods: Mapping[str, LatentUpsampler],
        identities: Mapping[str, str],
        recipe: UpsamplingRecipe,
        folder: Path,
        hashes: ClipHashes,
        device: torch.device,
    ) -> None:
        taken = {REFERENCE, CEILING} & methods.keys()
        if taken:
            raise ValueError(f"methods: {', '.join(sorted(taken))} is made in any case")
        self.codec, self.methods, self.recipe, self.folder = codec, dict(methods), recipe, folder
        self.identities, self.hashes, self.device = identities, hashes, device
        self.low_size = recipe.low_size(codec)
        self.vae = codec.fingerprint()

    @property
    def names(self) -> list[str]:
        """The names of the folders."""
        return [REFERENCE, *self.methods, CEILING]

    def run(
        self, entries: Sequence[ClipEntry], advance: Callable[[], None] = lambda: None, times: UnitTimes | None = None
    ) -> Totals:
        """Write what is missing for each clip.

        Args:
            entries: the clips.
            advance: called for every finished clip.
            times: counts those of which something was missing.
        """
        times = times or UnitTimes("clip")
        totals = Totals(0, 0, [])
        for entry in entries:
            times.begin()
            try:
                written = self.write(entry)
                if written:
                    times.advance()
                totals.written += written
                totals.there += len(self.names) - written
            except ClipError as error:
                totals.unreadable.append((entry.clip_id, error.reason))
            advance()
        return totals

    @torch.no_grad()
    def write(self, entry: ClipEntry) -> int:
        """Write what is missing for one clip; returns the number of written videos.

        Raises:
            ClipError: it cannot be read.
        """
        recipe = self.recipe
        try:
            digest = self.hashes.digest(entry.path, entry.matte)
        except OSError as error:
            raise ClipError(entry.path, error.strerror or str(error)) from error
        missing = [name for name in self.names if not self._finished(entry, name, digest)]
        if not missing:
            return 0
        if recipe.fps is not None and (reason := refusal(entry.total_frames, entry.fps, recipe.fps)):
            raise ClipError(entry.path, reason)
        frames = read_clip(
            entry.path, recipe.start, recipe.frames, stride=recipe.stride, fps=recipe.fps, matte=entry.matte
        )
        if min(frames.shape[1] - recipe.size[0], frames.shape[2] - recipe.size[1]) < 0:
            raise ClipError(
                entry.path,
                f"frames of {frames.shape[1]}x{frames.shape[2]} are smaller than {recipe.size[0]}x{recipe.size[1]}",
            )
        video = fit_frames(torch.from_numpy(frames), recipe.size)[None].to(self.device)
        if REFERENCE in missing:
            self._write(entry, REFERENCE, digest, video)
        names = [name for name in missing if name != REFERENCE]
        latents = self._latents(video, names)
        at_once = min(DECODED_TOGETHER, self.codec.clips_at_once(recipe.frames, *recipe.size))
        for first in range(0, len(names), at_once):
            some = names[first : first + at_once]
            # Filled up, because convolutions round differently for other batch sizes: an interrupted run, or one
            # with another method added, makes the same bits.
            filled = [*some, *[some[-1]] * (at_once - len(some))]
            decoded = self.codec.decode(torch.cat([latents[name] for name in filled]))
            for name, made in zip(some, decoded.split(1), strict=False):
                self._write(entry, name, digest, made)
        return len(missing)

    def _latents(self, video: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """The latents that each of some methods decodes."""
        size: Size3d = self.codec.latent_size(self.recipe.frames, *self.recipe.size)
        latents: dict[str, Tensor] = {}
        if CEILING in names:
            latents[CEILING] = self.codec.encode(video)
        learned = [name for name in names if name in self.methods]
        if learned:
            low = self.codec.encode(resize_video(video, self.low_size))
            latents |= {name: self.methods[name](low, size).float() for name in learned}
        return latents

    def _write(self, entry: ClipEntry, name: str, digest: str, video: Tensor) -> None:
        path = self._path(entry, name)
        fps = (self.recipe.fps or entry.fps) / self.recipe.stride
        # First of all: an existing recipe vouches for the video.
        path.with_suffix(".json").unlink(missing_ok=True)
        frames = video_to_frames(video)[0].cpu().numpy()
        if entry.still:
            write_picture(path, frames[0])
        else:
            write_video(path, frames, fps, lossless=True)
        about = {"prompt": entry.captions[self.recipe.caption], "fps": fps, "recipe": self._recipe(name, digest)}
        write_text(path.with_suffix(".json"), json.dumps(about, indent=1, ensure_ascii=False) + "\n")

    def _path(self, entry: ClipEntry, name: str) -> Path:
        return self.folder / name / f"{entry.clip_id}{'.png' if entry.still else '.mp4'}"

    def _finished(self, entry: ClipEntry, name: str, digest: str) -> bool:
        path = self._path(entry, name)
        about = find_json(path.with_suffix(".json"))
        return about.get("recipe") == self._recipe(name, digest) and path.is_file()

    def _recipe(self, name: str, digest: str) -> dict[str, Any]:
        recipe: dict[str, Any] = {"version": _VERSION, "method": name, "clip": digest, **asdict(self.recipe)}
        recipe["size"] = list(self.recipe.size)
        if self.recipe.fps is None:
            del recipe["fps"]  # videos made before there was such a thing
        if name in (REFERENCE, CEILING):
            del recipe["scale"]
        if name != REFERENCE:
            recipe |= {"vae": self.vae, "dtype": str(self.codec.dtype)}
        if name in self.identities:
            recipe["identity"] = self.identities[name]
        return recipe


def weights_digest(module: torch.nn.Module, *configuration: str) -> str:
    """SHA-256 of a module's weights, as float32, and of its configuration."""
    digest = hashlib.sha256("\0".join(configuration).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + b"\0")
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
