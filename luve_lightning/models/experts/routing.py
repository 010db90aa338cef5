"""An expert's configuration, which experts act on which sample, and tokens split over processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from luve_lightning.functional.frequency import FrequencyFilter, Grid
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.models.backbones import Place, denoiser_of


@dataclass(frozen=True)
class ExpertConfig:
    """A low-rank expert around whole modules: y = module(x) + alpha / rank * B(A(filter(x))).

    LuVe's (arXiv 2602.11564) low-frequency expert has place "attention", a low-pass filter and the band above its
    t_switch; the high-frequency expert "feed_forward", a high-pass and the band below. The paper publishes neither
    rank nor alpha nor filter, and its "attention modules" may also mean ("attention", "cross_attention").

    Attributes:
        place: module of each block, one or several: self-attention, cross-attention, feed-forward.
        rank: columns of A, >= 1.
        alpha: the correction is scaled by alpha / rank; greater than 0.
        filter: filter of the module's input before A; None is a plain LoRA.
        band: sigmas for which `route_by_sigma` chooses the expert.
    """

    place: Place | tuple[Place, ...]
    rank: int = 32
    alpha: float = 32.0
    filter: FrequencyFilter | None = None
    band: SigmaBand = field(default_factory=SigmaBand)

    def __post_init__(self) -> None:
        if not isinstance(self.place, str):
            object.__setattr__(self, "place", tuple(self.place))  # configuration files give lists
        if not self.places or len(set(self.places)) < len(self.places) or not set(self.places) <= set(get_args(Place)):
            raise ValueError(
                f"expert place {self.place!r}: expected one or more of {', '.join(get_args(Place))}, each once"
            )
        if int(self.rank) != self.rank or self.rank < 1:
            raise ValueError(f"expert rank {self.rank}: expected an integer >= 1")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"expert alpha {self.alpha}: expected a finite number > 0")

    @property
    def places(self) -> tuple[Place, ...]:
        """`place` as a tuple."""
        return (self.place,) if isinstance(self.place, str) else self.place


@dataclass(frozen=True)
class TokenSplit:
    """Each process of a group holds an equal part of the tokens, in the order of the ranks (context parallelism)."""

    group: dist.ProcessGroup

    def gather(self, part: Tensor) -> Tensor:
        """All tokens, B x N x C, from this process's part, B x N/P x C; without gradient."""
        parts = [torch.empty_like(part) for _ in range(self.group.size())]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)

    def own(self, tokens: Tensor) -> Tensor:
        """This process's part of all tokens."""
        return tokens.chunk(self.group.size(), dim=1)[self.group.rank()]


Weights = Tensor | Sequence[bool] | Sequence[float]


@dataclass(frozen=True)
class ActiveExpert:
    """One expert in one forward pass.

    Attributes:
        weights: float32, shape (B,), on the device of the tokens; None when it acts equally on every sample.
        filter: filter of a module's input.
        matrices: matrices of the filter, on the token grid; None without a filter.
    """

    weights: Tensor | None
    filter: FrequencyFilter | None
    matrices: tuple[Tensor | None, ...] | None


@dataclass(frozen=True)
class Call:
    """What the expert layers must know about one forward pass.

    Attributes:
        grid: tokens along T, h, w, for the whole clip.
        experts: the active ones.
        split: how the tokens lie on several processes; None when each layer gets all of them.
    """

    grid: Grid
    experts: dict[str, ActiveExpert]
    split: TokenSplit | None = None


@dataclass
class ExpertState:
    """The experts of one transformer, shared by the transformer and its expert layers.

    Attributes:
        configs: every expert by name.
        active: experts for the next forward pass, with their weights per sample (None: 1 for all).
        split: set where the transformer's tokens are split over processes.
    """

    configs: dict[str, ExpertConfig] = field(default_factory=dict)
    active: dict[str, Tensor | None] = field(default_factory=dict)
    split: TokenSplit | None = None

    def choose(self, names: Iterable[str]) -> None:
        """Use these experts, and no others, for every sample; names of other adapters are ignored."""
        self.active = {name: None for name in names if name in self.configs}

    def forget(self, name: str) -> None:
        """Drop an expert whose adapter was deleted."""
        self.configs.pop(name, None)
        self.active.pop(name, None)

    def call(self, grid: Grid, batch: int, device: torch.device) -> Call:
        """What the layers of one forward pass are told; matrices are built here, once for all of them."""
        experts = {}
        for name, weights in self.active.items():
            if weights is not None and len(weights) != batch:
                raise ValueError(
                    f"expert {name} was activated for a batch of {len(weights)}, the transformer was given {batch}"
                )
            chosen = self.configs[name].filter
            experts[name] = ActiveExpert(
                None if weights is None else weights.to(device),
                chosen,
                None if chosen is None else chosen.matrices(grid, device),
            )
        return Call(grid, experts, self.split)


def install(transformer: Any) -> ExpertState:
    """The transformer's expert state; the first time, it is created and the expert layers are told of it."""
    state: ExpertState | None = getattr(transformer, "expert_state", None)
    if state is None:
        state = transformer.expert_state = ExpertState()
        denoiser_of(transformer).tell_sites()
    return state


def state_of(transformer: Any, name: str | None = None) -> ExpertState:
    """The transformer's expert state; raises one clear line when it has no experts or none of this name."""
    state: ExpertState | None = getattr(transformer, "expert_state", None)
    known = list(state.configs) if state is not None else []
    if state is None or (name is not None and name not in known):
        wanted = f"no expert {name!r} here" if name is not None else f"{type(transformer).__name__} has no experts"
        raise ValueError(f"{wanted}: its experts are {', '.join(known) or 'none, add one with add_expert'}")
    return state


def expert_names(transformer: Any) -> list[str]:
    """Names of the transformer's experts, in the order in which they were added."""
    state: ExpertState | None = getattr(transformer, "expert_state", None)
    return [] if state is None else list(state.configs)


def activate(transformer: Any, choice: str | Mapping[str, Weights] | None) -> None:
    """Choose the experts of the following forward passes, without rebuilding anything or changing gradients.

    A pass that has begun keeps its choice, even where its blocks run again in the backward pass. An expert that no
    sample uses is not computed. diffusers' `set_adapter`, `disable_adapters` and `enable_adapters` choose, too.

    Args:
        transformer: transformer with experts.
        choice: one expert for every sample; None for the base alone; or, for each named expert, its weight per
            sample, shape (B,): bools, or factors of its correction. Weights on a GPU are waited for.

    Raises:
        ValueError: for an unknown expert, or weights that are not finite, one per sample and equal in number.
    """
    state = state_of(transformer)
    if choice is None or isinstance(choice, str):
        if choice is not None:
            state_of(transformer, choice)
        state.choose([] if choice is None else [choice])
        return
    active: dict[str, Tensor | None] = {}
    lengths = set()
    for name, weights in choice.items():
        state_of(transformer, name)
        values = torch.as_tensor(weights, dtype=torch.float32, device="cpu").detach()
        if values.ndim != 1 or not len(values) or not values.isfinite().all():
            raise ValueError(f"weights of expert {name}: expected one finite number per sample, got {weights}")
        lengths.add(len(values))
        if values.any():
            active[name] = None if (values == 1).all() else values
    if len(lengths) > 1:
        raise ValueError(f"weights of experts for batches of different sizes: {sorted(lengths)}")
    state.active = active


@contextmanager
def choice_kept(transformer: Any) -> Iterator[None]:
    """Restores the chosen experts at the end, whatever is chosen inside."""
    state: ExpertState | None = getattr(transformer, "expert_state", None)
    active = {} if state is None else state.active
    try:
        yield
    finally:
        if state is not None:
            state.active = active


def route_by_sigma(transformer: Any, sigma: float | Tensor) -> None:
    """Choose for each sample the experts whose band contains its sigma; outside all bands, the base alone.

    Args:
        transformer: transformer with experts.
        sigma: shifted sigmas, float32 or float64, shape (B,); a number or a 0-d tensor holds for every sample.

    Raises:
        ValueError: for 16-bit sigmas, which rounding moves across a bound, or a wrong shape.
    """
    state = state_of(transformer)
    if isinstance(sigma, Tensor):
        sigma = sigma.detach().cpu()
        if sigma.numel() and not (sigma.min() >= 0 and sigma.max() <= 1):
            raise ValueError(
                f"sigmas from {sigma.min():g} to {sigma.max():g}: expected [0, 1]; a timestep is 1000 times sigma"
            )
        if sigma.ndim == 1:
            activate(transformer, {name: config.band.contains(sigma) for name, config in state.configs.items()})
            return
        if sigma.ndim > 1:
            raise ValueError(f"sigma of shape {tuple(sigma.shape)}: expected one per sample, shape (B,)")
        for config in state.configs.values():
            config.band.contains(sigma)  # refuses 16-bit values
        sigma = float(sigma)
    if not 0 <= sigma <= 1:
        raise ValueError(f"sigma is {sigma:g}: expected [0, 1]; a timestep is 1000 times sigma")
    state.choose([name for name, config in state.configs.items() if config.band.contains(sigma)])
