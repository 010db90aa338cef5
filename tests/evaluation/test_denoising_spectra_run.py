"""Generating for spectra with a real pipeline, and the table and plot that come of it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from PIL import Image

from luve_lightning.evaluation.denoising_spectra import (
    BandResolution,
    check_spectra_options,
    denoising_spectra,
    draw_spectra,
    generate_spectra,
    recorded_predictions,
    suggest_switch,
    switch_lines,
    write_spectra,
)
from luve_lightning.models.backbones import Schedule, denoiser_of, latent_space_of
from luve_lightning.models.backbones.wan import WanText
from tests.helpers.tiny_spectra import tiny_pipeline

EDGES = (0.0, 0.5, 1.0)


def generate(pipeline: Any, **changes: Any) -> BandResolution:
    options: dict[str, Any] = {
        "prompts": ["left", "squares drift"], "size": (5, 32, 48), "steps": 4, "guidance": 3.0, "seed": 7,
        "edges": EDGES,
    }  # fmt: skip
    text = WanText(pipeline.tokenizer, pipeline.text_encoder, 16)
    return generate_spectra(
        denoiser_of(pipeline.transformer),
        text,
        Schedule(pipeline.scheduler),
        latent_space_of(pipeline.vae),
        **(options | changes),
    )


@pytest.fixture(scope="module")
def pipeline(tiny_backbone: Path) -> Any:
    return tiny_pipeline(tiny_backbone)


@pytest.fixture(scope="module")
def spectra(pipeline: Any) -> BandResolution:
    return generate(pipeline)


def test_each_prompt_is_a_video_of_its_own(pipeline: Any, spectra: BandResolution) -> None:
    assert spectra.videos == 2
    assert spectra.resolved[-1].tolist() == pytest.approx([1, 1])
    assert 0 < spectra.resolved[0].max() < 1
    steps = []
    second = generate(pipeline, prompts=["squares drift"], seed=8, advance=lambda: steps.append(1))
    assert len(steps) == 4
    assert torch.equal(second.resolved_each[0], spectra.resolved_each[1])
    with recorded_predictions(pipeline.scheduler) as predictions:
        pipeline(
            "left", height=32, width=48, num_frames=5, num_inference_steps=4, guidance_scale=3.0,
            max_sequence_length=16, generator=torch.Generator().manual_seed(7), output_type="latent",
        )  # fmt: skip
    assert torch.equal(denoising_spectra(predictions, EDGES).resolved, spectra.resolved_each[0])


def test_what_does_not_fit_is_refused_before_anything_is_generated(pipeline: Any) -> None:
    steps: list[int] = []
    for changes, message in (
        ({"size": (6, 32, 48)}, "6 frames: expected 4k [+] 1"),
        ({"size": (5, 30, 48)}, "height 30: expected a multiple of 8"),
        ({"size": (5, 24, 48)}, "latent height 3: the transformer takes multiples of 2"),
        ({"size": (5, 16, 16)}, "no frequency of these frames lies between 0 and 0.5"),
    ):
        edges = (0.0, 0.5, 0.6, 1.0) if "16, 16" in str(changes) else EDGES
        with pytest.raises(ValueError, match=message if edges == EDGES else "no frequency of these frames"):
            generate(pipeline, edges=edges, advance=lambda: steps.append(1), **changes)
    assert not steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts: expected at least one"),
        ({"steps": 1}, "steps: expected at least 2"),
        ({"edges": (0, 1)}, "edges: expected at least two bands"),
        ({"edges": (0, 2, 3)}, "edges: expected at least two rising fractions"),
        ({"share": 1.0}, "share: expected a number between 0 and 1"),
    ],
)
def test_options_are_checked(changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"prompts": ["left"], "steps": 2, "edges": EDGES, "share": 0.5}
    check_spectra_options(**options)
    with pytest.raises(ValueError, match=message):
        check_spectra_options(**(options | changes))


def test_table_and_plot(spectra: BandResolution, tmp_path: Path) -> None:
    switch = suggest_switch(spectra)
    table, plot = write_spectra(spectra, switch, tmp_path / "out", "here", "title")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "sigma", "timestep", "band", "resolved", "power"]
    assert [float(row["resolved"]) for row in rows if row["band"] == "0.5-1"] == pytest.approx(
        spectra.resolved[:, 1].tolist(), rel=1e-5
    )
    with Image.open(plot) as image:
        assert image.format == "PNG"
        assert image.width > image.height > 300
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["here.csv", "here.png"]


def test_the_plot_has_a_line_a_band_and_leaves_matplotlib_as_it_was(
    spectra: BandResolution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 9.0)
    settings = dict(matplotlib.rcParams)
    switch = suggest_switch(spectra)
    axes = draw_spectra(spectra, switch, "of two videos").axes[0]
    assert dict(matplotlib.rcParams) == settings
    low, high, suggested, released = axes.lines
    assert list(low.get_ydata()) == pytest.approx(spectra.resolved[:, 0].tolist())
    assert list(high.get_ydata()) == pytest.approx(spectra.resolved[:, 1].tolist())
    assert low.get_linewidth() < 9
    # Between which steps a noise level lies.
    for line, sigma in ((suggested, switch.sigma), (released, 0.875)):
        place = line.get_xdata()[0]
        assert spectra.sigmas[int(place + 1)] <= sigma <= spectra.sigmas[int(place)]
    assert [text.get_text() for text in axes.get_legend().get_texts()][:2] == ["0-0.5", "0.5-1"]


def test_the_switch_in_words(spectra: BandResolution) -> None:
    lines = switch_lines(spectra, suggest_switch(spectra))
    assert lines[0].startswith("sigma_switch ")
    assert "95 % interval" in lines[0]
    assert lines[-1].startswith("at the released 0.875: 0-0.5 resolved to ")
