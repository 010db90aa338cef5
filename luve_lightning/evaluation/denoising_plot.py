"""The plot of when frequency bands resolve, as in LuVe's figure 6."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from luve_lightning.evaluation.denoising_spectra import DenoisingSpectra
from luve_lightning.evaluation.sigma_switch import PAPER_SIGMA_SWITCH, SwitchSuggestion
from luve_lightning.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TICKS = 8


def draw_spectra(spectra: DenoisingSpectra, switch: SwitchSuggestion, title: str) -> Figure:
    """One line a band over the denoising steps, with the suggested and the released switch.

    Args:
        spectra: what to draw.
        switch: drawn as a vertical line.
        title: above the plot.

    Returns:
        A figure of its own: pyplot, whose figures are the process's, is left alone.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(matplotlib.rcParamsDefault):  # a user's matplotlibrc does not change a result
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


def save_plot(spectra: DenoisingSpectra, switch: SwitchSuggestion, path: Path, title: str) -> None:
    """Draw into a PNG file, which is either whole or not there; makes its folder."""
    image = io.BytesIO()
    draw_spectra(spectra, switch, title).savefig(image, format="png")
    with replacing(path) as temporary:
        temporary.write_bytes(image.getvalue())
