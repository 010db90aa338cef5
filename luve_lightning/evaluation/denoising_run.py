"""Generating videos for their denoising spectra, and writing these down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from luve_lightning.evaluation.denoising_plot import save_plot
from luve_lightning.evaluation.denoising_spectra import (
    COLUMNS,
    DenoisingSpectra,
    denoising_spectra,
    joined,
    recorded_predictions,
)
from luve_lightning.evaluation.sigma_switch import PAPER_SIGMA_SWITCH, SwitchSuggestion
from luve_lightning.evaluation.tables import table_csv
from luve_lightning.files import write_text
from luve_lightning.functional.spectra import band_power, check_edges, radial_spectrum
from luve_lightning.models.backbone import LatentCodec
from luve_lightning.models.text import warn_of_cuts
from luve_lightning.models.transformer import check_token_grid

DEFAULT_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)


def check_spectra_options(prompts: Sequence[str], steps: int, edges: Sequence[float], share: float) -> None:
    """Refuse at once what would fail after minutes of generating.

    Raises:
        ValueError: with the option.
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


def generate_spectra(
    pipeline: Any,
    prompts: Sequence[str],
    size: tuple[int, int, int],
    steps: int,
    guidance: float,
    seed: int,
    edges: Sequence[float],
    length: int,
    advance: Callable[[], None] = lambda: None,
) -> DenoisingSpectra:
    """Generate the latents of each prompt and measure when their bands resolve; nothing is decoded.

    Args:
        pipeline: a diffusers WanPipeline.
        prompts: one video each.
        size: frames, height and width of the videos.
        steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 is none.
        seed: of the first prompt's noise; the next takes the next.
        edges: of the bands, see `functional.spectra.band_power`.
        length: tokens of a prompt, padding included.
        advance: called after each denoising step.

    Raises:
        ValueError: for a size that the models would crop, or latents too small for the bands.
    """
    latents = LatentCodec(pipeline.vae).latent_size(*size)
    check_token_grid(pipeline.transformer, latents)
    band_power(
        radial_spectrum(torch.zeros(1, 1, 1, *latents[1:])), edges
    )  # before any work: do the bands fit?

    warn_of_cuts(pipeline.tokenizer, prompts, length)

    def stepped(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        advance()
        return tensors

    found = []
    # One prompt at a time: every step's latents are kept until the last is there.
    for number, prompt in enumerate(prompts):
        with recorded_predictions(pipeline.scheduler) as predictions:
            pipeline(
                prompt=prompt,
                num_frames=size[0],
                height=size[1],
                width=size[2],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=torch.Generator("cpu").manual_seed(seed + number),
                max_sequence_length=length,
                output_type="latent",
                callback_on_step_end=stepped,
            )
        found.append(denoising_spectra(predictions, edges))
    return joined(found)


def write_spectra(
    spectra: DenoisingSpectra, switch: SwitchSuggestion, folder: Path, name: str, title: str
) -> tuple[Path, Path]:
    """Write `<name>.csv` and `<name>.png` and return their paths."""
    table, plot = folder / f"{name}.csv", folder / f"{name}.png"
    write_text(table, table_csv(COLUMNS, spectra.rows()))
    save_plot(spectra, switch, plot, title)
    return table, plot


def switch_lines(spectra: DenoisingSpectra, switch: SwitchSuggestion) -> list[str]:
    """What was found, in words: the suggested switch, and the released one beside it."""
    interval = (
        "" if spectra.videos < 2 else f" (95 % interval {switch.sigma_low:.3f} to {switch.sigma_high:.3f})"
    )
    lines = [
        f"sigma_switch {switch.sigma:.3f}{interval}: there {spectra.bands[0]} of Nyquist is resolved to "
        f"{switch.low:.2f}, {spectra.bands[-1]} to {switch.high:.2f}"
    ]
    if not switch.separated:
        lines.append("the highest band settles no later: no noise level tells them apart at this share")
    low, high = spectra.at(PAPER_SIGMA_SWITCH)[[0, -1]]
    lines.append(
        f"at the released {PAPER_SIGMA_SWITCH:g}: {spectra.bands[0]} resolved to {low:.2f}, "
        f"{spectra.bands[-1]} to {high:.2f}"
    )
    return lines
