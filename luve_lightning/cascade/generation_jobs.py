"""Videos to generate, their folder, and latents of finished stages: what exists, and who makes the next one.

A video is `<name>.mp4`, or `<name>.png` where it has one frame, with `<name>.json` beside it. The JSON file is written
last: where it exists, the video is complete. Any number of processes may share a folder. The process that makes a video
holds a lock that the operating system drops when the process dies, so no two make the same one, and none waits for a
dead one.
"""

from __future__ import annotations

import glob
import json
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luve_lightning.cascade.options import CascadeOptions
from luve_lightning.data.prompts import PromptLine, check_distinct, check_seed, seed_of
from luve_lightning.data.store import ClaimedFiles
from luve_lightning.files import file_digest, find_json, remove_unfinished, text_digest, write_text
from luve_lightning.locks import share_work
from luve_lightning.machine import choose_device
from luve_lightning.models.backbones import SizeRules
from luve_lightning.safetensors_window import DIGEST, tensor_digest
from luve_lightning.terminal import amount

KEPT_STAGES = ("motion", "upsampled")
"""The stages whose videos `luve generate` can keep, each in a folder of its name."""


@dataclass(frozen=True)
class VideoJob:
    """One video to make.

    Attributes:
        name: file name, without suffix.
        prompt: what to show.
        negative_prompt: what not to show; None is the empty prompt.
        seed: seed of its noise.
        height: height of the video, pixels.
        width: width of the video, pixels.
        motion_height: height of the first stage, pixels.
        motion_width: width of the first stage, pixels.
        num_frames: 4k + 1; 1 is a picture.
    """

    name: str
    prompt: str
    negative_prompt: str | None
    seed: int
    height: int
    width: int
    motion_height: int
    motion_width: int
    num_frames: int

    @property
    def suffix(self) -> str:
        """How its file's name ends: .mp4, or .png for a picture."""
        return ".png" if self.num_frames == 1 else ".mp4"


def make_jobs(
    lines: Sequence[PromptLine],
    options: CascadeOptions,
    rules: SizeRules,
    negative_prompt: str | None = None,
    seed: int = 0,
    own_noise: bool = False,
) -> list[VideoJob]:
    """The videos of a prompt file, all checked.

    Args:
        lines: lines of the file.
        options: sizes of every video whose line has none.
        rules: possible sizes.
        negative_prompt: what not to show, where the line does not say.
        seed: seed of every video whose line has none: adding a line changes no other video.
        own_noise: give such a video a seed that follows from this one and its name, see `seed_of`; else all videos of a
            seed begin with the same noise.

    Raises:
        ValueError: an impossible size, or two lines with the same file; the message names the line.
    """
    check_seed(seed, "seed")
    jobs = []
    for line in lines:
        try:
            jobs.append(_job(line, options, rules, negative_prompt, seed, own_noise))
        except ValueError as error:
            own = line.where and (line.height, line.width, line.num_frames) != (None, None, None)
            raise ValueError(f"prompts: {line.where}: {error}" if own else str(error)) from None
    check_distinct((job.name, line.where) for job, line in zip(jobs, lines, strict=True))
    return jobs


def _job(
    line: PromptLine, options: CascadeOptions, rules: SizeRules, negative_prompt: str | None, seed: int, own_noise: bool
) -> VideoJob:
    own = options.resolved(rules, line.height, line.width, line.num_frames)
    frames, height, width = own.motion
    rules.check_cascade((height, width), (own.height, own.width))
    negative = negative_prompt if line.negative_prompt is None else line.negative_prompt
    given = seed if line.seed is None else line.seed
    name = line.video_name(given)
    seed = seed_of(name, seed) if own_noise and line.seed is None else given
    return VideoJob(name, line.prompt, negative, seed, own.height, own.width, height, width, frames)


class VideoFolder:
    """The folder of the generated videos.

    Args:
        root: the folder; created by the first write.
        settings: what the videos depend on besides their jobs: options, and the models' identities.
        overwrite: replace a video of the same name made differently, instead of refusing.
        stages: further files of each video, `<stage>/<name>.mp4` or .png, without which it is not finished.
        sheet: likewise `<name>.jpg`.
    """

    def __init__(
        self,
        root: Path,
        settings: Mapping[str, Any],
        overwrite: bool = False,
        stages: Sequence[str] = (),
        sheet: bool = False,
    ) -> None:
        self.root, self.overwrite, self.stages, self.sheet = root, overwrite, tuple(stages), sheet
        # As JSON gives it back, tuples as lists, for the comparison with a file.
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._claims = ClaimedFiles(root / ".claims")

    def recipe(self, job: VideoJob) -> dict[str, Any]:
        """Everything that decides a video's pixels, except rounding on different devices."""
        return {**asdict(job), **self.settings}

    def video(self, job: VideoJob) -> Path:
        """The file of a video, or of a picture."""
        return self.root / f"{job.name}{job.suffix}"

    def stage_video(self, job: VideoJob, stage: str) -> Path:
        """The file of an earlier stage's video."""
        return self.root / stage / f"{job.name}{job.suffix}"

    def is_done(self, job: VideoJob) -> bool:
        """Whether a video, with its further files, exists and was made by its recipe.

        Raises:
            ValueError: it was made differently, and may not be overwritten.
        """
        path = self.video(job)
        about = find_json(path.with_suffix(".json"))
        found = about.get("recipe")
        if not (isinstance(found, dict) and path.is_file()):
            return False
        other = _differences(found, self.recipe(job))
        if other and not self.overwrite:
            was = "; ".join(other[:3]) + ("; ..." if len(other) > 3 else "")
            raise ValueError(
                f"{path} was made differently ({was}); choose another --output, or --overwrite true to replace it"
            )
        if about.get("sha256") not in (None, file_digest(path)):
            return False  # cut short since, by a full disk or an interrupted copy
        more = [self.stage_video(job, stage) for stage in self.stages]
        more += [path.with_suffix(".jpg")] if self.sheet else []
        return not other and all(file.is_file() for file in more)

    @contextmanager
    def claim(self, job: VideoJob, *, wait: bool = False) -> Iterator[bool]:
        """Claim a video, and remove what a killed process left of it.

        Yields:
            True when only this caller may write it until the block ends; False when another is making it.
        """
        digest = text_digest(job.name.casefold())
        with self._claims.claim(digest, wait=wait) as mine:
            if mine:
                for folder in (self.root, *(self.root / stage for stage in self.stages)):
                    remove_unfinished(folder)
                    for left in folder.glob(f".{glob.escape(job.name)}.*"):
                        left.unlink(missing_ok=True)
            yield mine


class StageLatents:
    """Latents of finished stages, stored by what they depend on: a later run reuses them.

    The first write creates the folder `root`.
    """

    def __init__(self, root: Path) -> None:
        self._files = ClaimedFiles(root)
        self._files.clean()

    @staticmethod
    def digest(recipe: Mapping[str, Any]) -> str:
        """The name of a stage's latents: sha256 of everything they depend on."""
        return text_digest(json.dumps(recipe, sort_keys=True, ensure_ascii=False))

    def get(self, digest: str) -> dict[str, Tensor] | None:
        """The tensors stored under a digest, on the CPU, or None; damaged ones are removed with a message."""
        path = self._files.path(digest)
        try:
            with safe_open(path, framework="pt") as file:
                known = (file.metadata() or {}).get(DIGEST)
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            damage = str(error)
        else:
            if known is None or known == _digest(tensors):
                return tensors
            damage = "its values are not what was stored (sha256 differs)"
        warnings.warn(f"damaged latents of a stage are made again: {path}: {damage}", stacklevel=2)
        path.unlink(missing_ok=True)
        return None

    def put(self, digest: str, tensors: Mapping[str, Tensor], report: Mapping[str, Any] | None = None) -> None:
        """Store tensors atomically, unless they exist.

        Args:
            digest: their name.
            tensors: by name.
            report: what the stage took, for a JSON file beside them: a run that reuses them measures nothing.
        """
        if report is not None:
            write_text(self._files.path(digest).with_suffix(".json"), json.dumps(report) + "\n")
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        self._files.write(digest, safetensors.torch.save(whole, {DIGEST: _digest(whole)}))

    def remove(self, digest: str) -> None:
        """Remove the tensors stored under a digest, if there are any."""
        for path in (self._files.path(digest), self._files.path(digest).with_suffix(".json")):
            path.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    named = "".join(f"{name} {tensor_digest(tensor)}\n" for name, tensor in sorted(tensors.items()))
    return text_digest(named)


def _differences(found: Any, wanted: Any, key: str = "") -> list[str]:
    """The differences between two recipes, in words."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        inside = [
            _differences(found.get(name), wanted.get(name), f"{key}.{name}" if key else name)
            for name in {**found, **wanted}
        ]
        return [difference for differences in inside for difference in differences]
    if found == wanted:
        return []
    was, now = (textwrap.shorten(repr(value), 40, placeholder="...") for value in (found, wanted))
    return [f"{key} {was}, now {now}"]


@dataclass
class JobTotals:
    """The counts of a run: videos made here, and videos that existed or that another process made."""

    made: int = 0
    there: int = 0


def run_jobs(jobs: Sequence[VideoJob], folder: VideoFolder, make: Callable[[VideoJob], None]) -> JobTotals:
    """Make every missing video; when it returns all exist, whoever made them.

    Processes that share the folder share the work, see `share_work`. `make` makes one video and writes its files.
    """
    totals = JobTotals()

    def made(batch: list[VideoJob]) -> None:
        for job in batch:
            make(job)
            totals.made += 1

    def there(job: VideoJob) -> None:
        totals.there += 1

    share_work(jobs, folder.is_done, folder.claim, made, found=there)
    return totals


# Others wait while one hashes files, encodes videos, or waits for a video that another program is making.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """The position of this process.

    Attributes:
        rank: rank among all processes, from 0.
        count: number of processes.
        local: rank among this machine's processes.
        here: number of this machine's processes.
        together: whether all make each video together.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    here: int = 1
    together: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], context_parallel: int) -> Processes:
        """Read torchrun's variables.

        Args:
            environment: may hold RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.
            context_parallel: number of processes that share a video.

        Raises:
            ValueError: when the number of processes differs from it.
        """
        count = int(environment.get("WORLD_SIZE", "1"))
        if context_parallel < 1 or (context_parallel > 1 and context_parallel != count):
            raise ValueError(
                f"context_parallel {context_parallel}: expected 1, or the number of processes, which is {count}; "
                f"torchrun --nproc-per-node {max(2, context_parallel)} starts them"
            )
        rank = int(environment.get("RANK", "0")) if count > 1 else 0
        local = int(environment.get("LOCAL_RANK", str(rank))) if count > 1 else 0
        here = int(environment.get("LOCAL_WORLD_SIZE", str(local + 1))) if count > 1 else 1
        return cls(rank, count, local, here, context_parallel > 1)

    def device(self, name: str) -> torch.device:
        """The device of this process: its own GPU where there are several.

        Args:
            name: auto, cpu, cuda or cuda:N.

        Raises:
            ValueError: no such device, the same GPU for all, or fewer of them than processes; and for processes that
                make videos together where there is none, as diffusers' context parallelism needs one.
        """
        if self.together and torch.accelerator.device_count() == 0:
            raise ValueError("context_parallel: one video is spread over GPUs, and there is none here")
        if self.count == 1:
            return choose_device(name)
        if name not in ("auto", "cuda", "cpu"):
            raise ValueError(
                f"device: {self.count} processes take a GPU each; expected auto, cuda or cpu, got {name!r}"
            )
        if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        if self.here > (gpus := torch.cuda.device_count()):
            raise ValueError(
                f"device: {self.here} processes take a GPU each, and PyTorch sees {amount(gpus, 'GPU')} here"
            )
        device = choose_device(f"cuda:{self.local}")
        torch.cuda.set_device(device)
        return device

    def begin(self, device: torch.device) -> None:
        """Connect processes that make videos together."""
        if not self.together:
            return
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=_PATIENCE)

    def end(self) -> None:
        """Disconnect them."""
        if self.together:
            dist.destroy_process_group()

    def shared(self, value: Any) -> Any:
        """The first process's value, for all that make videos together."""
        if not self.together:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def follow(self, make: Callable[[int], None]) -> None:
        """Make what the first process makes, until it says that all is done (None)."""
        while (number := self.shared(None)) is not None:
            make(number)
