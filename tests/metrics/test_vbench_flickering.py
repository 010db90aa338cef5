"""TF, by hand and against VBench's way of reading and computing it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch
from av.video.reformatter import Interpolation
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.data.clips import read_clip
from luve_lightning.data.video_files import read_video, write_video
from luve_lightning.metrics import TemporalFlickering
from tests.helpers.video_files import KINDS, missing_encoder
from tests.helpers.video_files import write_video as write_numbered
from tests.helpers.video_metrics import random_video


def vbench(frames: list[Any]) -> float:
    """TF as VBench 0.1.5 defines it, in its own arithmetic: float32 means of frames, then their mean."""
    errors = [np.mean(cv2.absdiff(np.float32(before), np.float32(after))) for before, after in pairwise(frames)]
    return float((255.0 - np.mean(errors).item()) / 255.0)


def opencv_frames(path: Path) -> list[Any]:
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(read[1])
    capture.release()
    return frames


def test_a_hand_computed_case() -> None:
    frames = torch.zeros(3, 2, 2, 3, dtype=torch.uint8)
    frames[1, 0, 0] = torch.tensor([3, 0, 9])
    frames[2] = 255
    # First step: 12 over 12 values. Second: 10 values by 255, one by 252, one by 246.
    steps = (12 / 12, (10 * 255 + 252 + 246) / 12)
    assert TemporalFlickering().score(frames) == pytest.approx((255 - sum(steps) / 2) / 255, abs=1e-15)
    assert TemporalFlickering().score(frames[:1].expand(5, -1, -1, -1)) == 1
    extremes = torch.tensor([0, 255, 0], dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3)
    assert TemporalFlickering().score(extremes) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_vbenchs_arithmetic(frames: int, height: int, width: int, seed: int) -> None:
    video = random_video(frames, height, width, seed)
    assert TemporalFlickering().score(video) == pytest.approx(vbench(list(video.numpy())), abs=1e-6)


def test_large_frames_are_summed_exactly() -> None:
    """Wide rows of the largest differences, in several chunks."""
    video = torch.zeros(4, 300, 4096, 3, dtype=torch.uint8)
    video[1::2] = 254
    video[1, 0, 0, 0] = 253
    values = 3 * video[0].numel()
    assert TemporalFlickering().score(video) == 1 - (254 * values - 2) / (255 * values)


# Files of 8 bits: codecs, open and closed GOPs, subsamplings, ranges.
SAME_PIXELS = ("h264", "h264_open", "h264_444", "h264_full_range", "h264_mkv", "hevc", "vp8", "vp9", "vp9_mp4")


@pytest.mark.parametrize("name", SAME_PIXELS)
def test_files_of_8_bits_give_the_pixels_that_vbench_reads(name: str, tmp_path: Path) -> None:
    if reason := missing_encoder(KINDS[name]):
        pytest.skip(reason)
    check_same(write_numbered(tmp_path, KINDS[name], 30))


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("size", [(96, 160), (98, 162), (270, 482)])
def test_files_that_we_write_too(lossless: bool, size: tuple[int, int], tmp_path: Path) -> None:
    """They are tagged BT.709, which OpenCV took for BT.601 up to 4.12."""
    coarse = random_video(5, 9, 16).permute(0, 3, 1, 2).float()
    frames = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 255).byte()
    path = tmp_path / "clip.mp4"
    write_video(path, frames.permute(0, 2, 3, 1).contiguous().numpy(), 24, lossless)
    check_same(path)


def check_same(path: Path) -> None:
    """OpenCV's pixels are those of all our readers, so the number of the file is VBench's."""
    theirs = opencv_frames(path)
    pixels = np.stack(theirs)[..., ::-1]
    for ours in (read_video(path)[0], read_clip(path, 0, len(theirs))):
        np.testing.assert_array_equal(ours, pixels)
        assert TemporalFlickering().score(torch.from_numpy(ours)) == pytest.approx(vbench(theirs), abs=1e-6)


def test_files_of_10_bits_are_rounded_to_8_in_another_way(tmp_path: Path) -> None:
    """The decoded values are the same; FFmpeg's conversion to RGB is not its conversion to BGR, which OpenCV takes."""
    path = write_numbered(tmp_path, KINDS["h264_10bit"], 12)
    theirs = opencv_frames(path)
    with av.open(path) as container:
        converted = [
            frame.reformat(format="bgr24", interpolation=Interpolation.BICUBIC).to_ndarray()
            for frame in container.decode(video=0)
        ]
    np.testing.assert_array_equal(converted, theirs)
    ours = read_video(path)[0]
    assert TemporalFlickering().score(torch.from_numpy(ours)) == pytest.approx(vbench(theirs), abs=5e-3)
