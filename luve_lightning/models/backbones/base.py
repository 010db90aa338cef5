"""The interface between LuVe and a backbone.

A backbone is a diffusers pipeline folder or hub id. A family of backbones is five small classes:

- a `LatentSpace` around its VAE: pixels to normalised latents and back (`latents.py`);
- a `Denoiser` around its transformer: velocities, the sites where experts sit, what training recomputes
  (`denoiser.py`);
- a `TextConditioner` around its tokenizer and text encoder: captions to embeddings;
- a `Schedule` around its scheduler: noise levels and time steps (`schedule.py`);
- a `Backbone`, which knows the class names of its folders, and loads and builds the other four.

Everything else in the package uses only these classes. The modules inside stay reachable because pipelines,
optimisers and checkpoints hold modules; their attributes are private to the family. Read `wan.py` as an example. A
family from another package needs no line changed here: it is found when its module is imported, or through an
entry point (`__init__.py`).
"""

from __future__ import annotations

import socket
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import diffusers
import torch
from diffusers import SchedulerMixin
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn

from luve_lightning.files import read_json
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.machine import check_memory
from luve_lightning.model_folders import KnownWeights, WeightsHeader, cannot_load, is_local, loading
from luve_lightning.models.backbones.denoiser import Denoiser
from luve_lightning.models.backbones.latents import LatentSpace, SizeRules
from luve_lightning.models.backbones.schedule import Schedule

Built = TypeVar("Built")
_MOST = 65_536  # most layers, heads or channels that a new model may have
_SHOWN = 60  # most characters shown of a cut text


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


def hub_file(backbone: str | Path, name: str, part: str = "") -> Path:
    """A file of a backbone from the hub, or from its cache.

    Raises:
        OSError: where it is in neither. Where the hub's name has no address, the cache alone is asked: the hub's own
            library tries for half a minute, for each file.
    """
    offline: OSError | None = None
    if not getproxies().keys() & {"https", "all"}:
        try:
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        except OSError as error:
            offline = error
    try:
        return Path(hf_hub_download(str(backbone), name, subfolder=part or None, local_files_only=offline is not None))
    except LocalEntryNotFoundError as error:
        if offline is None:
            raise
        raise LocalEntryNotFoundError(str(error)) from offline


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
