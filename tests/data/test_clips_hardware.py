"""Clips decoded by hardware: which there is, frames as graphics cards lay them out, and what they must equal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.codec.hwaccel import hwdevices_available

from luve_lightning.data import clips
from luve_lightning.data.clip_container import ClipError, decode
from luve_lightning.data.clips import read_clip, require_hardware
from tests.helpers.video_files import KINDS, write_video

DECODED = ("h264", "hevc", "h264_10bit", "h264_open_mkv", "h264_avi")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_video(folder, KINDS[name], 40, name=name) for name in DECODED}


def test_hardware_that_is_not_here_is_refused_in_one_line(videos: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"^hardware: expected one of .*, got 'abacus'$"):
        read_clip(videos["h264"], 0, 1, hardware="abacus")
    for kind in hwdevices_available():
        message = ""
        try:
            require_hardware(kind)
        except ValueError as error:
            message = str(error)
        if message:
            assert re.fullmatch(rf"hardware: {kind} cannot decode here \(.+\); expected null, .+ software", message)
            with pytest.raises(ValueError, match=f"^hardware: {kind} cannot decode here"):
                read_clip(videos["h264"], 0, 1, hardware=kind)


@pytest.mark.parametrize("kind", DECODED)
def test_what_hardware_gives_is_read_as_softwares(
    kind: str, videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its frames come in the order of graphics cards, colours interleaved. Here software decodes and puts them so."""
    calls = hardware_of_software(monkeypatch)
    got = read_clip(videos[kind], 5, 9, stride=2, hardware="cuda")
    np.testing.assert_array_equal(got, read_clip(videos[kind], 5, 9, stride=2, backend="pyav"))
    timed = read_clip(videos[kind], 5, 9, fps=16, hardware="cuda")
    np.testing.assert_array_equal(timed, read_clip(videos[kind], 5, 9, fps=16, backend="pyav"))
    assert set(calls) == {"p010le" if kind == "h264_10bit" else "nv12"}


def test_a_clip_that_hardware_decodes_otherwise_is_refused(
    videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hardware_of_software(monkeypatch, darker=3)
    with pytest.raises(ClipError, match=r"is decoded differently by cuda, by up to \d of 255 levels"):
        read_clip(videos["h264"], 0, 1, hardware="cuda")


def hardware_of_software(monkeypatch: pytest.MonkeyPatch, darker: int = 0) -> list[str]:
    """Makes "cuda" decode in software, its frames laid out as a graphics card's; the formats that were used."""
    used: list[str] = []
    by_hardware = False

    def accelerator(kind: str | None) -> None:
        nonlocal by_hardware
        by_hardware = kind is not None

    def decoded(*args: Any) -> Iterator[av.VideoFrame]:
        for frame in decode(*args):
            if not by_hardware:
                yield frame
                continue
            form = "p010le" if "10" in frame.format.name else "nv12"
            other = frame.reformat(format=form)
            if darker:
                plane = np.frombuffer(other.planes[0], dtype=np.uint8) - darker
                other.planes[0].update(plane.tobytes())
            used.append(form)
            yield other

    monkeypatch.setattr(clips, "require_hardware", lambda kind: None)
    monkeypatch.setattr(clips, "_accelerator", accelerator)
    monkeypatch.setattr(clips, "decode", decoded)
    return used
