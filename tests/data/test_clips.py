"""Clip reading against real files whose frames carry their number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.clips import Backend, probe_clip, read_clip
from tests.helpers.video_files import (
    CLOSED,
    HEVC,
    KINDS,
    SIZE,
    copy_stream,
    forget_presentation_times,
    missing_encoder,
    numbers_of,
    write_sound,
    write_video,
)

COUNT = 40


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of each kind that can be encoded here."""
    folder = tmp_path_factory.mktemp("videos")
    return {
        name: write_video(folder, kind, COUNT, name=name) for name, kind in KINDS.items() if not missing_encoder(kind)
    }


@pytest.fixture(params=KINDS)
def video(request: pytest.FixtureRequest, videos: dict[str, Path]) -> Path:
    if request.param not in videos:
        pytest.skip(missing_encoder(KINDS[request.param]))
    return videos[request.param]


def test_every_single_frame_is_the_one_asked_for(video: Path) -> None:
    got = [numbers_of(read_clip(video, index, 1))[0] for index in range(COUNT)]
    assert got == list(range(COUNT))


@pytest.mark.parametrize(("start", "count", "stride"), [(0, COUNT, 1), (11, 17, 1), (5, 9, 4), (COUNT - 1, 1, 7)])
def test_ranges_and_strides(video: Path, start: int, count: int, stride: int) -> None:
    frames = read_clip(video, start, count, stride=stride)
    assert frames.dtype == np.uint8
    assert frames.shape == (count, SIZE, SIZE, 3)
    assert numbers_of(frames) == list(range(start, start + count * stride, stride))


def test_probe_tells_facts(videos: dict[str, Path]) -> None:
    for name, path in videos.items():
        info = probe_clip(path)
        assert (info.frames, info.width, info.height) == (COUNT, SIZE, SIZE), name
        assert info.fps == pytest.approx(24), name
        # VP8 and VP9 may change their size at any picture: PyAV notices, decord does not.
        assert info.trusted_by_decord == (name.startswith("h264") and name in CLOSED), f"{name}: {info.doubt}"
        assert bool(info.doubt) != info.trusted_by_decord
    assert {probe_clip(path).codec for path in videos.values()} >= {"h264", "hevc", "vp8", "vp9"}


@pytest.mark.parametrize("name", CLOSED)
def test_both_libraries_give_the_same_pixels(name: str, videos: dict[str, Path]) -> None:
    if name not in videos:
        pytest.skip(missing_encoder(KINDS[name]))
    decord, pyav = (read_clip(videos[name], 7, 20, backend=b) for b in ("decord", "pyav"))
    np.testing.assert_array_equal(decord, pyav)


def test_decord_is_really_wrong_where_it_is_not_trusted(videos: dict[str, Path]) -> None:
    """The reason for two libraries; should decord ever get these right, the list of doubts can shrink."""
    for name in ("h264_open", "hevc"):
        got = [numbers_of(read_clip(videos[name], i, 1, backend="decord"))[0] for i in range(COUNT)]
        assert got != list(range(COUNT)), name
    with pytest.raises(ClipError, match="cannot be read by decord"):
        read_clip(videos["av1"], 0, 1, backend="decord") if "av1" in videos else pytest.skip("no AV1 encoder")


def test_writing_videos_leaves_this_process_an_ordinary_one(videos: dict[str, Path]) -> None:
    """SVT-AV1 would make it a real-time one, beside which nothing else runs."""
    threads = [int(thread.name) for thread in Path("/proc/self/task").iterdir()]
    assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_OTHER}


def test_decord_strides_evenly_over_open_groups(videos: dict[str, Path]) -> None:
    numbers = numbers_of(read_clip(videos["h264_open"], 3, 9, stride=3, backend="decord"))
    assert len(set(np.diff(numbers))) == 1


@pytest.mark.parametrize("source", ["h264", "h264_mkv", "h264_open", "h264_open_mkv", "hevc", "hevc_mkv", "vp9"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_stream_copied_cut(source: str, suffix: str, videos: dict[str, Path], tmp_path: Path) -> None:
    """A cut has the frames that a player shows, in one unbroken run up to the last."""
    cut = copy_stream(videos[source], tmp_path / f"cut{suffix}", keyframe=1, zero=13 if suffix == ".mp4" else 0)
    info = probe_clip(cut)
    shown = numbers_of(read_clip(cut, 0, info.frames))
    assert shown == list(range(shown[0], COUNT))
    assert suffix == ".mkv" or shown[0] >= 13
    assert [numbers_of(read_clip(cut, i, 1))[0] for i in range(info.frames)] == shown
    assert info.fps == pytest.approx(24, rel=0.01)


def test_cut_hidden_by_an_edit_list_is_not_left_to_decord(videos: dict[str, Path], tmp_path: Path) -> None:
    cut = copy_stream(videos["h264"], tmp_path / "cut.mp4", keyframe=1, zero=15)
    info = probe_clip(cut)
    assert (info.frames, info.trusted_by_decord) == (COUNT - 15, False)
    assert "edit list" in info.doubt
    with pytest.raises(ClipError, match="decord sees 28"):
        read_clip(cut, 0, 1, backend="decord")


def test_cut_into_a_file_without_clean_starts(videos: dict[str, Path], tmp_path: Path) -> None:
    """The decoder shows nothing until the picture is whole; the frames before are not in the clip."""
    cut = copy_stream(videos["h264_intra_refresh"], tmp_path / "cut.mp4", keyframe=1, zero=13)
    frames = probe_clip(cut).frames
    shown = numbers_of(read_clip(cut, 0, frames))
    assert shown == list(range(COUNT - frames, COUNT))
    assert numbers_of(read_clip(cut, frames - 2, 1)) == [COUNT - 2]


@pytest.mark.parametrize("source", ["h264", "hevc"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_times_in_file_order_are_not_believed(
    source: str, suffix: str, videos: dict[str, Path], tmp_path: Path
) -> None:
    path = forget_presentation_times(videos[source], tmp_path / f"copy{suffix}")
    assert not probe_clip(path).trusted_by_decord
    assert [numbers_of(read_clip(path, i, 1))[0] for i in range(0, COUNT, 3)] == list(range(0, COUNT, 3))


@pytest.mark.parametrize("name", ["h264", "h264_mkv", "hevc", "vp9"])
def test_uneven_and_late_times(name: str, tmp_path: Path) -> None:
    """Frame numbers count frames, not time: variable rates and a late start change nothing."""
    times = 5 + np.cumsum(np.random.default_rng(0).integers(1, 6, COUNT))
    path = write_video(tmp_path, KINDS[name], COUNT, pts=times.tolist())
    for backend in ("auto", "pyav"):
        got = [numbers_of(read_clip(path, i, 1, backend=backend))[0] for i in range(COUNT)]
        assert got == list(range(COUNT)), backend


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied_alike(degrees: int, tmp_path: Path) -> None:
    upright = write_video(tmp_path, count=4, name="upright")
    turned = write_video(tmp_path, count=4, name="turned", rotation=degrees)
    decord, pyav = (read_clip(turned, 0, 4, backend=backend) for backend in ("decord", "pyav"))
    np.testing.assert_array_equal(decord, pyav)
    expected = np.rot90(read_clip(upright, 0, 4), degrees // 90, axes=(1, 2))
    np.testing.assert_array_equal(pyav, expected)


# Bad files -----------------------------------------------------------------------------------------------


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def hole(path: Path) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(400) + data[middle + 400 :])


def noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


@pytest.mark.parametrize("kind", ["h264", "h264_mkv", "hevc", "vp9", "av1"])
@pytest.mark.parametrize("mux", ["index last", "index first"])
def test_truncated_file(kind: str, mux: str, tmp_path: Path) -> None:
    """Also when the frames asked for are all there: a file cut short is not the file that was meant."""
    if missing_encoder(KINDS[kind]):
        pytest.skip(missing_encoder(KINDS[kind]))
    options = {"movflags": "faststart"} if mux == "index first" and KINDS[kind].suffix == ".mp4" else {}
    path = write_video(tmp_path, KINDS[kind], COUNT, mux=options)
    assert len(read_clip(path, 0, 3)) == 3
    half(path)
    with pytest.raises(ClipError, match=r"cut short|cannot be read|no video stream") as error:
        read_clip(path, 0, 3)
    assert error.value.path == path


def test_matroska_that_lacks_its_last_frames(videos: dict[str, Path], tmp_path: Path) -> None:
    """Every library opens it without a word; only its own statement of the duration gives it away."""
    path = tmp_path / "short.mkv"
    data = videos["h264_mkv"].read_bytes()
    path.write_bytes(data[: int(len(data) * 0.93)])
    with pytest.raises(ClipError, match=r"cut short: .* of 1\.67 seconds"):
        probe_clip(path)


def test_a_clip_of_one_frame_is_whole(tmp_path: Path) -> None:
    """Matroska rounds the time of its end up and the frame's length down."""
    assert probe_clip(write_video(tmp_path, KINDS["h264_mkv"], 1)).frames == 1


@pytest.mark.parametrize("backend", ["auto", "pyav", "decord"])
def test_files_that_are_no_clips(backend: Backend, tmp_path: Path) -> None:
    noise(tmp_path / "noise.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("404 Not Found\n" * 50)
    (tmp_path / "folder.mp4").mkdir()
    write_sound(tmp_path / "sound.mp4")
    strange = write_video(tmp_path, count=2, name="strange")
    strange.write_bytes(strange.read_bytes().replace(b"avc1", b"encv"))
    expected = {
        "missing.mp4": "is missing",
        "empty.mp4": r"is empty \(0 bytes\)",
        "folder.mp4": "is not a file",
        "noise.mp4": "cannot be read|no video stream",
        "text.mp4": "cannot be read|no video stream",
        "sound.mp4": "no video stream",
        "strange.mp4": "a codec that FFmpeg does not know here, or is encrypted",
    }
    for name, reason in expected.items():
        with pytest.raises(ClipError, match=reason) as error:
            read_clip(tmp_path / name, 0, 1, backend=backend)
        assert error.value.path == tmp_path / name
        assert "\n" not in str(error.value)


def test_what_is_no_video_is_told_by_its_first_bytes(tmp_path: Path) -> None:
    whole = write_video(tmp_path, count=COUNT).read_bytes()
    contents = {
        b"Things to film:\r\n\t- the harbour\n" * 200: "(it is text)",
        "\ufeffзаметки, 笔记".encode(): "(it is text)",
        bytes(10_000): "(zeros instead of a video: an unfinished download?)",
        whole[: len(whole) // 2]: "(cut short: its index, the moov box, is missing)",
        b"\x8f\x00\x1b" * 3000: "",
    }
    for content, words in contents.items():
        (tmp_path / "clip.mp4").write_bytes(content)
        with pytest.raises(ClipError, match="cannot be read") as error:
            read_clip(tmp_path / "clip.mp4", 0, 1)
        told = "cannot be read: Invalid data found when processing input"
        assert error.value.reason == f"{told} {words}".strip()


@pytest.mark.parametrize("backend", ["auto", "pyav", "decord"])
def test_too_short(backend: Backend, videos: dict[str, Path]) -> None:
    assert len(read_clip(videos["h264"], 0, 14, stride=3, backend=backend)) == 14  # frames 0 to 39
    with pytest.raises(ClipError, match="too short: frames 1 to 40 asked"):
        read_clip(videos["h264"], 1, 14, stride=3, backend=backend)


@pytest.mark.parametrize("kind", ["h264", "h264_open", "hevc"])
def test_a_hole_in_the_data_is_damage(kind: str, tmp_path: Path) -> None:
    path = write_video(tmp_path, KINDS[kind], COUNT, mux={"movflags": "faststart"})
    hole(path)
    with pytest.raises(ClipError, match=r"damaged|cannot be"):
        read_clip(path, 0, COUNT)


def test_pyav_notices_damage_that_decord_hides(tmp_path: Path) -> None:
    path = write_video(tmp_path, count=COUNT, mux={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    for step in range(3):
        data[len(data) // 2 - 300 + 200 * step] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(ClipError, match="is damaged near second"):
        read_clip(path, 0, COUNT, backend="pyav")
    assert len(read_clip(path, 0, COUNT, backend="decord")) == COUNT


def test_frames_before_the_damage_can_be_read(tmp_path: Path) -> None:
    path = write_video(tmp_path, HEVC, COUNT, mux={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    data[-300:-100] = bytes(200)
    path.write_bytes(data)
    assert numbers_of(read_clip(path, 2, 5)) == [2, 3, 4, 5, 6]
    with pytest.raises(ClipError, match="damaged"):
        read_clip(path, COUNT - 3, 3)


@pytest.mark.parametrize("kind", ["h264", "h264_mkv", "h264_open", "h264_open_mkv", "hevc", "vp9"])
def test_reading_starts_at_a_keyframe_not_at_the_beginning(kind: str, tmp_path: Path) -> None:
    """Damage in an earlier group of pictures does not touch later ones, so it was not decoded."""
    path = write_video(tmp_path, KINDS[kind], COUNT)
    with av.open(path) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size > 30][4]
    data = bytearray(path.read_bytes())
    at = data.index(bytes(packet))
    data[at : at + packet.size] = bytes(packet.size)
    path.write_bytes(data)
    assert numbers_of(read_clip(path, COUNT - 3, 3, backend="pyav")) == [COUNT - 3, COUNT - 2, COUNT - 1]
    with pytest.raises(ClipError, match=r"damaged|cannot be decoded"):
        read_clip(path, 0, COUNT, backend="pyav")


def test_a_replaced_file_is_looked_at_again(tmp_path: Path) -> None:
    path = write_video(tmp_path, count=12)
    assert probe_clip(path).frames == 12
    half(path)
    with pytest.raises(ClipError):
        probe_clip(path)
    write_video(tmp_path, count=20)
    assert probe_clip(path).frames == 20


def test_wrong_arguments_are_not_the_files_fault(videos: dict[str, Path]) -> None:
    for start, count, stride in ((-1, 1, 1), (0, 0, 1), (0, 1, 0)):
        with pytest.raises(ValueError, match="start >= 0"):
            read_clip(videos["h264"], start, count, stride=stride)
    with pytest.raises(ValueError, match='"auto", "decord" or "pyav"'):
        read_clip(videos["h264"], 0, 1, backend="opencv")  # type: ignore[arg-type]


# Machines with one library, and workers ------------------------------------------------------------------


def run_without(modules: list[str], code: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter where some modules cannot be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({modules!r}))"
    return subprocess.run(
        [sys.executable, "-c", f"{block}\n{code}", str(path)], capture_output=True, text=True, timeout=150
    )


READ_TWICE = """
from luve_lightning.data.clips import probe_clip, read_clip
for _ in range(2):
    print(read_clip(sys.argv[1], 3, 5, stride=2).shape, probe_clip(sys.argv[1]).frames)
"""


def test_decord_may_be_missing(videos: dict[str, Path]) -> None:
    done = run_without(["decord"], READ_TWICE, videos["h264"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"(5, {SIZE}, {SIZE}, 3) {COUNT}"] * 2


def test_without_pyav_nothing_is_read(videos: dict[str, Path]) -> None:
    """decord alone cannot tell how a file is shown."""
    done = run_without(["av"], READ_TWICE, videos["h264"])
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith("reading video needs PyAV: pip install av")


class Clips(Dataset[torch.Tensor]):
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(read_clip(self.paths[index], index, 4))


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_after_the_parent_has_read(context: str, videos: dict[str, Path]) -> None:
    """A decord reader kept from before a fork would hang for ever in the workers."""
    paths = [videos["h264"], videos["hevc"]] * 3
    read_clip(paths[0], 0, 4), read_clip(paths[1], 0, 4)
    loader = DataLoader(Clips(paths), batch_size=2, num_workers=2, multiprocessing_context=context, timeout=150)
    got = torch.cat(list(loader)).numpy()
    assert [numbers_of(frames) for frames in got] == [list(range(i, i + 4)) for i in range(6)]


def test_error_of_a_worker_stays_a_clip_error(tmp_path: Path) -> None:
    batches = iter(DataLoader(Clips([tmp_path / "missing.mp4"]), num_workers=1, timeout=150))
    with pytest.raises(ClipError, match=r"missing\.mp4: is missing"):
        next(batches)
    batches._shutdown_workers()  # type: ignore[attr-defined]  # or torch waits five seconds for it
