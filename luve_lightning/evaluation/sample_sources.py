"""Sources of sample videos, and the files of a generated one: video, contact sheet, and JSON that repeats it."""

from __future__ import annotations

import json
import platform
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from luve_lightning.cascade.denoise import from_noise
from luve_lightning.cascade.expert_choice import expert_chooser
from luve_lightning.cascade.generation_jobs import KEPT_STAGES, VideoFolder, VideoJob
from luve_lightning.cascade.generation_run import MadeVideo
from luve_lightning.cascade.options import Guidance
from luve_lightning.cascade.run import handed_over
from luve_lightning.cascade.speed import SpeedOptions
from luve_lightning.data.clip_windows import read_frames
from luve_lightning.data.latent_store import LatentKey
from luve_lightning.data.video_files import VideoInProgress, write_picture, write_video
from luve_lightning.data.video_index import ClipEntry
from luve_lightning.evaluation.pictures import contact_sheet
from luve_lightning.files import file_digest, replacing, write_text
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.pixels import fit_frames, video_to_frames
from luve_lightning.machine import PACKAGE_ROOT
from luve_lightning.models.backbones import Schedule, family_of, load_backbone
from luve_lightning.models.experts import choice_kept
from luve_lightning.revision import git_state, package_versions

if TYPE_CHECKING:  # Lightning: generating needs none
    from luve_lightning.datamodules.caption_latents import Embed
    from luve_lightning.tasks.base import Denoising


def about_run(device: torch.device, processes: int, speed: SpeedOptions) -> dict[str, Any]:
    """When, where and with what a run's videos were made; not compared when a run resumes."""
    return {
        "speed": asdict(speed),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "folder": str(Path.cwd()),
        "git": git_state(PACKAGE_ROOT),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        # On a CPU another number of threads rounds differently.
        "threads": torch.get_num_threads(),
        "processes": processes,
        "packages": dict(package_versions()),
    }


def write_generated(
    folder: VideoFolder,
    job: VideoJob,
    made: MadeVideo,
    fps: float,
    lossless: bool,
    facts: Mapping[str, Any],
    threads: int = 1,
    begun: VideoInProgress | None = None,
) -> Path:
    """Write a video or a picture and its further files, each atomically, the JSON file last.

    The JSON file holds the prompt and fps (where `luve evaluate` looks for them), the `recipe` that decides the
    pixels, every stage's size and seconds, the seconds of everything else, every denoising step with its expert, the
    sigma of `handover` where the spectrum decided it (null where one expert did every step), the video file's sha256,
    and `facts`. `seconds` sums up: "whole" is "making" and "writing", and "making" is "embedding", "storing", "showing"
    and the stages.

    Args:
        folder: target; knows which files are wanted.
        job: job of the video.
        made: the video.
        fps: frames per second.
        lossless: whether video files are lossless.
        facts: further information for the JSON file.
        threads: threads that encode a video file.
        begun: the video's file, if it is being written already.

    Returns:
        The JSON file.
    """
    started, video = time.perf_counter(), folder.video(job)
    about = video.with_suffix(".json")
    if about.exists():  # where it exists, the video is complete
        about.unlink()
        for stage in KEPT_STAGES:
            folder.stage_video(job, stage).unlink(missing_ok=True)
        # What it was about until now, where a picture replaces a video or the other way round.
        video.with_suffix(".mp4" if video.suffix == ".png" else ".png").unlink(missing_ok=True)

    def write(path: Path, frames: np.ndarray) -> None:
        if path.suffix == ".png":
            write_picture(path, frames[0])
        else:
            write_video(path, frames, fps, lossless, threads)

    for stage in folder.stages:
        if stage in made.stages:
            write(folder.stage_video(job, stage), made.stages[stage])
    sheet = sheet_of(job, made) if folder.sheet else None
    if begun is None or not begun.finish():
        write(video, made.frames)
    if sheet is not None:
        with replacing(video.with_suffix(".jpg")) as temporary:
            sheet.save(temporary, format="JPEG", quality=92)
    sha256 = file_digest(video)
    writing = time.perf_counter() - started
    recipe = folder.recipe(job)
    seconds = {**made.seconds, "writing": writing, "whole": made.seconds.get("making", 0.0) + writing}
    content = {
        "prompt": job.prompt,
        "fps": fps,
        "recipe": recipe,
        "stages": [asdict(report) for report in made.reports],
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "steps": [step._asdict() for step in made.steps],
        **({"handover": handed_over(made.steps)} if recipe.get("switch") == "spectrum" else {}),
        "sha256": sha256,
        **facts,
    }
    write_text(about, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return about


def sheet_of(job: VideoJob, made: MadeVideo) -> Image.Image:
    """The contact sheet of a video, one row per stage."""
    last = next((report.stage for report in reversed(made.reports) if report.stage != "decoded"), "video")
    rows = {**made.stages, last: made.frames}
    return contact_sheet({f"{name}\n{v.shape[1]}x{v.shape[2]}": v for name, v in rows.items()}, job.prompt)


Precision = Callable[[], AbstractContextManager[Any]]
"""The context in which the model runs in training (autocast or none)."""


@dataclass(frozen=True)
class SampleVideo:
    """A video that the model made.

    Attributes:
        frames: uint8 T x H x W x 3, on the CPU.
        reference: the original's frames, same shape; None where there is none.
    """

    frames: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True)
class Samples:
    """An open source of videos; the same videos in any order and in any process.

    Attributes:
        names: names of the videos, unique and valid as file names.
        captions: captions of the videos.
        make: makes the video of an index.
        fps: frames per second of the videos.
        real_names: names of real videos, such as held-out clips.
        real: reads the real video of an index, uint8 T x H x W x 3.
        paired: whether the real video of an index shows what the made one should: the clip of its caption.
    """

    names: Sequence[str]
    captions: Sequence[str]
    make: Callable[[int], SampleVideo]
    fps: float
    real_names: Sequence[str]
    real: Callable[[int], Tensor]
    paired: bool = True


class SampleSource(ABC):
    """A kind of video by which a training task can be judged.

    Attributes:
        has_reference: whether each video has an original to compare with, frame by frame.
    """

    has_reference: bool = False

    @abstractmethod
    def open(self, task: Any, datamodule: Any, precision: Precision) -> AbstractContextManager[Samples]:
        """Load what making videos needs besides the task's own modules, for the duration of the context.

        The caller has disabled gradients and set modules to evaluation mode.

        Args:
            task: the LightningModule in training.
            datamodule: its data, set up for `fit`.
            precision: precision of the model's forward passes.

        Raises:
            ValueError: a task, data or size unsuitable for this kind of video.
        """


class GeneratedVideos(SampleSource):
    """Videos generated from prompts by the transformer in training, each from its own noise.

    Prompts are embedded as in training: by the task's text encoder, or from the store that the data reads (`luve
    embed`; it must include the empty caption unless `guidance` is 1). An expert acts in its band, the base alone
    elsewhere. The VAE is the one that made the latents. Real videos are the held-out clips, cropped and resized to
    the same size.

    Args:
        height: height of the videos, pixels.
        width: width of the videos, pixels.
        frames: frames of the videos, 4k + 1.
        prompts: captions to generate; None uses those of the held-out clips.
        column: column of their captions; None uses the first that the data reads.
        clips: number of held-out clips, the first ones; None uses all.
        steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 is none and takes half the time.
        seed: seed of the first prompt's noise; each further prompt takes the next.
        fps: frames per second of the written videos; Wan generates 16.
        vae_dtype: dtype of the VAE's weights, "float32" or "bfloat16".
    """

    def __init__(
        self,
        height: int,
        width: int,
        frames: int,
        prompts: list[str] | None = None,
        column: str | None = None,
        clips: int | None = None,
        steps: int = 50,
        guidance: float = 5.0,
        seed: int = 0,
        fps: float = 16.0,
        vae_dtype: str = "float32",
    ) -> None:
        if prompts is not None and not prompts:
            raise ValueError("prompts: expected at least one, or null for the held-out clips' captions")
        if steps < 1 or seed < 0 or (clips is not None and clips < 1):
            raise ValueError(f"expected steps >= 1, seed >= 0, clips >= 1, got {steps}, {seed} and {clips}")
        if vae_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"vae_dtype: expected float32 or bfloat16, got {vae_dtype!r}")
        self.size, self.frames, self.clips = (height, width), frames, clips
        self.prompts, self.column = None if prompts is None else list(prompts), column
        self.steps, self.guidance, self.seed, self.fps = steps, guidance, seed, fps
        self.vae_dtype = getattr(torch, vae_dtype)

    @contextmanager
    def open(self, task: Any, datamodule: Any, precision: Precision) -> Iterator[Samples]:
        """See SampleSource."""
        from luve_lightning.datamodules import CaptionLatentsDataModule
        from luve_lightning.tasks.base import Denoising, keeps

        if not keeps(task, Denoising) or not isinstance(datamodule, CaptionLatentsDataModule):
            raise ValueError(
                f"source: GeneratedVideos needs a task that generates and data with captions, got "
                f"{type(task).__name__} and {type(datamodule).__name__}; a VLUer has UpsampledVideos"
            )
        held_out = datamodule.datasets[datamodule.open_held_out()]
        items = held_out.items[: self.clips]
        # Equal captions stay: each has its own noise.
        prompts = self.prompts or self._captions([entry for entry, _ in items], held_out.columns)
        codec = load_backbone(datamodule.backbone).latent_space(self.vae_dtype).to(task.device)
        size = codec.latent_size(self.frames, *self.size)
        task.denoiser.token_grid(size)
        schedule = family_of(task.transformer).build_schedule(task.shift)
        with precision():  # now, so that a caption that is not in the store is told before any video is made
            empty = [""] if self.guidance > 1 else []
            texts = {text: _embedded(task, held_out.embed, text) for text in (*empty, *prompts)}

        def make(index: int) -> SampleVideo:
            text, negative = texts[prompts[index]], texts.get("")
            with precision():
                latents = self._latents(task, schedule, size, text, negative if empty else None, self.seed + index)
            return SampleVideo(_frames(codec.decode(latents)))

        yield Samples(
            names=[_file_name(index, prompt) for index, prompt in enumerate(prompts)],
            captions=prompts,
            make=make,
            fps=self.fps,
            real_names=[_file_name(index, entry.clip_id) for index, (entry, _) in enumerate(items)],
            real=lambda index: _read_real(*items[index], self.size),
            paired=self.prompts is None,
        )

    def _captions(self, entries: list[ClipEntry], columns: list[str]) -> list[str]:
        column = self.column or next(iter(columns), None)
        known = list(entries[0].captions)
        if column not in known:
            raise ValueError(f"source.column: expected one of {', '.join(known)}, got {column or 'none'}")
        return [entry.captions[column] for entry in entries]

    def _latents(
        self, task: Denoising, schedule: Schedule, size: Size3d, text: Tensor, negative: Tensor | None, seed: int
    ) -> Tensor:
        """One prompt's latents; one at a time, so that they are the same whatever the number of processes."""
        noise = torch.Generator("cpu").manual_seed(seed)
        with choice_kept(task.transformer):
            return from_noise(
                task.transformer, schedule, size, text, negative, Guidance(max(self.guidance, 1.0)), self.steps,
                noise, choose_expert=expert_chooser(task.transformer),
            )  # fmt: skip


class UpsampledVideos(SampleSource):
    """Held-out clips, upsampled by the VLUer in training and decoded; the clips' own pixels are the originals.

    Args:
        scale: high over low resolution, one of the data's.
        clips: number of held-out clips, the first ones; None uses all.
    """

    has_reference = True

    def __init__(self, scale: float, clips: int | None = None) -> None:
        if clips is not None and clips < 1:
            raise ValueError(f"clips: expected at least 1, or null for all, got {clips}")
        self.scale, self.clips = float(scale), clips

    @contextmanager
    def open(self, task: Any, datamodule: Any, precision: Precision) -> Iterator[Samples]:
        """See SampleSource."""
        from luve_lightning.datamodules.latent_pairs import LatentPairsDataModule, WholeLatentPairs
        from luve_lightning.tasks.base import Upsampling, keeps

        if not keeps(task, Upsampling) or not isinstance(datamodule, LatentPairsDataModule):
            raise ValueError(
                f"source: UpsampledVideos needs a VLUerTask and latent pairs, got {type(task).__name__} and "
                f"{type(datamodule).__name__}; what generates has GeneratedVideos"
            )
        if self.scale not in datamodule.scales:
            known = ", ".join(f"{scale:g}" for scale in datamodule.scales)
            raise ValueError(f"source: scale {self.scale:g} is none of the data's: {known}")
        pairs = datamodule.pairs[datamodule.open_held_out()]
        held_out = WholeLatentPairs(datamodule.store, pairs, [self.scale], self.clips)
        entries = [pair.entry for pair, _ in held_out.items]
        names = [_file_name(i, f"{entry.clip_id}_x{self.scale:g}") for i, entry in enumerate(entries)]

        def make(index: int) -> SampleVideo:
            item = held_out[index]
            high = item["hr"]
            size: Size3d = (high.shape[1], high.shape[2], high.shape[3])
            with precision():
                latents = task.net(item["lr"].unsqueeze(0).to(task.device), size)
            return SampleVideo(_frames(task.codec.decode(latents)), _frames(item["video"].unsqueeze(0)))

        yield Samples(
            names=names,
            captions=[entry.clip_id for entry in entries],
            make=make,
            fps=(datamodule.fps or (entries[0].fps if entries else 16.0)) / datamodule.stride,
            real_names=names,
            real=lambda index: _frames(held_out[index]["video"].unsqueeze(0)),
        )


def _embedded(task: Denoising, embed: Embed | None, text: str) -> Tensor:
    """Embeddings as the task trains with them, 1 x L x D."""
    if embed is None:
        return task.text({"caption": [text]})
    return task.text({"text": embed(text).unsqueeze(0).to(task.device)})


def _read_real(entry: ClipEntry, key: LatentKey, size: tuple[int, int]) -> Tensor:
    """The frames of a stored latent, at another size."""
    frames = read_frames(entry, key)
    return _frames(fit_frames(torch.from_numpy(frames), size).unsqueeze(0))


def _frames(video: Tensor) -> Tensor:
    """Frames of a video 1 x 3 x T x H x W, on the CPU."""
    # A diverged model must not end the run here: values that are not finite become black.
    return video_to_frames(video.float().nan_to_num(-1))[0].cpu()


def _file_name(index: int, text: str) -> str:
    """A file name, unique by its number, and short enough for any file system."""
    return f"{index:03d}-{re.sub(r'[^A-Za-z0-9._]+', '-', text).strip('-.')[:60]}"
