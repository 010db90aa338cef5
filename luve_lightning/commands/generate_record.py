"""What `luve generate` writes down of a run: what decides its videos, how to repeat one, and where it was made."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from luve_lightning.checkout import PACKAGE_ROOT, git_state
from luve_lightning.commands.compose import escaped
from luve_lightning.commands.keys import Keys
from luve_lightning.pipelines.generation_jobs import VideoJob
from luve_lightning.pipelines.generation_settings import CascadeSettings, described
from luve_lightning.pipelines.luve_speed import SpeedOptions

_VERSION = 1  # of the recipe; raise it when the same recipe gives other pixels
# Options that a repetition is not given: it makes one video, in a folder of its own, by one process.
_NOT_REPEATED = (
    "prompts",
    "limit",
    "overwrite",
    "keep_stages",
    "latents",
    "contact_sheet",
    "context_parallel",
    "scale",
)
_JOB = ("prompt", "negative_prompt", "seed", "height", "width", "motion_height", "motion_width", "num_frames")


def recipe_settings(
    settings: CascadeSettings, models: Mapping[str, str], fps: float, lossless: bool
) -> dict[str, Any]:
    """What decides every pixel of a run's videos, besides their prompts, seeds and sizes."""
    return {
        "version": _VERSION,
        **described(settings),
        "models": dict(models),
        "fps": fps,
        "lossless": lossless,
    }


def cache_of(speed: SpeedOptions) -> dict[str, Any] | None:
    """What decides the results of the step-to-step cache, the one option of speed that changes more than rounding.

    Raises:
        ValueError: for a cache that does not exist, or a number out of range.
    """
    if speed.cache_config() is None:
        return None
    key = "cache_threshold" if speed.cache == "first_block" else "cache_interval"
    return {"name": speed.cache, key: getattr(speed, key)}


def command_of(options: Mapping[str, Any], job: VideoJob) -> str:
    """The command that makes one video again, where it was; another `--output` after it makes it elsewhere.

    Args:
        options: of the run, by the names of the function's parameters.
        job: the video.
    """
    own = {key: value for key, value in options.items() if key not in _NOT_REPEATED}
    own |= {key: getattr(job, key) for key in _JOB}
    words = [f"--prompt={own.pop('prompt')}"]  # with `=`, a value that begins with `--` is a value
    keys = Keys("generate")
    for key, value in _leaves(own):
        parameter = keys.root.get(key)
        literal = parameter is not None and parameter.is_text
        words.append(f"--{key}={value if literal else _as_word(value)}")
    return shlex.join(["luve", "generate", *words])


def _as_word(value: object) -> str:
    """A value as the command line reads it back: a path may look like YAML, or like an interpolation."""
    word = str(value)
    if isinstance(value, Path) and (word in ("null", "???") or word[0] in "{~#&!"):
        word = f"./{word}"
    return str(escaped(word))


def _leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            yield f"{prefix}{key}", str(value).lower()
        elif isinstance(value, tuple):
            yield f"{prefix}{key}", list(value)
        elif value is not None:
            yield f"{prefix}{key}", value


def about_run(device: torch.device, processes: int, speed: SpeedOptions) -> dict[str, Any]:
    """When, where and with what a run's videos were made; none of it is compared when a run resumes."""
    return {
        "speed": asdict(speed),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "folder": str(Path.cwd()),
        "git": git_state(PACKAGE_ROOT),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        # On a CPU another number of threads rounds otherwise.
        "threads": torch.get_num_threads(),
        "processes": processes,
        "packages": dict(sorted((d.metadata["Name"], d.version) for d in metadata.distributions())),
    }
