"""The cascade's third stage: how upsampled latents become those of a video with the details of its size.

LuVe's own is here, each file of this folder is another way to do it. It offers its methods by name in `METHODS`; that
name is what `luve generate --refinement` calls it, and the fields of its class are the keys of `--refinement_options`.
There is no other list.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from luve_lightning.functional.interpolation import Size3d

if TYPE_CHECKING:
    from luve_lightning.cascade.options import CascadeOptions
    from luve_lightning.cascade.pipeline import LuVePipeline
    from luve_lightning.cascade.run import RefinementRun


@dataclass(frozen=True)
class RefiningSteps:
    """Denoising steps of a refinement whose forward passes are of one size, as `luve plan` counts them.

    Attributes:
        grid: latent frames, height and width of one forward pass.
        steps: steps of their whole schedule.
        skip: how many of these are not taken.
        passes: forward passes of a step, for each of guidance's predictions.
        further: whether these are further passes of the steps before, and no steps of their own.
    """

    grid: Size3d
    steps: int
    skip: int
    passes: int = 1
    further: bool = False


class Refinement(ABC):
    """A way from upsampled latents to refined ones. A subclass is a frozen dataclass; its fields are its options.

    Fields are plain values, with the published defaults; `__post_init__` refuses what is out of range by ValueError.
    Methods are equal when they do the same.

    Attributes:
        trained: name of the training that its refiner must have had, see `Denoiser.trained_for`; None where that is
            LuVe's, or none.
        no_cache: why there may be no step-to-step cache; None where there may be one.
    """

    trained: ClassVar[str | None] = None
    no_cache: ClassVar[str | None] = None

    def __call__(self, given: RefinementRun) -> Tensor:
        """Refine, unless that takes no steps.

        Returns:
            Normalised latents, float32, the shape of `given.latents`.
        """
        return self.refined(given) if self.steps(given.run.steps, given.skip) else given.latents

    @abstractmethod
    def refined(self, given: RefinementRun) -> Tensor:
        """Refined latents, normalised, float32, the shape of `given.latents`; called where there are steps to take."""

    def steps(self, steps: int, skip: int) -> int:
        """Number of denoising steps that it reports, of a schedule of `steps` of which `skip` are skipped."""
        return steps - skip

    def planned(self, motion: Size3d, size: Size3d, steps: int, skip: int) -> list[RefiningSteps]:
        """What `luve plan` counts.

        Args:
            motion: latent frames, height and width of the first stage.
            size: those of the video.
            steps: steps of the whole schedule.
            skip: how many of them are skipped.
        """
        del motion
        return [RefiningSteps(size, steps, skip)] if skip < steps else []

    def check(self, pipeline: LuVePipeline, options: CascadeOptions) -> None:
        """Refuse what it cannot do, before anything is computed.

        Args:
            pipeline: loaded, with its options of speed applied.
            options: those of the video, with every size given.

        Raises:
            ValueError: in one line.
        """
        del pipeline, options

    def record(self) -> dict[str, Any]:
        """Its options as JSON data: part of a stored recipe."""
        own: Any = self
        return asdict(own)


@dataclass(frozen=True)
class ContentRefinement(Refinement):
    """High-resolution content refinement, LuVe's third stage (arXiv 2602.11564): see `cascade.stages.refine`.

    With sigma the level after the skipped steps, (1 - sigma) * latents + sigma * noise is denoised from there.
    """

    def refined(self, given: RefinementRun) -> Tensor:
        """See Refinement."""
        x, _ = given.renoised()
        return given.denoised(x, given.skip)


METHODS: dict[str, type[Refinement]] = {"luve": ContentRefinement}


@cache
def refinement_methods() -> dict[str, type[Refinement]]:
    """The class of every method by name, LuVe's own first."""
    found: dict[str, type[Refinement]] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{module.name}"), "METHODS", {})
    return METHODS | dict(sorted(found.items()))


def refinement_method(name: str, options: Mapping[str, Any] | None = None) -> Refinement:
    """The method of that name, with its options.

    Raises:
        ValueError: there is none, or an option is unknown or of another type or out of range.
    """
    known = refinement_methods()
    if name not in known:
        raise ValueError(f"refinement: expected one of {', '.join(known)}, got {name!r}")
    kind: Any = known[name]
    hints = get_type_hints(kind)
    types = {field.name: hints[field.name] for field in fields(kind)}
    for key, value in (options or {}).items():
        if key not in types:
            raise ValueError(f"refinement_options: {name} has no {key!r}: known are {', '.join(types) or 'none'}")
        if not _is_a(value, types[key]):
            raise ValueError(f"refinement_options.{key}: expected {_in_words(types[key])}, got {value!r}")
    try:
        method: Refinement = kind(**(options or {}))
    except ValueError as error:
        raise ValueError(f"refinement_options: {error}") from None
    return method


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type: a plain type, a Literal, or a union of these; whole numbers are floats."""
    if get_origin(hint) in (Union, UnionType):
        return any(_is_a(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def _in_words(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_in_words, get_args(hint)))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
    return words.get(hint, str(hint))
