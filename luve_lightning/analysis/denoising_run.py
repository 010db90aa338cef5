"""The plot of when frequency bands resolve, as in LuVe's figure 6."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from luve_lightning.analysis.denoising_spectra import (
    COLUMNS,
    PAPER_SIGMA_SWITCH,
    BandResolution,
    SwitchSuggestion,
    denoising_spectra,
    joined,
    recorded_predictions,
)
from luve_lightning.cascade.denoise import from_noise
from luve_lightning.cascade.options import Guidance
from luve_lightning.evaluation.tables import table_csv
from luve_lightning.files import replacing, write_text
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.spectra import band_power, check_edges, radial_spectrum
from luve_lightning.models.backbones import Denoiser, LatentSpace, Schedule, TextConditioner

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_TICKS = 8


def draw_spectra(spectra: BandResolution, switch: SwitchSuggestion, title: str) -> Figure:
    """One line per band over the denoising steps, with the suggested and the released switch.

    Args:
        spectra: spectra to draw.
        switch: switch to draw as a vertical line.
        title: title above the plot.

    Returns:
        A new figure, outside pyplot, whose figures belong to the process.
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
        ticks = np.unique(np.linspace(0, len(steps) - 1, _TICKS).round().astype(int))
        axes.set_xticks(ticks, [f"{step}\n{spectra.sigmas[step]:.3f}" for step in ticks])
        axes.set_xlabel("denoising step, and its noise level sigma")
        axes.set_ylabel("share resolved")
        axes.set_ylim(0, 1.02)
        axes.set_xlim(0, max(1, len(steps) - 1))
        axes.set_title(title, fontsize="medium")
        axes.legend(title="of Nyquist", fontsize="small", title_fontsize="small")
    return figure


def save_plot(spectra: BandResolution, switch: SwitchSuggestion, path: Path, title: str) -> None:
    """Draw into a PNG file, atomically; creates its folder."""
    image = io.BytesIO()
    draw_spectra(spectra, switch, title).savefig(image, format="png")
    with replacing(path) as temporary:
        temporary.write_bytes(image.getvalue())


DEFAULT_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)


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
        schedule: the denoising schedule.
        codec: the latent space.
        prompts: prompts, one video each.
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
    """Write `<name>.csv` and `<name>.png` and return their paths."""
    table, plot = folder / f"{name}.csv", folder / f"{name}.png"
    write_text(table, table_csv(COLUMNS, spectra.rows()))
    save_plot(spectra, switch, plot, title)
    return table, plot


def switch_lines(spectra: BandResolution, switch: SwitchSuggestion) -> list[str]:
    """The result in words: the suggested switch, and the released one beside it."""
    interval = (
        "" if spectra.videos < 2 else f" (95 % interval {switch.sigma_low:.3f} to {switch.sigma_high:.3f})"
    )
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
