"""Which frames of a clip are on screen at equally spaced times: a clip of any frame rate read as one of another.

At `fps` frames a second a clip is the sequence of samples 0, 1, 2, ... that a player shows at 0, 1/fps, 2/fps, ...
seconds after the clip's first frame. A window of n samples then lasts as long in every clip. Sample k is the last frame
whose time is not after k/fps; faster clips lose frames and slower ones repeat some.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

# Files round times to their clock: a frame due at 62.5 ms has the time 63 in Matroska, whose clock counts milliseconds.
# Half a tick makes up for it; clocks that count whole frames are exact.
_COARSEST = Fraction(1, 1000)

SLOWEST = Fraction(1, 2)
"""A clip slower than this share of the wanted rate is refused: every one of its frames would be shown twice or more."""


def exact_rate(fps: float) -> Fraction:
    """The fraction meant by a decimal such as 16 or 23.976.

    Raises:
        ValueError: it is not a number above 0.
    """
    if not 0 < fps < math.inf:
        raise ValueError(f"fps: expected frames a second above 0, or null, got {fps:g}")
    return Fraction(str(fps))


@dataclass(frozen=True)
class FrameTimes:
    """When the frames of a clip are shown.

    Attributes:
        times: time of every frame in presentation order, ascending, in ticks.
        end: when the last frame ends, ticks.
        tick: seconds.
    """

    times: NDArray[np.int64]
    end: int
    tick: Fraction

    @property
    def seconds(self) -> Fraction:
        """How long the clip lasts, from its first frame's time to its last one's end."""
        return (self.end - int(self.times[0])) * self.tick

    @property
    def _slack(self) -> Fraction:
        return min(self.tick, _COARSEST) / 2

    def count(self, fps: float) -> int:
        """Number of samples before the clip ends; at least 1."""
        return max(1, math.ceil((self.seconds - self._slack) * exact_rate(fps)))

    def frames(self, samples: range, fps: float) -> list[int]:
        """The frame that each sample shows; equal numbers follow each other where the clip is slower than `fps`.

        Args:
            samples: sample numbers, ascending, below `count`.
            fps: samples a second.
        """
        rate = exact_rate(fps)
        due = [math.floor((sample / rate + self._slack) / self.tick) for sample in samples]
        shown = np.searchsorted(self.times - self.times[0], np.array(due, dtype=np.int64), side="right") - 1
        return [int(frame) for frame in shown]


def planned_samples(total_frames: int, clip_fps: float, fps: float) -> int:
    """Number of samples that a clip certainly has, by its index alone: those up to its last frame's time.

    A file may have one more, while its last frame is shown. How long that is few files say, and this must not depend
    on it: the windows of a clip follow from the index, on every machine.

    Args:
        total_frames: number of frames, at least 1.
        clip_fps: frames a second of the clip, on average.
        fps: samples a second.
    """
    if total_frames == 1:
        return 1
    return math.floor((total_frames - 1) / exact_rate(clip_fps) * exact_rate(fps)) + 1


def refusal(total_frames: int, clip_fps: float, fps: float) -> str:
    """Why a clip cannot be read at `fps`, as the end of a sentence; empty when it can."""
    if total_frames == 1:
        return ""
    if not 0 < clip_fps < math.inf:
        return f"its frame rate is unknown, as reading at {fps:g} frames a second needs it"
    if exact_rate(clip_fps) < SLOWEST * exact_rate(fps):
        return f"{clip_fps:g} frames a second, less than half of {fps:g}: every frame would be repeated"
    return ""


def slower(clip_fps: float, fps: float) -> bool:
    """Whether a clip is slower than `fps`, so that some of its frames are read twice."""
    return exact_rate(clip_fps) < exact_rate(fps)
