"""Attentions that replace a transformer's own self-attention: their interface, and one a file beside it.

A file beside the transformer's weights, which diffusers loads, keeps the parameters that an attention adds.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luve_lightning.functional.frequency import Grid
from luve_lightning.model_folders import BRANCH_WEIGHTS, is_local, loading

if TYPE_CHECKING:
    from luve_lightning.models.backbones.denoiser import Denoiser

ATTENTION_KEY = "luve_attention"
"""In a transformer's configuration; diffusers keeps unknown keys."""
GROUP = "luve_lightning.attention"
"""Entry points of packages that bring an attention: name = "package.module:Class"."""
BRANCH = "branch"
"""Submodule of a block's self-attention that holds its parameters of this attention."""


@dataclass(frozen=True)
class Where:
    """Where in a forward pass an attention acts.

    Attributes:
        grid: tokens along T, h, w.
        layer: number of the block, from 0.
        sigmas: noise level of each sample; None unless the attention `needs_sigma`.
    """

    grid: Grid
    layer: int
    sigmas: tuple[float, ...] | None = None


class TaggedRotary(tuple[Tensor, ...]):
    """The tensors of a rotary embedding, with information about the pass that they were made for.

    Attributes:
        grid: tokens along T, h, w.
        call: information for the expert layers; None where the transformer has no experts.
        sigmas: noise levels of the samples, where the attention needs them.
    """

    grid: Grid
    call: Any
    sigmas: tuple[float, ...] | None

    def __new__(
        cls, embedding: Iterable[Tensor], grid: Grid, call: Any, sigmas: tuple[float, ...] | None = None
    ) -> TaggedRotary:
        """An embedding with its tags."""
        tagged = super().__new__(cls, embedding)
        tagged.grid, tagged.call, tagged.sigmas = grid, call, sigmas
        return tagged

    def where(self, layer: int) -> Where:
        """What the attention of a block is told."""
        return Where(self.grid, layer, self.sigmas)


class Attention(ABC):
    """Self-attention of a token grid.

    A subclass is a frozen dataclass: its fields are its settings, plain JSON values. The transformer's `config.json`
    keeps them with the class's name, so a loaded transformer attends as in training.
    """

    @abstractmethod
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, where: Where, branch: nn.Module | None = None
    ) -> Tensor:
        """What each token gathers, shaped like the queries.

        Args:
            query: B x N x heads x width, after norms and positions.
            key: likewise.
            value: likewise.
            where: the block, the token grid (N tokens in all) and the noise levels.
            branch: this block's parameters, made by `branch`.
        """

    @abstractmethod
    def pairs(self, grid: Grid, layer: int, sigma: float) -> int:
        """Number of query-key products that one head computes for one sample; dense attention's is N * N."""

    @property
    def needs_sigma(self) -> bool:
        """Whether it depends on the noise level."""
        return False

    def check(self, layers: int) -> None:
        """Raise ValueError where the settings do not fit a transformer of so many blocks."""
        del layers

    def branch(self, heads: int, width: int) -> nn.Module | None:
        """New parameters for one block, trained and saved with the transformer; None where there are none.

        They must not change the output before training. A module whose attribute `by_head` is true has one set of
        parameters for each head, on their first axis, and is split with the heads by context parallelism.
        """
        del heads, width
        return None

    def __str__(self) -> str:
        """Name, and the settings that are not the default, for people."""
        own: Any = self
        settings = ((field.name, getattr(self, field.name), field.default) for field in fields(own))
        told = ", ".join(f"{name}={value}" for name, value, default in settings if value != default)
        return type(self).__name__ + (f"({told})" if told else "")

    def record(self) -> dict[str, Any]:
        """Name and settings as JSON data."""
        settings: Any = self
        return {"name": type(self).__name__} | asdict(settings)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Attention:
        """The attention that `record` describes.

        Raises:
            ValueError: for anything but a record, an unknown name, or settings that are unknown, missing or wrong.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"attention: expected a name and settings, got {record!r}")
        settings = dict(record)
        name, known = settings.pop("name", None), {kind.__name__: kind for kind in _kinds()}
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"attention {name!r}: expected one of {', '.join(sorted(known))}")
        defaults = {field.name: field.default for field in fields(known[name])}
        for setting in settings.keys() - defaults.keys():
            raise ValueError(f"attention {name}: unknown setting {setting!r}; known: {', '.join(defaults) or 'none'}")
        lacking = [setting for setting, default in defaults.items() if default is MISSING and setting not in settings]
        if lacking:
            needed = " and ".join(map(repr, lacking))
            raise ValueError(f"attention {name}: needs {needed}: give them by class_path and init_args")
        try:
            return known[name](**settings)
        except TypeError as error:
            raise ValueError(f"attention {name}: {error}") from None


def named_attention(attention: Attention | str | None) -> Attention | None:
    """An attention with its default settings, given by its name in small or capital letters; others as they are.

    Raises:
        ValueError: for an unknown name, or an attention with settings that must be given.
    """
    if not isinstance(attention, str):
        return attention
    names = {kind.__name__.lower(): kind.__name__ for kind in _kinds()}
    return Attention.from_record({"name": names.get(attention.lower(), attention)})


def _kinds() -> Iterator[Any]:
    """The known attentions: this folder's, those imported already and those of entry points; a file can add none."""
    for found in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{found.name}")
    for entry in entry_points(group=GROUP):
        entry.load()
    waiting: list[Any] = [*Attention.__subclasses__()]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if not getattr(kind, "__abstractmethods__", None):
            yield kind


def saved_attention(config: Mapping[str, Any], folder: str | Path | None = None) -> Attention | None:
    """The attention that a transformer's configuration names, if any.

    Args:
        config: the configuration.
        folder: where it was read, for errors; None is the folder from which diffusers loaded the transformer.

    Raises:
        ValueError: when it names none that there is; the message says where.
    """
    record = config.get(ATTENTION_KEY)
    try:
        return None if record is None else Attention.from_record(record)
    except ValueError as error:
        folder = folder or config.get("_name_or_path") or "the transformer"
        raise ValueError(f"{folder}: config.json: {ATTENTION_KEY}: {error}") from None


def save_branches(denoiser: Denoiser, folder: Path, old: Path | None = None) -> None:
    """Write the attention's own parameters into a transformer's folder.

    Nothing is written where there are none, unless `old`, the folder to be replaced, has some.
    """
    weights = _branch_weights(denoiser)
    if weights or (old is not None and (old / BRANCH_WEIGHTS).is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: x.contiguous() for key, x in weights.items()}, folder / BRANCH_WEIGHTS)


def load_branches(denoiser: Denoiser, backbone: str | Path, part: str) -> None:
    """Load the attention's own parameters into a transformer that is loaded otherwise; nothing where it has none.

    Args:
        denoiser: the transformer.
        backbone: folder or hub id that it is from.
        part: its subfolder; empty where `backbone` is a transformer's own folder.

    Raises:
        FileNotFoundError: when the hub does not have them.
        ValueError: for a file that is missing, damaged or of other parameters.
    """
    file = Path(backbone) / part / BRANCH_WEIGHTS
    if not denoiser.branches and not file.is_file():
        return
    if not is_local(backbone):
        with loading(backbone, part):
            file = Path(hf_hub_download(str(backbone), BRANCH_WEIGHTS, subfolder=part or None))
    try:
        weights = load_file(file)
    except FileNotFoundError:
        raise ValueError(f"{file}: missing; the transformer's attention has parameters of its own") from None
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from error
    wanted = _branch_weights(denoiser)
    shapes = [{key: tuple(x.shape) for key, x in some.items()} for some in (weights, wanted)]
    if shapes[0] != shapes[1]:
        odd = sorted(dict(shapes[0].items() ^ shapes[1].items()))
        raise ValueError(f"{file}: does not fit the attention in config.json, for instance {odd[0]}")
    with torch.no_grad():
        for key, x in wanted.items():
            x.copy_(weights[key])
    denoiser.module.lacks_branches = False


@contextmanager
def branches_set_aside(denoiser: Denoiser) -> Iterator[None]:
    """Take the attention's own parameters out of the transformer, for diffusers to save it."""
    branches = denoiser.branches
    try:
        for _, site in denoiser.attention_sites:
            site._modules.pop(BRANCH, None)
        yield
    finally:
        for name, site in denoiser.attention_sites:
            if branch := branches.get(f"{name}.{BRANCH}"):
                site.add_module(BRANCH, branch)


def shapes_of(branch: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a block's parameters by name."""
    return {name: tuple(x.shape) for name, x in branch.state_dict().items()}


def _branch_weights(denoiser: Denoiser) -> dict[str, Tensor]:
    return {f"{name}.{key}": x for name, part in denoiser.branches.items() for key, x in part.state_dict().items()}
