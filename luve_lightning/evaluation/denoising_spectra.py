"""When frequency bands resolve during denoising, as in LuVe's figure 6, and the noise level for changing experts."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from luve_lightning.cascade.denoise import from_noise
from luve_lightning.cascade.options import Guidance
from luve_lightning.evaluation.bootstrap import draw_counts, percentiles
from luve_lightning.evaluation.tables import Row, table_csv
from luve_lightning.files import replacing, write_text
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.noise_bands import clean_of_velocity
from luve_lightning.functional.spectra import band_power, check_edges, radial_spectrum
from luve_lightning.models.backbones import Denoiser, LatentSpace, Schedule, TextConditioner

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER_SIGMA_SWITCH = 0.875
"""Where the released LuVe checkpoints change from the low- to the high-frequency expert: t_switch 5/12 at shift 5."""
DEFAULT_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class SwitchSuggestion:
    """A noise level at which to change from the low- to the high-frequency expert.

    Attributes:
        sigma: from here on the lowest band stays settled to `share` or more, averaged over the videos.
        sigma_low, sigma_high: ends of its 95 % bootstrap interval over videos; NaN for a single one.
        share: share that counts as settled.
        low, high: share resolved there of the lowest band, and of the highest.
        separated: whether the highest band is settled to less than `share` there; if not, nothing separates them.
    """

    sigma: float
    sigma_low: float
    sigma_high: float
    share: float
    low: float
    high: float
    separated: bool


def suggest_switch(
    spectra: BandResolution, share: float = 0.5, seed: int = 0, replicates: int = 1000
) -> SwitchSuggestion:
    """The noise level at which the lowest band has settled and the highest has not.

    The paper fixes its switch (sigma 0.875) and names an adaptive one as future work; this is our reading of its
    figure. A band is *settled* to (resolved - first) / (1 - first), where first is the share resolved at the first
    step: a model that sees only noise there knows that much from the caption, and no switch can change it. Reason
    for the default share: for Gaussian latents, whose ideal prediction is known, a band of signal power S under
    noise power N resolves to S / (S + N), so its signal rises above the noise at one half. All bands reach shares
    near 1 together, at the end of sampling.

    Args:
        spectra: at least two bands, recorded from pure noise on.
        share: in (0, 1).
        seed: seed of the bootstrap.
        replicates: number of resamples.

    Raises:
        ValueError: for another share, or a single band.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share}")
    if len(spectra.edges) < 3:
        raise ValueError("edges: a switch lies between the lowest and the highest of at least two bands")
    lowest, highest = (spectra.resolved_each[..., band].numpy() for band in (0, -1))
    videos = spectra.videos
    sigma = _crossing(lowest.mean(0), spectra.sigmas, share)
    means = draw_counts(videos, seed, replicates) @ lowest / videos
    ends = percentiles(np.array([_crossing(mean, spectra.sigmas, share) for mean in means]), videos)
    at = spectra.at(sigma)
    separated = sigma > _crossing(highest.mean(0), spectra.sigmas, share)
    return SwitchSuggestion(sigma, *ends, share, float(at[0]), float(at[-1]), separated)


def _crossing(resolved: np.ndarray, sigmas: Sequence[float], share: float) -> float:
    """The noise level from which on a band stays settled to a share or more, interpolated linearly between steps."""
    wanted = resolved[0] + share * (1 - resolved[0])
    below = np.flatnonzero(resolved < wanted)
    if not len(below):
        return sigmas[0]
    last = int(below[-1])  # never the last step, at which everything is resolved
    part = (wanted - resolved[last]) / (resolved[last + 1] - resolved[last])
    return float(sigmas[last] + part * (sigmas[last + 1] - sigmas[last]))


COLUMNS = ("step", "sigma", "timestep", "band", "resolved", "power")
_EMPTY = 1e-12


class NoSpectrum(ValueError):
    """Raised for generated latents whose bands cannot be compared: not finite, or constant."""


@dataclass(frozen=True)
class CleanPrediction:
    """The model's prediction of the clean latent, at one denoising step.

    Attributes:
        sigma: noise level of the step's input.
        timestep: as given to the transformer.
        latents: B x C x t x h x w, float32 on the CPU.
    """

    sigma: float
    timestep: float
    latents: Tensor


@contextmanager
def recorded_predictions(scheduler: Any) -> Iterator[list[CleanPrediction]]:
    """Record the clean latent that each step of a diffusers scheduler starts from, guidance included.

    Works for any pipeline: callbacks at a step's end do not get the model's prediction, so the scheduler's `step`
    is wrapped; its result is unchanged. Every step keeps a copy of the latents: at 2K (13 x 184 x 320, 16
    channels) 49 MB each.

    Args:
        scheduler: a flow-matching scheduler; restored afterwards.

    Yields:
        A list that grows by one entry per step.

    Raises:
        ValueError: when the scheduler's model does not predict velocities.
    """
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if kind != "flow_prediction" or not hasattr(scheduler, "sigmas"):
        raise ValueError(f"{type(scheduler).__name__} is for {kind}, expected a flow-matching scheduler")
    found: list[CleanPrediction] = []
    step = scheduler.step

    def listening(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = step(model_output, timestep, sample, *args, **kwargs)
        sigma = scheduler.sigmas[scheduler.step_index - 1]  # the index has moved to the next step by now
        clean = clean_of_velocity(sample.float(), model_output.float(), sigma.to(sample.device))
        found.append(CleanPrediction(float(sigma), float(timestep), clean.detach().cpu()))
        return result

    scheduler.step = listening
    try:
        yield found
    finally:
        del scheduler.step  # uncovers the class's own


@dataclass(frozen=True)
class BandResolution:
    """How far each band of V videos has resolved at each of S steps.

    Attributes:
        edges: edges of the bands, rising fractions of Nyquist; see `functional.spectra.band_power`.
        sigmas: S noise levels, falling.
        timesteps: S.
        resolved_each: float64, V x S x bands: squared coherence with the last prediction, in [0, 1]; ends at 1.
        power_each: float64, V x S x bands: power of the prediction over that of the last one.
    """

    edges: tuple[float, ...]
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    resolved_each: Tensor
    power_each: Tensor

    @property
    def videos(self) -> int:
        """Number of videos."""
        return len(self.resolved_each)

    @property
    def resolved(self) -> Tensor:
        """Mean over the videos, S x bands; each counts the same, whatever its contrast."""
        return self.resolved_each.mean(0)

    @property
    def power(self) -> Tensor:
        """Mean over the videos, S x bands."""
        return self.power_each.mean(0)

    @property
    def bands(self) -> list[str]:
        """Names of the bands, such as "0-0.25" for up to a quarter of Nyquist."""
        return [f"{low:g}-{high:g}" for low, high in pairwise(self.edges)]

    def rows(self) -> list[Row]:
        """One row per step and band, with the keys COLUMNS; steps count from 0."""
        means = self.resolved.tolist(), self.power.tolist()
        return [
            dict(zip(COLUMNS, (step, sigma, timestep, band, resolved, power), strict=True))
            for step, (sigma, timestep) in enumerate(zip(self.sigmas, self.timesteps, strict=True))
            for band, resolved, power in zip(self.bands, means[0][step], means[1][step], strict=True)
        ]

    def at(self, sigma: float) -> np.ndarray:
        """Share of each band resolved at a noise level, interpolated linearly between steps."""
        levels = np.asarray(self.sigmas)[::-1]
        return np.array([np.interp(sigma, levels, band[::-1]) for band in self.resolved.numpy().T])


def denoising_spectra(predictions: Sequence[CleanPrediction], edges: Sequence[float]) -> BandResolution:
    """Compare each step's prediction with the last one's, band by band.

    Args:
        predictions: predictions of one generation, in order; a batch of B counts as B videos.
        edges: edges of the bands, see `functional.spectra.band_power`.

    Raises:
        ValueError: without predictions, or for bands that the latents are too small for.
        NoSpectrum: when a prediction is not finite or a band of the last one has no power.
    """
    if not predictions:
        raise ValueError("no denoising step was recorded")
    last = predictions[-1].latents.double()
    total = _bands(last, edges)
    if not all(prediction.latents.isfinite().all() for prediction in predictions):
        raise NoSpectrum("the generated latents are not finite: the model has diverged, or overflows in its precision")
    if not (total > 0).all():
        raise NoSpectrum("the generated latents have no power in one of the bands")
    resolved, power = [], []
    for prediction in predictions:
        latents = prediction.latents.double()
        own = _bands(latents, edges)
        # The inner product, from the powers of the two and of their difference.
        product = ((own + total - _bands(latents - last, edges)) / 2).clamp(min=0)
        # A band that is empty except for rounding agrees with nothing.
        resolved.append((product.square() / (own * total)).masked_fill(own < _EMPTY * total, 0).clamp(max=1))
        power.append(own / total)
    return BandResolution(
        edges=tuple(edges),
        sigmas=tuple(prediction.sigma for prediction in predictions),
        timesteps=tuple(prediction.timestep for prediction in predictions),
        resolved_each=torch.stack(resolved, 1),
        power_each=torch.stack(power, 1),
    )


def joined(spectra: Sequence[BandResolution]) -> BandResolution:
    """The videos of several generations with the same steps and bands.

    Raises:
        ValueError: when their steps or bands differ, or without any.
    """
    if len({(s.edges, s.sigmas) for s in spectra}) != 1:
        raise ValueError("only generations with the same noise levels and bands can be put together")
    return replace(
        spectra[0],
        resolved_each=torch.cat([s.resolved_each for s in spectra]),
        power_each=torch.cat([s.power_each for s in spectra]),
    )


def _bands(latents: Tensor, edges: Sequence[float]) -> Tensor:
    """Power of each video in each band, B x bands."""
    return band_power(radial_spectrum(latents), edges).mean(1)


def draw_spectra(spectra: BandResolution, switch: SwitchSuggestion, title: str) -> Figure:
    """One line per band over the denoising steps, with the suggested and the released switch.

    The figure is not one of pyplot's, which belong to the process.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(matplotlib.rcParamsDefault):  # a user's matplotlibrc must not change a result
        figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        steps = np.arange(len(spectra.sigmas))
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(spectra.bands)))
        for name, band, colour in zip(spectra.bands, spectra.resolved.numpy().T, colours, strict=True):
            axes.plot(steps, band, color=colour, label=name)
        for sigma, name, style in (
            (switch.sigma, f"suggested {switch.sigma:.3f}", "--"),
            (PAPER_SIGMA_SWITCH, f"released {PAPER_SIGMA_SWITCH:g}", ":"),
        ):
            place = np.interp(sigma, spectra.sigmas[::-1], steps[::-1])
            axes.axvline(place, color="black", linestyle=style, linewidth=1, label=name)
        ticks = np.unique(np.linspace(0, len(steps) - 1, 8).round().astype(int))
        axes.set_xticks(ticks, [f"{step}\n{spectra.sigmas[step]:.3f}" for step in ticks])
        axes.set_xlabel("denoising step, and its noise level sigma")
        axes.set(ylabel="share resolved", ylim=(0, 1.02), xlim=(0, max(1, len(steps) - 1)))
        axes.set_title(title, fontsize="medium")
        axes.legend(title="of Nyquist", fontsize="small", title_fontsize="small")
    return figure


def check_spectra_options(prompts: Sequence[str], steps: int, edges: Sequence[float], share: float) -> None:
    """Refuse at once what would fail after minutes of generating.

    Raises:
        ValueError: names the option.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one")
    if steps < 2:
        raise ValueError(f"steps: expected at least 2 denoising steps, got {steps}")
    check_edges(edges)
    if len(edges) < 3:
        raise ValueError(f"edges: expected at least two bands, got the edges {list(edges)}")
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share}")


@torch.no_grad()
def generate_spectra(
    denoiser: Denoiser,
    text: TextConditioner,
    schedule: Schedule,
    codec: LatentSpace,
    prompts: Sequence[str],
    size: Size3d,
    steps: int,
    guidance: float,
    seed: int,
    edges: Sequence[float],
    advance: Callable[[], None] = lambda: None,
) -> BandResolution:
    """Generate the latents of each prompt and measure when their bands resolve; nothing is decoded.

    Args:
        denoiser: generates.
        text: embeds the prompts.
        schedule: sets the noise levels.
        codec: gives the latents' size.
        prompts: one video each.
        size: frames, height and width of the videos.
        steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 is none.
        seed: seed of the first prompt's noise; each further prompt takes the next.
        edges: edges of the bands, see `functional.spectra.band_power`.
        advance: called after each denoising step.

    Raises:
        ValueError: for a size that the models would crop, or latents too small for the bands.
    """
    latents = codec.latent_size(*size)
    denoiser.token_grid(latents)
    # Before any work: do the bands fit?
    band_power(radial_spectrum(torch.zeros(1, 1, 1, *latents[1:])), edges)
    text.warn_of_cuts(prompts)
    negative = text([""]) if guidance > 1 else None
    found = []
    # One prompt at a time: every step's latents are kept until the last step.
    for number, prompt in enumerate(prompts):
        with recorded_predictions(schedule.scheduler) as predictions:
            from_noise(
                denoiser.module, schedule, latents, text([prompt]), negative, Guidance(max(guidance, 1.0)), steps,
                torch.Generator("cpu").manual_seed(seed + number), on_step=lambda *_: advance(),
            )  # fmt: skip
        found.append(denoising_spectra(predictions, edges))
    return joined(found)


def write_spectra(
    spectra: BandResolution, switch: SwitchSuggestion, folder: Path, name: str, title: str
) -> tuple[Path, Path]:
    """Write `<name>.csv` and `<name>.png`, each complete or absent, and return their paths."""
    table, plot = folder / f"{name}.csv", folder / f"{name}.png"
    write_text(table, table_csv(COLUMNS, spectra.rows()))
    image = io.BytesIO()
    draw_spectra(spectra, switch, title).savefig(image, format="png")
    with replacing(plot) as temporary:
        temporary.write_bytes(image.getvalue())
    return table, plot


def switch_lines(spectra: BandResolution, switch: SwitchSuggestion) -> list[str]:
    """The result in words: the suggested switch, and the released one beside it."""
    ends = f" (95 % interval {switch.sigma_low:.3f} to {switch.sigma_high:.3f})"
    interval = "" if spectra.videos < 2 else ends
    lines = [
        f"sigma_switch {switch.sigma:.3f}{interval}: there {spectra.bands[0]} of Nyquist is resolved to "
        f"{switch.low:.2f}, {spectra.bands[-1]} to {switch.high:.2f}"
    ]
    if not switch.separated:
        lines.append("the highest band settles no later: no noise level separates them at this share")
    low, high = spectra.at(PAPER_SIGMA_SWITCH)[[0, -1]]
    lines.append(
        f"at the released {PAPER_SIGMA_SWITCH:g}: {spectra.bands[0]} resolved to {low:.2f}, "
        f"{spectra.bands[-1]} to {high:.2f}"
    )
    return lines
