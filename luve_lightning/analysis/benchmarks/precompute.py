"""`luve bench --subject precompute`: encoding a clip at its sizes, decoding, and what bfloat16 changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luve_lightning.analysis.benchmarks.generate import Setup, mini, wan
from luve_lightning.analysis.dry_run import dry_run
from luve_lightning.analysis.model_parts import Parts
from luve_lightning.data.clip_windows import ClipWindow, EncodeItem, WindowReader
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import HIGH_RESOLUTION, LatentRecipe, LatentStore
from luve_lightning.data.quarantine import Quarantine
from luve_lightning.data.variants import Unchanged
from luve_lightning.data.video_index import ClipEntry
from luve_lightning.files import text_digest
from luve_lightning.machine import measure_ms
from luve_lightning.models.backbones import LatentSpace, latent_space_of
from luve_lightning.tasks.encode import EncodeTask

SCALES = (1.5, 2.0, 3.0)
SOURCE = 1.5  # how many times larger the frames are from which the largest size is made, as 2160x3840 to 1440x2544
ERROR_FRAMES = 9  # float32 without TF32 is slow
_GIB = 2**30


def measure(
    device: torch.device,
    repeats: int = 2,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    clips: int = 3,
    decode: bool = True,
    errors: bool = True,
) -> Iterator[dict[str, Any]]:
    """Time what `luve precompute` does to a clip at a size and at 1.5, 2 and 3 times smaller, and decoding.

    On a GPU the VAE has Wan2.1's size and random weights in float32 and runs under bfloat16 autocast, as with
    `precision: bf16-mixed`; on a CPU a small one runs in float32. Beside it runs diffusers' own form, in bfloat16 at
    half the size.

    Args:
        device: where.
        repeats: timed runs after the first; the fastest counts.
        size: height and width in pixels, multiples of 48; None means 1440x2544 on a GPU and 48x96 on a CPU.
        frames: frames, 4k + 1; None means 49 on a GPU and 5 on a CPU.
        clips: clips encoded one after another at all sizes and stored.
        decode: also time decoding at the cascade's sizes.
        errors: also compare bfloat16 with float32.

    Returns:
        Rows with seconds, TFLOP/s and `peak_gib`, which holds everything on the GPU; None on a CPU. `error` is the
        root mean square of the difference from float32, relative to it.
    """
    setup = mini() if device.type == "cpu" else wan()
    size = size or ((48, 96) if device.type == "cpu" else (1440, 2544))
    frames = frames or (5 if device.type == "cpu" else 49)
    if clips < 1:
        raise ValueError(f"clips: expected at least 1, got {clips}")
    bench = _Bench(setup, device, repeats)
    recipe = LatentRecipe(bench.codec.fingerprint(), size, SCALES, frames)
    for scale in (HIGH_RESOLUTION, *SCALES):
        yield bench.encoding(frames, *recipe.pixel_size(scale))
    yield bench.plain_encoding(frames, *recipe.pixel_size(2.0))
    yield bench.clips(recipe, clips)
    if decode:
        for named in setup.sizes.values():
            yield bench.decoding(*named)
    if errors:
        yield from bench.errors(min(frames, ERROR_FRAMES), *recipe.pixel_size(2.0))


class _Bench:
    """The VAE on its device, and what is measured of it."""

    def __init__(self, setup: Setup, device: torch.device, repeats: int) -> None:
        torch.manual_seed(0)
        self.device, self.repeats = device, repeats
        self.codec: LatentSpace = Parts(setup.configs, setup.dtype, device).codec.to(device)
        self.planned: LatentSpace = Parts(setup.configs, setup.dtype, "meta", torch.bfloat16).codec
        self.draw = torch.Generator(device).manual_seed(1)

    def encoding(self, frames: int, height: int, width: int) -> dict[str, Any]:
        """One size of a clip by `LatentSpace.encode`."""
        video = self._video(frames, height, width)
        with self._autocast():
            measured = self._timed(partial(self.codec.encode, video))
        return self._row("encode", (frames, height, width), measured, self._encode_flops(video))

    def plain_encoding(self, frames: int, height: int, width: int) -> dict[str, Any]:
        """The same by diffusers, with weights of its own in bfloat16."""
        video, vae = self._video(frames, height, width), self._in(self._half())
        with torch.no_grad():
            measured = self._timed(partial(vae.encode, video.to(vae.dtype)))
        return self._row("encode, diffusers", (frames, height, width), measured, self._encode_flops(video))

    def clips(self, recipe: LatentRecipe, count: int) -> dict[str, Any]:
        """Clips at all sizes by the task behind `luve precompute`, from decoded frames to the store."""
        height, width = (round(side * SOURCE) for side in recipe.size)
        pixels = self._random((recipe.frames, height, width, 3)).mul_(256).byte().cpu()
        with TemporaryDirectory() as name:
            store = LatentStore(Path(name))
            read = WindowReader(recipe, store, ClipHashes(store.root))
            bad = Quarantine(None, 1.0, count)
            task = EncodeTask(self.codec, read, {"plain": Unchanged()}, bad, batch_size=1).to(self.device)
            window = ClipWindow(ClipEntry("clip", Path("clip.mp4"), "", 24.0, recipe.frames, width, height, {}), (0, 1))
            window = ClipWindow(window.clip, (0, recipe.span))

            def run(number: int) -> None:
                keys = recipe.keys(text_digest(str(number)), window.frames)
                written = task.predict_step([EncodeItem(window, keys, pixels)], number)
                assert written == recipe.count

            with self._autocast():
                run(0)
                self._reset_peak()
                started = time.perf_counter()
                for number in range(count):
                    run(number + 1)
                seconds = (time.perf_counter() - started) / count
        sizes = [recipe.pixel_size(scale) for scale in (HIGH_RESOLUTION, *recipe.scales)]
        flops = sum(self._encode_flops(torch.empty(1, 3, recipe.frames, *size, device="meta")) for size in sizes)
        row = self._row("clip at all sizes", (recipe.frames, *recipe.size), (seconds, self._peak()), flops)
        return row | {"sizes": [list(size) for size in sizes], "clips": count}

    def decoding(self, frames: int, height: int, width: int) -> dict[str, Any]:
        """A video by `LatentSpace.decode`."""
        latents = self._latents(frames, height, width)
        with self._autocast():
            measured = self._timed(partial(self.codec.decode, latents))
        with dry_run(converts=False) as counted:
            self.planned.decode(latents.to("meta"))
        return self._row("decode", (frames, height, width), measured, counted.flops)

    def errors(self, frames: int, height: int, width: int) -> Iterator[dict[str, Any]]:
        """Bfloat16 here and in diffusers' form against float32, encoding and decoding."""
        half = self._half()
        exact = self._in(self._half().float())
        fast, plain = latent_space_of(self._half()).to(self.device), self._in(half)
        video, latents = self._video(frames, height, width), self._latents(frames, height, width)
        z = fast.denormalize(latents)
        mean = len(fast.latents_mean.flatten())
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            encoded = exact.encode(video).latent_dist.mode()
            decoded = exact.decode(z).sample
            found = {
                ("encode", "here"): (fast.denormalize(fast.encode(video)), encoded),
                ("encode", "diffusers"): (
                    plain.encode(video.to(plain.dtype)).latent_dist.parameters[:, :mean],
                    encoded,
                ),
                ("decode", "here"): (fast.decode(latents), decoded),
                ("decode", "diffusers"): (plain.decode(z.to(plain.dtype)).sample, decoded),
            }
        for (what, form), (result, wanted) in found.items():
            error = float((result.float() - wanted).norm() / wanted.norm())
            row = {"subject": "precompute", "what": f"error of bfloat16, {what}", "form": form}
            yield row | {"size": [frames, height, width], "error": float(f"{error:.4g}")}

    def _half(self) -> Any:
        """A copy of the VAE in bfloat16, on the CPU."""
        known: Any = self.codec.vae
        vae = type(known).from_config(known.config)
        vae.load_state_dict(known.state_dict())
        return vae.to(torch.bfloat16).requires_grad_(False).eval()

    def _in(self, vae: Any) -> Any:
        return vae.to(self.device)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self.draw, device=self.device)

    def _video(self, frames: int, height: int, width: int) -> Tensor:
        """Noise with detail of several sizes."""
        coarse = self._random((3, frames, height // 8, width // 8))
        fine = self._random((3, frames, height, width))
        return (F.interpolate(coarse, size=(height, width), mode="bilinear") + 0.3 * fine)[None].mul_(1.5).sub_(1)

    def _latents(self, frames: int, height: int, width: int) -> Tensor:
        grid = self.planned.latent_size(frames, height, width)
        return torch.randn(1, self.planned.channels, *grid, generator=self.draw, device=self.device)

    def _encode_flops(self, video: Tensor) -> int:
        with dry_run(converts=False) as counted:
            self.planned.encode(video.to("meta"))
        return counted.flops

    def _timed(self, run: Callable[[], object]) -> tuple[float, float | None]:
        """Seconds, and peak GiB of everything on the GPU."""
        run()
        self._reset_peak()
        return min(measure_ms(run, self.device)[1] for _ in range(self.repeats)) / 1e3, self._peak()

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _peak(self) -> float | None:
        return torch.cuda.max_memory_allocated(self.device) / _GIB if self.device.type == "cuda" else None

    def _row(
        self, what: str, size: tuple[int, int, int], measured: tuple[float, float | None], flops: int
    ) -> dict[str, Any]:
        seconds, peak = measured
        return {
            "subject": "precompute",
            "what": what,
            "size": list(size),
            "seconds": round(seconds, 4),
            "tflop": round(flops / 1e12, 4),
            "tflop_per_s": round(flops / seconds / 1e12, 2),
            "peak_gib": None if peak is None else round(peak, 2),
        }
