"""The interface between LuVe and a backbone.

A backbone is a diffusers pipeline folder or hub id. A family of backbones is five small classes:

- a `LatentSpace` around its VAE: pixels to normalised latents and back (`encoders.py`);
- a `Denoiser` around its transformer: velocities, the sites where experts sit, what training recomputes
  (`denoiser.py`);
- a `TextConditioner` around its tokenizer and text encoder: captions to embeddings (`encoders.py`);
- a `Schedule` around its scheduler: noise levels and time steps;
- a `Backbone`, which knows the class names of its folders, and loads and builds the other four.

Everything else in the package uses only these classes. The modules inside stay reachable because pipelines,
optimisers and checkpoints hold modules; their attributes are private to the family. Read `wan.py` as an example. A
family from another package needs no line changed here: it is found when its module is imported, or through an
entry point (`__init__.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from luve_lightning.files import read_json
from luve_lightning.functional.noise_bands import SigmaBand, timestep_of_sigma
from luve_lightning.machine import check_memory
from luve_lightning.model_folders import KnownWeights, WeightsHeader, cannot_load, hub_file, is_local, loading
from luve_lightning.models.backbones.denoiser import Denoiser
from luve_lightning.models.backbones.encoders import LatentSpace, SizeRules, TextConditioner

Sampler = Literal["backbone", "euler"]
"""The backbone's own scheduler (UniPC in Wan2.1's folders), or `FlowMatchLinearEuler`."""

# Options of diffusers' schedulers that put the noise levels elsewhere, whatever the shift.
_INSTEAD_OF_SHIFT = ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

Built = TypeVar("Built")
_MOST = 65_536  # most layers, heads or channels that a new model may have


def check_sampler(sampler: str) -> None:
    """Refuse an unknown sampler.

    Raises:
        ValueError: names the known ones.
    """
    if sampler not in (known := get_args(Sampler)):
        raise ValueError(f"sampler: expected one of {', '.join(known)}, got {sampler!r}")


class Schedule:
    """Noise levels and time steps of a diffusers scheduler for flow matching.

    Args:
        scheduler: has `sigmas`, `timesteps`, `set_timesteps`, `set_begin_index` and `step`, like diffusers'; a
            pipeline holds and saves it.
        backbone: its origin, for messages.

    Raises:
        ValueError: when it is not for flow matching, like a `scheduler_config.json` without values.
    """

    remembered: ClassVar[int] = 0
    """Earlier velocities that a step looks back on."""
    timestep_dtype: ClassVar[torch.dtype | None] = None
    """Dtype to which the transformer's timesteps are rounded; None leaves them as they are."""

    def __init__(self, scheduler: Any, backbone: str | Path = "") -> None:
        if not (scheduler.config.get("use_flow_sigmas") or type(scheduler).__name__.startswith("FlowMatch")):
            raise ValueError(
                f"backbone {backbone}: its scheduler/ is {type(scheduler).__name__} without use_flow_sigmas; expected "
                "one of flow matching"
            )
        self.scheduler = scheduler

    @property
    def shift(self) -> float:
        """Shift towards more noise, see `functional.noise_bands.shift_sigma`; 1 changes nothing."""
        return float(self.scheduler.config.get(self._shift_key) or 1.0)

    def shifted(self, shift: float) -> Schedule:
        """A copy of the schedule with another shift.

        Raises:
            ValueError: for a shift that is not positive, or one that the scheduler would ignore.
        """
        if not 0 < shift < float("inf"):
            raise ValueError(f"shift: expected a number greater than 0, got {shift}")
        self._check_heeds_shift()
        return self._with(shift)

    def sampled_by(self, sampler: Sampler, shift: float | None = None) -> Schedule:
        """The schedule by which a sampler steps; see `shifted`.

        Args:
            sampler: see Sampler.
            shift: its shift; None keeps this one's.

        Raises:
            ValueError: for an unknown sampler, a shift that is impossible, and where there is none.
        """
        check_sampler(sampler)
        if sampler == "backbone":
            return self if shift is None else self.shifted(shift)
        if shift is None:
            self._check_heeds_shift()  # or its configuration may give one that is not used
        start = EulerSchedule(FlowMatchLinearEuler(num_train_timesteps=self.train_timesteps, shift=self.shift))
        return start if shift is None else start.shifted(shift)

    def steps(self, count: int) -> list[tuple[float, float]]:
        """Timestep and sigma of each of `count` sampling steps; the scheduler is unchanged."""
        scheduler = deepcopy(self.scheduler)
        scheduler.set_timesteps(count)
        # Not strict: the sigmas end at 0.
        return list(zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False))

    @property
    def train_timesteps(self) -> int:
        """The timestep of sigma 1."""
        return int(self.scheduler.config.num_train_timesteps)

    def timestep_of(self, sigma: Tensor) -> Tensor:
        """The transformer's timestep at a sigma; a sampler's own may be rounded."""
        return timestep_of_sigma(sigma, self.train_timesteps)

    @property
    def _shift_key(self) -> str:
        return "flow_shift" if "flow_shift" in self.scheduler.config else "shift"

    def _with(self, shift: float) -> Schedule:
        return type(self)(type(self.scheduler).from_config(self.scheduler.config, **{self._shift_key: shift}))

    def _check_heeds_shift(self) -> None:
        """Refuse a scheduler whose noise levels do not depend on the shift."""
        config = self.scheduler.config
        given = [key for key in _INSTEAD_OF_SHIFT if config.get(key)]
        if self._shift_key not in config:
            why = "has neither flow_shift nor shift"
        elif given:
            why = f"does not follow it with {given[0]}"
        elif self._with(2.0).steps(4) == self._with(4.0).steps(4):
            why = "has the same noise levels at any"
        else:
            return
        raise ValueError(
            f"shift: the backbone's scheduler, {type(self.scheduler).__name__}, {why}; expected one that follows it, "
            "such as UniPCMultistepScheduler with flow_shift, or no shift"
        )


class FlowMatchLinearEuler(FlowMatchEulerDiscreteScheduler):
    """Euler steps from sigma 1 on N equal parts of the unshifted schedule, as DiffSynth-Studio samples Wan.

    Step i of N begins at shift(1 - i / N). diffusers' class alone would space its N levels otherwise and shift the last
    twice; here it is given the levels. Latents stay float32, whatever the velocities are.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Prepare a run of some steps; see diffusers' schedulers."""
        levels = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float32)[:-1]
        super().set_timesteps(sigmas=levels.tolist(), device=device)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        """One step; see diffusers' schedulers."""
        return super().step(model_output.float(), timestep, sample, **options)


class EulerSchedule(Schedule):
    """Steps of `FlowMatchLinearEuler`, with the transformer's timesteps in bfloat16, as in DiffSynth-Studio.

    Experts are chosen by the timesteps before they are rounded.
    """

    timestep_dtype = torch.bfloat16


class Backbone(ABC):
    """A pipeline folder or hub id of one family; its parts are loaded on request.

    Loading raises FileNotFoundError for what is not available, and ValueError for damaged files or another
    model's. `dtype` is the dtype of the weights; default float32, whatever is on disk.

    Args:
        path: local pipeline folder, a folder with some of its parts, a transformer's own folder or file, or a hub id.
    """

    name: ClassVar[str]
    """What configurations of new models call the family."""
    class_names: ClassVar[frozenset[str]]
    """Class names in `model_index.json` and `config.json` by which the family's folders and modules are known."""
    original_names: ClassVar[frozenset[str]] = frozenset()
    """Class names in the `config.json` of transformers in the family's own layout, which is not diffusers'."""
    latent_space_class: ClassVar[type[LatentSpace]]
    denoiser_class: ClassVar[type[Denoiser]]
    text_class: ClassVar[type[TextConditioner]]
    schedule_class: ClassVar[type[Schedule]] = Schedule

    def __init__(self, path: str | Path) -> None:
        self.path = path

    @abstractmethod
    def vae(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Load `vae/` for training it; otherwise use `latent_space`."""

    def latent_space(self, dtype: torch.dtype | None = None) -> LatentSpace:
        """Load `vae/`, frozen."""
        kind: Any = self.latent_space_class
        space: LatentSpace = kind(self.vae(dtype))
        return space

    @abstractmethod
    def tokenizer(self) -> Any:
        """Load `tokenizer/`."""

    @abstractmethod
    def text_encoder(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Load `text_encoder/` for training it; otherwise use `text`."""

    def text(self, dtype: torch.dtype | None = None, length: int | None = None) -> TextConditioner:
        """Load `tokenizer/` and `text_encoder/`, frozen; `length` defaults to the backbone's own."""
        conditioner = self.text_class(self.tokenizer(), self.text_encoder(dtype), length)
        return conditioner.requires_grad_(False).eval()

    @abstractmethod
    def denoiser(self, dtype: torch.dtype | None = None, part: str = "transformer") -> Denoiser:
        """Load the transformer in the subfolder `part`, or in `path` itself where that is a transformer's own.

        diffusers does not load the parameters of a replaced attention, see `load_branches`.
        """

    def schedule(self) -> Schedule:
        """Load `scheduler/`, of whatever diffusers class its configuration names."""
        local = is_local(self.path)
        if local and not (Path(self.path) / "scheduler" / "scheduler_config.json").is_file():
            raise FileNotFoundError(f"backbone {self.path}: no scheduler/scheduler_config.json there")
        named = str(self.config("scheduler", "scheduler_config.json").get("_class_name"))
        kind = getattr(diffusers, named, None)
        if not isinstance(kind, type) or not issubclass(kind, SchedulerMixin):
            raise ValueError(f"backbone {self.path}: its scheduler/ is a {named}, which diffusers does not have")
        with loading(self.path, "scheduler"):
            scheduler = getattr(diffusers, named).from_pretrained(
                str(self.path), subfolder="scheduler", local_files_only=local
            )
        return self.schedule_class(scheduler, self.path)

    def serving(self) -> Mapping[str, SigmaBand]:
        """The sigmas that each transformer serves, by subfolder; most families have one transformer."""
        return {"transformer": SigmaBand()}

    @classmethod
    def recognise(cls, header: WeightsHeader) -> KnownWeights | None:
        """What a single weights file holds of this family; None where it is none of its parts."""
        return None

    # Known from configuration files alone.

    @abstractmethod
    def size_rules(self) -> SizeRules:
        """The multiples that a video's height, width and frames must be."""

    @abstractmethod
    def text_length(self) -> int:
        """Tokens per prompt, padding included."""

    def heads(self) -> int:
        """Attention heads of the transformer, among which a video can be shared."""
        kind: Any = self.denoiser_class
        with torch.device("meta"):
            return int(kind(self.from_config("transformer", self.config("transformer"))).heads)

    def config(self, part: str, name: str = "config.json") -> dict[str, Any]:
        """A configuration file of a part, or of a transformer's own folder."""
        path = Path(self.path)
        if part == "transformer" and (path / "config.json").is_file():
            part = ""
        place = path / part / name
        if not is_local(self.path):
            try:
                place = hub_file(self.path, name, part)
            except OSError as error:
                raise cannot_load(self.path, part, error) from error
        elif not place.is_file():
            raise FileNotFoundError(
                f"backbone {self.path}: no {part}/{name} there; expected a diffusers pipeline folder"
            )
        return read_json(place)

    def shift(self) -> float:
        """The schedule's own shift."""
        config = self.config("scheduler", "scheduler_config.json")
        return float(config.get("flow_shift") or config.get("shift") or 1.0)

    def vae_folder(self) -> Path | None:
        """Where the VAE's files lie on this machine; None when loading must find out."""
        if is_local(self.path):
            folder = Path(self.path) / "vae"
            return folder if (folder / "config.json").is_file() else None
        cached = try_to_load_from_cache(str(self.path), "vae/config.json")
        return Path(cached).parent if isinstance(cached, str) else None

    # New models. Sizes are the user's: ValueError for those out of range, unknown, or inconsistent.

    @classmethod
    @abstractmethod
    def from_config(cls, part: str, config: Mapping[str, Any]) -> nn.Module:
        """A "transformer", "vae" or "text_encoder" with random weights by `config`, on the current device."""

    @classmethod
    @abstractmethod
    def build_vae(cls, sizes: Mapping[str, Any]) -> nn.Module:
        """A new VAE."""

    @classmethod
    @abstractmethod
    def build_text(cls, captions: Iterable[str], length: int, sizes: Mapping[str, Any]) -> TextConditioner:
        """A new text encoder, and a tokenizer of the captions' words; `length` tokens per caption, with padding."""

    @classmethod
    @abstractmethod
    def build_denoiser(cls, sizes: Mapping[str, Any], text_dim: int) -> Denoiser:
        """A new transformer for text embeddings of this width."""

    @classmethod
    @abstractmethod
    def build_schedule(cls, shift: float) -> Schedule:
        """The family's schedule with a shift."""

    @classmethod
    @abstractmethod
    def save_vae(cls, vae: nn.Module, folder: Path, dtype: torch.dtype) -> None:
        """Save a copy of a VAE in a dtype as the `vae/` of `folder`."""

    @classmethod
    @abstractmethod
    def save(
        cls, folder: Path, denoiser: Denoiser, text: TextConditioner, schedule: Schedule, vae: Path, dtype: torch.dtype
    ) -> None:
        """Save a whole backbone folder; the schedule is that for sampling.

        The weights of transformer and text encoder are copied in `dtype`, not changed. `vae` is a backbone folder,
        whose `vae/` is copied byte by byte.
        """


def build(name: str, make: Callable[..., Built], sizes: Mapping[str, Any], **fixed: Any) -> Built:
    """The result of `make` for a user's sizes.

    Args:
        name: option that holds the sizes, for messages.
        make: class of a model or a configuration.
        sizes: arguments of `make`: integers must be in [1, 65536], others finite.
        fixed: further arguments of `make`, not the user's.

    Raises:
        ValueError: a size is out of range, unknown or inconsistent, or the model exceeds memory.
    """
    for key, value in sizes.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int) and not isinstance(number, bool) and not 1 <= number <= _MOST:
                raise ValueError(f"{name}.{key}: expected 1 to {_MOST}, got {number}")
            if isinstance(number, float) and not isfinite(number):
                raise ValueError(f"{name}.{key}: expected a finite number, got {number}")
    try:
        with torch.device("meta"):  # costs no memory; inconsistent sizes show already here
            draft = make(**sizes, **fixed)
    # Anything at all: libraries divide by sizes and unpack them unchecked.
    except Exception as error:
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from error
    if isinstance(draft, nn.Module):
        count = sum(parameter.numel() for parameter in draft.parameters())
        check_memory(f"{name}: its {count:.3g} float32 weights", 4 * count)
        return make(**sizes, **fixed)
    return draft
