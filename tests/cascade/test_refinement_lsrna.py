"""LSRNA: noise where the first stage's picture has edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luve_lightning.cascade import CascadeOptions
from luve_lightning.cascade.refinement.lsrna import EdgeNoiseRefinement, canny_edges, latent_strength
from luve_lightning.cascade.stages import decode, refine
from tests.helpers.noise import noise
from tests.helpers.tiny_luve import plain_pipeline


def test_strength_is_the_share_of_edges_from_nothing_to_one() -> None:
    """Frame by frame and cell by cell: the first latent frame is of one frame, the others of two each."""
    rng = np.random.default_rng(0)
    edges = rng.random((2, 5, 8, 12)) < rng.random((2, 5, 8, 12)) ** 2
    got = latent_strength(torch.tensor(edges), (3, 4, 3), 3)
    assert got.shape == (2, 1, 3, 4, 3)
    for video, strength in zip(edges, got, strict=True):
        want = np.zeros((3, 4, 3))
        for j, frames in enumerate(([0], [1, 2], [3, 4])):
            for y in range(4):
                for x in range(3):
                    want[j, y, x] = np.mean([video[t, 2 * y : 2 * y + 2, 4 * x : 4 * x + 4].mean() for t in frames])
        want = (want - want.min()) / (want.max() - want.min())
        np.testing.assert_allclose(strength[0].numpy(), want, atol=1e-6)
    assert not latent_strength(torch.zeros(1, 5, 8, 8, dtype=torch.bool), (2, 4, 4), 2).any()
    assert latent_strength(torch.tensor(edges), (5, 4, 3), 3).shape == (2, 1, 5, 4, 3)


@torch.no_grad()
def test_it_is_luves_refinement_of_latents_with_that_noise(tiny_cascade: Path) -> None:
    pipeline = plain_pipeline(tiny_cascade)
    latents, motion = noise(2, 16, 2, 8, 12), 2 * noise(2, 16, 2, 4, 6)
    run: dict[str, Any] = {"prompt": ["a red boat", "x"], "steps": 4, "skip_steps": 2, "guidance": 1.0}
    method = EdgeNoiseRefinement(min_std=0.25, max_std=0.75, high=20.0)
    got = refine(pipeline, latents, refinement=method, motion=motion, generator=torch.Generator().manual_seed(0), **run)
    video = decode(pipeline, motion, "pt")
    edges = torch.stack([canny_edges(255 * clip, 0, 20.0) for clip in video])
    strength = latent_strength(edges, (2, 8, 12), 2)
    assert strength.amin((1, 2, 3, 4)).tolist() == [0, 0]
    assert strength.amax((1, 2, 3, 4)).tolist() == [1, 1]
    generator = torch.Generator().manual_seed(0)
    noisy = latents + (0.25 + 0.5 * strength) * torch.randn(latents.shape, generator=generator)
    assert torch.equal(got, refine(pipeline, noisy, generator=generator, **run))
    with pytest.raises(ValueError, match="needs the first stage's latents: give motion="):
        refine(pipeline, latents, refinement="lsrna", **run)
    for options, message in (
        ({"min_std": 2.0}, r"min_std 2.0, max_std 1.2: expected 0 <= min_std <= max_std"),
        ({"low": 300}, r"low 300, high 255.0: expected 0 <= low <= high"),
    ):
        with pytest.raises(ValueError, match=f"^refinement_options: {message}$"):
            CascadeOptions(64, 96, refinement="lsrna", refinement_options=options)
