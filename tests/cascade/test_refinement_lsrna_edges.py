"""Canny's edges, against a plain form of the algorithm and OpenCV."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage import data

from luve_lightning.cascade.refinement.lsrna import canny_edges


def plain(grey: np.ndarray, low: float, high: float) -> np.ndarray:
    """Pixel by pixel: gradients, the largest norm across the edge, then what is reached from strong pixels."""
    height, width = grey.shape
    at = np.pad(grey.astype(int), 1, mode="edge")
    norm, slopes = np.zeros((height + 2, width + 2), int), {}
    for y in range(height):
        for x in range(width):
            a = at[y : y + 3, x : x + 3]
            dx = int((a[:, 2] - a[:, 0]) @ [1, 2, 1])
            dy = int((a[2] - a[0]) @ [1, 2, 1])
            norm[y + 1, x + 1], slopes[y + 1, x + 1] = abs(dx) + abs(dy), (dx, dy)
    ridge = set()
    for (y, x), (dx, dy) in slopes.items():
        angle = math.degrees(math.atan2(abs(dy), abs(dx)))
        m = norm[y, x]
        if angle < 22.5:
            first = m > norm[y, x - 1] and m >= norm[y, x + 1]
        elif angle > 67.5:
            first = m > norm[y - 1, x] and m >= norm[y + 1, x]
        else:
            s = 1 if (dx < 0) == (dy < 0) else -1
            first = m > norm[y - 1, x - s] and m > norm[y + 1, x + s]
        if first and m > low:
            ridge.add((y, x))
    waiting = [p for p in ridge if norm[p] > high]
    kept = set(waiting)
    while waiting:
        y, x = waiting.pop()
        near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & ridge - kept
        kept |= near
        waiting += near
    found = np.zeros((height, width), bool)
    for y, x in kept:
        found[y - 1, x - 1] = True
    return found


@pytest.mark.parametrize(("low", "high"), [(0, 255), (60, 200)])
def test_edges_are_those_of_the_plain_algorithm(low: float, high: float) -> None:
    frames = [data.camera()[200:240, 150:203], data.coins()[40:80, 30:83]]
    rgb = torch.tensor(np.stack(frames))[:, None].expand(-1, 3, -1, -1).float()
    got = canny_edges(rgb, low, high)
    assert 0.01 < got.float().mean() < 0.3
    for one, grey in zip(got.numpy(), frames, strict=True):
        assert np.array_equal(one, plain(grey, low, high))


def test_opencv_finds_the_same() -> None:
    cv2 = pytest.importorskip("cv2")
    picture = data.astronaut()[:200, :151]
    want = cv2.Canny(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), 0, 255) > 0
    got = canny_edges(torch.tensor(picture).permute(2, 0, 1)[None], 0, 255)[0].numpy()
    assert (got != want).mean() < 1e-3  # grey levels may be rounded otherwise


def test_a_plain_picture_has_none_and_a_step_has_one() -> None:
    frames = torch.full((2, 3, 6, 8), 90.0)
    frames[1, :, :, 4:] = 200
    got = canny_edges(frames, 0, 255)
    assert not got[0].any()
    assert got[1].sum(1).tolist() == [1] * 6
