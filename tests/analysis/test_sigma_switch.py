"""The suggested switch, on curves drawn by hand."""

from __future__ import annotations

import math

import pytest
import torch

from luve_lightning.analysis.denoising_spectra import BandResolution, suggest_switch


def curves(*videos: list[list[float]]) -> BandResolution:
    """Spectra with these shares at sigma 1, 0.8, 0.6, ...; a list of steps a video, a list of bands a step."""
    resolved = torch.tensor(videos, dtype=torch.float64)
    sigmas = tuple(1 - 0.2 * k for k in range(resolved.shape[1]))
    edges = tuple(k / resolved.shape[2] for k in range(resolved.shape[2] + 1))
    return BandResolution(edges, sigmas, sigmas, resolved, resolved)


def test_the_switch_is_where_the_low_band_crosses() -> None:
    spectra = curves([[0.0, 0.0], [0.4, 0.1], [0.8, 0.3], [1.0, 1.0]])
    found = suggest_switch(spectra)
    assert found.sigma == pytest.approx(0.75)
    assert (found.low, found.high, found.separated) == (pytest.approx(0.5), pytest.approx(0.15), True)
    assert math.isnan(found.sigma_low)
    assert suggest_switch(spectra, 0.9).sigma == pytest.approx(0.5)


def test_what_the_caption_settles_does_not_count() -> None:
    found = suggest_switch(curves([[0.6, 0.0], [0.7, 0.1], [0.9, 0.3], [1.0, 1.0]]))
    assert (found.sigma, found.low) == (pytest.approx(0.75 - 0.05), pytest.approx(0.8))
    assert suggest_switch(curves([[1.0, 0.0], [1.0, 1.0]])).sigma == 1
    # The high band begins at 0.2, so 0.6 is half of its way.
    for high, separated in ((0.59, True), (0.61, False)):
        spectra = curves([[0.0, 0.2], [0.5, high], [1.0, 1.0]])
        assert suggest_switch(spectra).separated is separated


def test_a_band_that_falls_back_has_not_settled() -> None:
    spectra = curves([[0.0, 0.0], [0.6, 0.5], [0.4, 0.6], [0.6, 0.7], [1.0, 1.0]])
    found = suggest_switch(spectra)
    assert found.sigma == pytest.approx(0.5)
    assert not found.separated
    assert spectra.at(0.9).tolist() == pytest.approx([0.3, 0.25])


def test_the_interval_is_that_of_the_videos() -> None:
    early, late = [[0.2, 0.0], [1.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [0.1, 0.0], [1.0, 1.0]]
    found = suggest_switch(curves(early, late), seed=1)
    alone = [suggest_switch(curves(video)).sigma for video in (early, late)]
    assert (found.sigma_high, found.sigma_low) == (pytest.approx(alone[0]), pytest.approx(alone[1]))
    assert found.sigma_low < found.sigma < found.sigma_high
    same = suggest_switch(curves(early, early, early))
    assert same.sigma_low == same.sigma_high == pytest.approx(same.sigma)


def test_bad_input_is_one_line() -> None:
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="share: expected a number between 0 and 1"):
            suggest_switch(curves([[0.0, 0.0], [1.0, 1.0]]), share)
    with pytest.raises(ValueError, match="at least two bands"):
        suggest_switch(curves([[0.0], [1.0]]))
