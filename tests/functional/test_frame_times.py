"""Clips read at a frame rate, against the frames that a player shows at those times in real files."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.clip_scan import scan
from luve_lightning.data.clips import probe_clip, read_clip
from luve_lightning.functional.frame_times import FrameTimes, exact_rate, planned_samples, refusal, slower
from tests.helpers.video_files import H264_CLOSED, H264_OPEN, HEVC, KINDS, Kind, copy_stream, numbers_of, write_video

NTSC = Fraction(24000, 1001)
MKV = replace(H264_OPEN, suffix=".mkv")
# Phones slow down in the dark and skip frames: milliseconds between frames.
PHONE = [33, 33, 34, 33, 33, 67, 33, 100, 33, 8, 25, 34, 33, 250, 33, 33, 41, 42, 41, 42, 33, 34, 33]


def screen(path: Path) -> list[tuple[Fraction, int]]:
    """What a player shows: the seconds since the first picture and the number of each, decoded from the beginning."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        shown = [
            (frame.pts * Fraction(frame.time_base), numbers_of(frame.to_ndarray(format="rgb24")[None])[0])
            for frame in container.decode(stream)
        ]
    assert [time for time, _ in shown] == sorted(time for time, _ in shown)
    return [(time - shown[0][0], number) for time, number in shown]


def on_screen(shown: list[tuple[Fraction, int]], time: Fraction, late: Fraction = Fraction(0)) -> int:
    """The number on screen at a time; `late`: how much later than due the file's clock may show a picture."""
    return [number for due, number in shown if due <= time + late][-1]


@pytest.mark.parametrize("kind", [H264_CLOSED, H264_OPEN, HEVC, MKV], ids=["closed", "b-frames", "hevc", "mkv"])
@pytest.mark.parametrize("rate", [12, NTSC, 24, 25, 30, 48, 60])
def test_a_window_lasts_as_long_in_every_clip(rate: Fraction | int, kind: Kind, tmp_path: Path) -> None:
    path = write_video(tmp_path, kind, int(rate) + 1, unit=1 / Fraction(rate))
    shown = screen(path)
    got = numbers_of(read_clip(path, 0, 16, fps=16))
    late = Fraction(1, 2000) if kind is MKV else Fraction(0)
    assert got == [on_screen(shown, Fraction(k, 16), late) for k in range(16)]
    if kind is not MKV or rate != NTSC:  # a picture due at 125.125 ms is shown at 125 there
        # By arithmetic too: rounding to a file's clock changes no other frame.
        assert got == [int(Fraction(k, 16) * rate) for k in range(16)]
    assert len(set(got)) == min(16, rate)


@pytest.mark.parametrize("kind", [H264_CLOSED, H264_OPEN, HEVC, MKV], ids=["closed", "b-frames", "hevc", "mkv"])
@pytest.mark.parametrize("fps", [7, 16, 23.976, 30, 60])
def test_variable_frame_rates(fps: float, kind: Kind, tmp_path: Path) -> None:
    due = [0, *np.cumsum(PHONE).tolist()]
    path = write_video(tmp_path, kind, len(due), pts=due, unit=Fraction(1, 1000))
    shown, total = screen(path), scan(path).shown.count(fps)
    times = [k / Fraction(str(fps)) for k in range(total)]
    late = Fraction(1, 2000)
    expected = [on_screen(shown, time, late) for time in times]
    assert numbers_of(read_clip(path, 0, total, fps=fps)) == expected
    assert numbers_of(read_clip(path, 3, 2, stride=2, fps=fps)) == expected[3:6:2]
    with pytest.raises(ClipError, match=rf"too short: frames 1 to {total} at {fps:g} frames a second .* has {total}"):
        read_clip(path, 1, total, fps=fps)
    # What the index plans can be read.
    info = probe_clip(path)
    assert total - fps / 2 < planned_samples(info.frames, info.fps, fps) <= total


def test_time_starts_with_the_first_picture(tmp_path: Path) -> None:
    """Late starts, and B-frames without the edit list that makes up for their delay."""
    plain = write_video(tmp_path, H264_OPEN, 30, name="plain")
    expected = [int(k * 1.5) for k in range(20)]
    late = write_video(tmp_path, H264_OPEN, 30, name="late", pts=range(50, 80))
    bare = write_video(tmp_path, H264_OPEN, 30, name="bare", mux={"use_editlist": "0"})
    mkv = write_video(tmp_path, MKV, 30, name="late", pts=range(48, 78))
    for path in (plain, late, bare, mkv):
        assert numbers_of(read_clip(path, 0, 20, fps=16)) == expected
    assert [scan(path).times[0] > 0 for path in (plain, late, bare, mkv)] == [False, True, True, True]


def test_what_an_edit_list_hides_takes_no_time(tmp_path: Path) -> None:
    source = write_video(tmp_path, H264_OPEN, 40, name="source")
    cut = copy_stream(source, tmp_path / "cut.mp4", keyframe=1, zero=17)
    with av.open(cut) as container:  # the hidden ones have times before 0
        assert min(packet.pts for packet in container.demux(video=0) if packet.size) < 0
    shown = screen(cut)
    assert shown[0] == (0, 17)
    assert numbers_of(read_clip(cut, 0, 15, fps=16)) == [on_screen(shown, Fraction(k, 16)) for k in range(15)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_single_picture(suffix: str, tmp_path: Path) -> None:
    """It is on screen for 1/24 s, so there is no second one at 16 frames a second, but at 60."""
    path = write_video(tmp_path, replace(H264_CLOSED, suffix=suffix), 1)
    assert numbers_of(read_clip(path, 0, 1, fps=16)) == [0]
    assert scan(path).shown.count(16) == 1
    assert planned_samples(1, 0, 16) == 1
    with pytest.raises(ClipError, match="too short: frames 0 to 1 at 16 frames a second asked for, it has 1"):
        read_clip(path, 0, 2, fps=16)


def test_the_last_picture_lasts_as_long_as_its_file_says(tmp_path: Path) -> None:
    path = write_video(tmp_path, replace(H264_CLOSED, options={"bf": "0"}), 3)
    assert scan(path).shown.seconds == Fraction(3, 24)
    long = tmp_path / "long.mp4"
    with av.open(path) as reading, av.open(long, "w") as writing:
        stream = reading.streams.video[0]
        copy = writing.add_stream_from_template(stream)
        packets = [packet for packet in reading.demux(stream) if packet.size]
        packets[-1].duration = round(1 / packets[-1].time_base)
        for packet in packets:
            packet.stream = copy
            writing.mux(packet)
    assert scan(long).shown.seconds == Fraction(2, 24) + 1
    assert numbers_of(read_clip(long, 0, 16, fps=16)) == [0, 1, *[2] * 14]


def test_files_whose_frames_are_counted_have_even_ones(tmp_path: Path) -> None:
    path = write_video(tmp_path, KINDS["h264_avi"], 12)
    assert not len(scan(path).times)
    assert numbers_of(read_clip(path, 0, 8, fps=16)) == [0, 1, 3, 4, 6, 7, 9, 10]


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_every_backend_repeats_and_leaves_out_the_same_frames(backend: str, tmp_path: Path) -> None:
    path = write_video(tmp_path, H264_CLOSED, 30, pts=[*range(20), *range(20, 50, 3)])
    got = read_clip(path, 2, 25, fps=20, backend=backend)  # type: ignore[arg-type]
    shown = screen(path)
    assert numbers_of(got) == [on_screen(shown, Fraction(k, 20)) for k in range(2, 27)]
    same = read_clip(path, 2, 25, fps=20, backend="pyav")
    np.testing.assert_array_equal(got, same)


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=60),
    st.integers(-500, 500),
    st.integers(1, 400),
    st.sampled_from([Fraction(1, 1000), Fraction(1, 24), Fraction(1, 600), Fraction(1, 90000), Fraction(1001, 30000)]),
    st.sampled_from([1, 12, 16, 23.976, 24, 29.97, 60]),
)
def test_samples_are_the_last_frames_not_after_their_times(
    gaps: list[int], first: int, last: int, tick: Fraction, fps: float
) -> None:
    times = first + np.concatenate([[0], np.cumsum(gaps)]).astype(np.int64)
    clip = FrameTimes(times, int(times[-1]) + last, tick)
    total = clip.count(fps)
    assume(total <= 5000)
    slack = min(tick, Fraction(1, 1000)) / 2
    rate = Fraction(str(fps))
    frames = clip.frames(range(total), fps)
    for k, frame in enumerate(frames):
        due = (times - first) * tick <= k / rate + slack
        assert frame == int(due.sum()) - 1
    # All of it is before the end, and the next one is not.
    assert (total - 1) / rate < clip.seconds or total == 1
    assert total / rate + slack >= clip.seconds


@given(st.integers(2, 600), st.sampled_from([12, 23.976, 24, 25, 29.97, 30, 59.94, 60]), st.sampled_from([8, 16, 24]))
def test_what_the_index_plans_is_there(frames: int, rate: float, fps: int) -> None:
    """With the exact rate behind a rounded one, on the clocks that files have."""
    exact = Fraction(rate).limit_denominator(1001)
    planned = planned_samples(frames, rate, fps)
    for tick in (1 / (exact * 512), Fraction(1, 1000), Fraction(1, 90000)):
        times = np.array([round(n / exact / tick) for n in range(frames)], dtype=np.int64)
        found = FrameTimes(times, round(frames / exact / tick), tick).count(fps)
        assert planned <= found <= planned + 1 + fps / rate


def test_slow_clips_are_told_apart() -> None:
    assert [slower(rate, 16) for rate in (12, 15.99, 16, 60)] == [True, True, False, False]
    assert refusal(100, 8, 16) == "" == refusal(1, 0, 16)
    assert refusal(100, 7.5, 16) == "7.5 frames a second, less than half of 16: every frame would be repeated"
    assert "frame rate is unknown" in refusal(100, 0, 16)


@pytest.mark.parametrize("fps", [0, -16, float("nan"), float("inf")])
def test_a_frame_rate_is_a_positive_number(fps: float) -> None:
    with pytest.raises(ValueError, match="fps: expected frames a second above 0, or null, got"):
        exact_rate(fps)
