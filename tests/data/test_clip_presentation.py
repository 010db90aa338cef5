"""Clips are read as a player shows them, or refused by name: real files, compared with plain references."""

from __future__ import annotations

import io
import math
import shutil
import struct
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from luve_lightning.data.clip_container import ClipError, RefusedClip
from luve_lightning.data.clips import probe_clip, read_clip
from luve_lightning.data.hashes import look
from luve_lightning.data.video_files import read_video
from tests.helpers.video_files import (
    H264_CLOSED,
    HEVC,
    SIZE,
    Kind,
    add_entry_box,
    numbered_frame,
    numbers_of,
    set_matrix,
    write_planes,
    write_video,
)


def x264(parameters: str, kind: Kind = H264_CLOSED) -> Kind:
    """A kind with further parameters of x264."""
    options = kind.options | {"x264-params": f"{kind.options['x264-params']}:{parameters}"}
    return replace(kind, options=options)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("plain"), count=4)


# Display matrices ------------------------------------------------------------------------------------------

LEFT_RIGHT, UPSIDE_DOWN = np.s_[:, :, ::-1], np.s_[:, ::-1]


@pytest.mark.parametrize(
    ("matrix", "mirror", "turns"),
    [
        ((1, 0, 0, 1), None, 0),
        ((0, -1, 1, 0), None, 1),
        ((-1, 0, 0, -1), None, 2),
        ((0, 1, -1, 0), None, 3),
        ((-1, 0, 0, 1), LEFT_RIGHT, 0),
        ((1, 0, 0, -1), UPSIDE_DOWN, 0),
        ((0, -1, -1, 0), LEFT_RIGHT, 3),
        ((0, 1, 1, 0), LEFT_RIGHT, 1),
        ((-0.5, 0, 0, 0.5), LEFT_RIGHT, 0),
        ((1, 0.005, -0.005, 1), None, 0),
    ],
)
def test_the_whole_display_matrix_is_applied(
    matrix: tuple[float, ...], mirror: object, turns: int, plain: Path, tmp_path: Path
) -> None:
    path = set_matrix(Path(shutil.copy(plain, tmp_path / "shown.mp4")), *matrix)  # type: ignore[arg-type]
    upright = read_clip(plain, 0, 4)
    expected = np.rot90(upright if mirror is None else upright[mirror], turns, axes=(1, 2))  # type: ignore[index]
    np.testing.assert_array_equal(read_clip(path, 0, 4), expected)
    # Each pixel goes where the matrix says, counted from the middle, y downwards.
    a, b, c, d = (float(np.sign(round(value, 1))) for value in matrix)
    at, middle = np.array([10, 30]), (SIZE - 1) / 2
    x, y = (np.array([[a, c], [b, d]]) @ (at - middle) + middle).astype(int)
    np.testing.assert_array_equal(expected[:, y, x], upright[:, at[1], at[0]])


@pytest.mark.parametrize("matrix", [(0.7071, 0.7071, -0.7071, 0.7071), (1, 0, 0.5, 1), (0, 0, 0, 0), (1, 0.1, -0.1, 1)])
def test_other_matrices_are_refused(matrix: tuple[float, ...], plain: Path, tmp_path: Path) -> None:
    path = set_matrix(Path(shutil.copy(plain, tmp_path / "odd.mp4")), *matrix)  # type: ignore[arg-type]
    with pytest.raises(RefusedClip, match="otherwise than by quarter turns and flips"):
        probe_clip(path)
    with pytest.raises(RefusedClip):  # also when it is met again
        read_clip(path, 0, 1)


def jpeg(image: np.ndarray, orientation: int) -> bytes:
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x010F], exif[0x0112] = "maker", orientation
    Image.fromarray(image).save(content, "jpeg", exif=exif, quality=95)
    return content.getvalue()


def test_cameras_motion_jpeg_is_read(tmp_path: Path) -> None:
    """Its Exif data is a kind of side data that PyAV 18 stumbles over."""
    images = {}
    for orientation in (1, 4):
        path = tmp_path / f"{orientation}.mov"
        with av.open(path, "w") as container:
            stream = container.add_stream("mjpeg", rate=24)
            assert isinstance(stream, av.VideoStream)
            stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuvj420p"
            for number in range(3):
                packet = av.Packet(jpeg(numbered_frame(number), orientation))
                packet.pts = packet.dts = number
                packet.time_base, packet.duration, packet.stream = Fraction(1, 24), 1, stream
                packet.is_keyframe = True
                container.mux(packet)
        images[orientation] = read_clip(path, 0, 3)
    assert numbers_of(images[1]) == [0, 1, 2]
    np.testing.assert_array_equal(images[4], images[1][UPSIDE_DOWN])


# Shapes of pixels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "size"), [("2/1", (96, 192)), ("64/45", (96, 137)), ("1/2", (192, 96))])
def test_pixels_are_made_square(shape: str, size: tuple[int, int], plain: Path, tmp_path: Path) -> None:
    path = write_video(tmp_path, x264(f"sar={shape}"), 4)
    info = probe_clip(path)
    assert (info.height, info.width) == size
    frames = read_clip(path, 1, 2)
    for frame, stored in zip(frames, read_clip(plain, 1, 2), strict=True):
        expected = Image.fromarray(stored).resize(size[::-1], Image.Resampling.BICUBIC)
        assert np.abs(frame.astype(int) - np.asarray(expected)).max() <= 1
    # Turned after that: what lies on its side is as wide as it was high.
    set_matrix(path, 0, -1, 1, 0)
    np.testing.assert_array_equal(read_clip(path, 1, 2), np.rot90(frames, 1, axes=(1, 2)))
    assert (probe_clip(path).width, probe_clip(path).height) == size


def test_pixels_that_differ_by_less_than_the_width_of_one_are_square(tmp_path: Path) -> None:
    path = write_video(tmp_path, x264("sar=1001/1000"), 3)
    assert probe_clip(path).trusted_by_decord
    assert not look(path).label


def test_impossible_shapes_are_refused(plain: Path, tmp_path: Path) -> None:
    path = set_matrix(Path(shutil.copy(plain, tmp_path / "flat.mp4")), 10, 0, 0, 1)
    with pytest.raises(RefusedClip, match="pixels of 10:1"):
        probe_clip(path)


# What the container says -----------------------------------------------------------------------------------


def aperture(width: int, height: int, right: int = 0) -> bytes:
    return struct.pack(">IIIIiIiI", width, 1, height, 1, right, 1, 0, 1)


def test_a_crop_by_the_container_is_refused(plain: Path, tmp_path: Path) -> None:
    for number, (crop, refused) in enumerate(
        [(aperture(SIZE, SIZE), ""), (aperture(48, SIZE), "48x96 of 96x96"), (aperture(SIZE, SIZE, 2), "96x96 of")]
    ):
        path = Path(shutil.copy(plain, tmp_path / f"{number}.mp4"))
        add_entry_box(path, b"clap", crop)
        assert (refused in look(path).refused) if refused else not look(path).refused
        if refused:
            with pytest.raises(RefusedClip, match="is cropped by its container to"):
                read_clip(path, 0, 1)
        else:
            assert probe_clip(path).trusted_by_decord


def test_dolby_vision_for_its_own_players_is_refused(plain: Path, tmp_path: Path) -> None:
    record = bytes([1, 0, 5 << 1, 0x35])  # profile 5, with RPU and base layer
    alone = add_entry_box(Path(shutil.copy(plain, tmp_path / "5.mp4")), b"dvcC", record + bytes(20))
    with pytest.raises(RefusedClip, match=r"is Dolby Vision without a picture for other players \(profile 5\)"):
        read_clip(alone, 0, 1)
    # Profile 8 with a base layer in SDR (compatibility 2) is shown like any other clip.
    both = add_entry_box(Path(shutil.copy(plain, tmp_path / "8.mp4")), b"dvvC", record + b"\x20" + bytes(19))
    assert len(read_clip(both, 0, 4)) == 4


# Colour ----------------------------------------------------------------------------------------------------

BT2020_TO_BT709 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]


def pq(light: float) -> float:
    """SMPTE ST 2084: the code of so many cd/m2."""
    power = (light / 10000) ** (2610 / 16384)
    return float(((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32))


def light_of_pq(code: float) -> float:
    root = code ** (32 / 2523)
    part = max(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)
    return float(10000 * part ** (16384 / 2610))


def hlg(scene: float) -> float:
    """ITU-R BT.2100: the code of scene light in [0, 1]."""
    if scene <= 1 / 12:
        return math.sqrt(3 * scene)
    return 0.17883277 * math.log(12 * scene - 0.28466892) + 0.55991073


def rolled_off(light: float) -> float:
    """ITU-R BT.2390-11, 5.4.1, from 1,000 to 203 cd/m2, without black levels."""
    e1, largest = pq(min(light, 1000)) / pq(1000), pq(203) / pq(1000)
    knee = 1.5 * largest - 0.5
    if e1 > knee:
        t = (e1 - knee) / (1 - knee)
        e1 = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee)
        e1 += (-2 * t**3 + 3 * t**2) * largest
    return light_of_pq(e1 * pq(1000))


def shown(light: list[float]) -> list[int]:
    """SDR pixel of display light in cd/m2, BT.2020."""
    red, green, blue = (max(sum(m * v for m, v in zip(row, light, strict=True)), 0) for row in BT2020_TO_BT709)
    largest = max(red, green, blue)
    gain = rolled_off(largest) / largest if largest else 1
    return [round(255 * min(value * gain / 203, 1) ** (1 / 2.4)) for value in (red, green, blue)]


LIGHTS = [[v] * 3 for v in (0.0, 0.5, 5.0, 26.0, 80.0, 203.0, 600.0, 1000.0)]
LIGHTS += [[40.0, 8.0, 4.0], [3.0, 30.0, 6.0], [150.0, 40.0, 400.0], [900.0, 700.0, 20.0], [60.0, 60.0, 3.0]]


def patches(codes: list[list[float]]) -> np.ndarray:
    """10-bit limited Y'CbCr (BT.2020, non-constant luminance) of one 8x8 patch for each R'G'B', side by side."""
    red, green, blue = np.array(codes).T
    luma = 0.2627 * red + 0.678 * green + 0.0593 * blue
    values = [876 * luma + 64, 896 * (blue - luma) / 1.8814 + 512, 896 * (red - luma) / 1.4746 + 512]
    planes = np.round(np.stack(values)).astype(np.uint16)
    return planes[:, None, :].repeat(16, axis=1).repeat(8, axis=2)


TAGS = "colorprim=bt2020:colormatrix=bt2020nc:range=tv:log-level=none"


def write_patches(folder: Path, codes: list[list[float]], transfer: str, encoder: str = "libx265") -> Path:
    parameters = {"x265-params": f"lossless=1:transfer={transfer}:{TAGS}:pools=1"}
    if encoder == "libx264":
        parameters = {"qp": "0", "x264-params": f"transfer={transfer}:{TAGS.rpartition(':')[0]}"}
    return write_planes(
        folder / "patches.mp4", [patches(codes)] * 3, "yuv444p10le", encoder, preset="veryfast", **parameters
    )


def read_patches(path: Path) -> np.ndarray:
    return read_clip(path, 1, 1)[0, 8, 4::8].astype(int)


@pytest.mark.parametrize("encoder", ["libx264", "libx265"])
def test_pq_is_shown_in_sdr(encoder: str, tmp_path: Path) -> None:
    path = write_patches(tmp_path, [[pq(v) for v in light] for light in LIGHTS], "smpte2084", encoder)
    assert np.abs(read_patches(path) - [shown(light) for light in LIGHTS]).max() <= 2
    np.testing.assert_array_equal(read_video(path)[0][1], read_clip(path, 1, 1)[0])


def test_hlg_is_shown_in_sdr(tmp_path: Path) -> None:
    scenes = [[v / 1000 for v in light] for light in LIGHTS]
    lights = []
    for scene in scenes:
        luminance = 0.2627 * scene[0] + 0.678 * scene[1] + 0.0593 * scene[2]
        lights.append([1000 * luminance**0.2 * v if luminance else 0.0 for v in scene])
    path = write_patches(tmp_path, [[hlg(v) for v in scene] for scene in scenes], "arib-std-b67")
    assert np.abs(read_patches(path) - [shown(light) for light in lights]).max() <= 2


def test_dark_and_middle_tones_of_pq_come_back_as_they_were(tmp_path: Path) -> None:
    """SDR put into PQ at 203 cd/m2 for white: below the knee nothing is changed."""
    pixels = [[0, 0, 0], [40, 40, 40], [120, 20, 20], [30, 130, 60], [30, 30, 160], [160, 160, 160]]
    to_bt2020 = np.linalg.inv(BT2020_TO_BT709)
    lights = [to_bt2020 @ ((np.array(pixel) / 255) ** 2.4 * 203) for pixel in pixels]
    path = write_patches(tmp_path, [[pq(max(v, 0)) for v in light] for light in lights], "smpte2084")
    assert np.abs(read_patches(path) - pixels).max() <= 3


def test_wide_gamut_sdr_is_converted(tmp_path: Path) -> None:
    pixels = [[0, 0, 0], [255, 255, 255], [90, 90, 90], [180, 100, 60], [60, 140, 90], [40, 70, 200]]
    to_bt2020 = np.linalg.inv(BT2020_TO_BT709)
    codes = [list((to_bt2020 @ ((np.array(pixel) / 255) ** 2.4)) ** (1 / 2.4)) for pixel in pixels]
    path = write_patches(tmp_path, codes, "bt2020-10")
    assert np.abs(read_patches(path) - pixels).max() <= 2


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ("transfer=linear", r"a transfer that is not shown as stored \(linear\)"),
        ("transfer=log316", r"a transfer that is not shown as stored \(log316\)"),
        ("colorprim=smpte431", r"primaries that cannot be converted \(smpte431\)"),
        ("colormatrix=YCgCo", r"a colour matrix that cannot be converted \(ycgco\)"),
        ("colormatrix=ICtCp:transfer=smpte2084", r"a colour matrix that cannot be converted \(ictcp\)"),
        ("transfer=smpte2084:colorprim=bt2020", r"is HDR \(smpte2084\) and does not say its colour matrix"),
    ],
)
def test_colours_that_cannot_be_shown_are_refused(tags: str, reason: str, tmp_path: Path) -> None:
    path = write_video(tmp_path, x264(tags), 2)
    with pytest.raises(RefusedClip, match=reason):
        read_clip(path, 0, 1)
    assert look(path).refused


@pytest.mark.parametrize(
    "tags",
    ["transfer=bt709:colorprim=bt709:colormatrix=bt709", "transfer=bt470bg:colorprim=bt470bg", "transfer=iec61966-2-1"],
)
def test_ordinary_colours_are_left_alone(tags: str, tmp_path: Path) -> None:
    path = write_video(tmp_path, x264(tags), 2)
    assert look(path).label == look(path).refused == ""
    with av.open(path) as container:
        frame = next(container.decode(video=0))
        np.testing.assert_array_equal(read_clip(path, 0, 1)[0], frame.to_ndarray(format="rgb24"))


def join(path: Path, *sources: Path) -> Path:
    """The packets of several files of one frame rate, one after the other."""
    with av.open(path, "w") as writing:
        copy, end = None, 0
        for source in sources:
            with av.open(source) as reading:
                copy = copy or writing.add_stream_from_template(reading.streams.video[0])
                packets = [packet for packet in reading.demux(video=0) if packet.size]
                length = packets[0].duration * len(packets)
                for packet in packets:
                    packet.pts, packet.dts, packet.stream = packet.pts + end, packet.dts + end, copy
                    writing.mux(packet)
                end += length
    return path


# Fields, and what decord may read --------------------------------------------------------------------------


def write_interlaced(folder: Path, encoder: str, suffix: str, **options: str) -> Path:
    path = folder / f"fields-{encoder}{suffix}"
    with av.open(path, "w") as container:
        stream = container.add_stream(encoder, rate=25, options={"flags": "+ildct+ilme", **options})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
        for number in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((96, 96, 3), 40 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    return path


def test_interlaced_clips_are_refused(tmp_path: Path) -> None:
    paths = [
        write_interlaced(tmp_path, "libx264", ".mp4", **{"x264-params": "tff=1"}),
        write_interlaced(tmp_path, "libx264", ".mkv", **{"x264-params": "bff=1"}),
        write_interlaced(tmp_path, "libx264", ".ts", **{"x264-params": "tff=1"}),
    ]
    for path in paths:
        with pytest.raises(RefusedClip, match="is interlaced; deinterlace it first"):
            read_clip(path, 0, 1)
        assert "is interlaced" in look(path).refused


def test_fields_after_progressive_pictures_are_found(tmp_path: Path) -> None:
    """A stream that may change from pictures to fields is decoded once to know."""
    progressive = write_video(tmp_path, x264("fake-interlaced=1:repeat-headers=1"), 12, name="progressive")
    info = probe_clip(progressive)
    assert (info.trusted_by_decord, info.doubt) == (False, "its pictures may be interlaced")
    assert numbers_of(read_clip(progressive, 0, 12)) == list(range(12))
    fields = write_video(tmp_path, x264("tff=1:repeat-headers=1"), 12, name="fields")
    mixed = join(tmp_path / "mixed.mp4", progressive, fields)
    with pytest.raises(RefusedClip, match="is interlaced"):
        read_clip(mixed, 0, 2)
    assert "is interlaced" in look(mixed).refused


@pytest.mark.parametrize("parameters", ["sar=2/1", "transfer=linear", "tff=1", "matrix"])
def test_decord_is_not_used_for_what_it_does_not_apply(parameters: str, tmp_path: Path) -> None:
    path = write_video(tmp_path, H264_CLOSED if parameters == "matrix" else x264(parameters), 4)
    if parameters == "matrix":
        set_matrix(path, -1, 0, 0, 1)
    with pytest.raises(ClipError, match=r"decord does not show it|is interlaced|has a transfer"):
        read_clip(path, 0, 1, backend="decord")


@pytest.mark.parametrize("suffix", [".mkv", ".ts"])
def test_the_shape_of_pixels_may_not_change_midway(suffix: str, tmp_path: Path) -> None:
    paths = [write_video(tmp_path, x264(f"sar={sar}:repeat-headers=1"), 12, name=sar[0]) for sar in ("1/1", "2/1")]
    path = join(tmp_path / f"joined{suffix}", *paths)
    assert not probe_clip(path).trusted_by_decord
    assert len(read_clip(path, 0, 8)) == 8
    with pytest.raises(ClipError, match="changes"):
        read_clip(path, 0, 20)


def test_hevc_in_hdr_is_read_from_any_frame(tmp_path: Path) -> None:
    kind = replace(HEVC, pix_fmt="yuv420p10le")
    parameters = kind.options["x265-params"] + ":transfer=arib-std-b67:colorprim=bt2020:colormatrix=bt2020nc"
    path = write_video(tmp_path, replace(kind, options=kind.options | {"x265-params": parameters}), 30)
    assert numbers_of(read_clip(path, 17, 5)) == list(range(17, 22))
