"""Videos as files: what is written is what is read, whole or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.clips import read_clip
from luve_lightning.data.video_files import VideoInProgress, find_videos, read_video, write_picture, write_video
from tests.helpers.waiting import wait_for


def noise(frames: int = 5, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def smooth(frames: int = 20, size: int = 64) -> np.ndarray:
    """Colours that shift over space and time, as yuv420p can hold them."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(size), np.arange(size), indexing="ij")
    return np.stack([2 * x + t + 40, 2 * y + t + 40, x + y + 2 * t + 20], axis=-1).astype(np.uint8)


@settings(max_examples=10, deadline=None)
@given(frames=st.integers(1, 20), height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 9))
def test_lossless_files_give_every_bit_back(
    tmp_path_factory: pytest.TempPathFactory, frames: int, height: int, width: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("lossless") / "a.mp4"
    video = noise(frames, height, width, seed)
    write_video(path, video, 24, lossless=True)
    read, fps = read_video(path)
    assert np.array_equal(read, video)
    assert fps == 24
    assert np.array_equal(read_clip(path, 0, frames), video)


def test_lossy_files_are_close_tagged_and_of_the_same_bytes(tmp_path: Path) -> None:
    video = smooth()
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", video, 30000 / 1001)
    read, fps = read_video(tmp_path / "a.mp4")
    assert fps == pytest.approx(30000 / 1001, abs=1e-6)
    # A wrong matrix or range moves colours by ten levels and more.
    assert np.abs(read.astype(int) - video).mean() < 1.5
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.pix_fmt, int(context.colorspace), int(context.color_range)) == ("yuv420p", 1, 1)


def test_files_of_several_threads_are_close_and_of_the_same_bytes(tmp_path: Path) -> None:
    video = noise(12, 256, 256) // 16 + 100
    for name, threads in (("one", 1), ("a", 3), ("b", 3)):
        write_video(tmp_path / f"{name}.mp4", video, 24, threads=threads)
    shown, other = (read_video(tmp_path / f"{name}.mp4")[0].astype(int) for name in ("one", "a"))
    assert np.abs(shown - video).mean() < 4
    assert np.abs(shown - other).mean() < 0.5
    one, a, b = ((tmp_path / f"{name}.mp4").read_bytes() for name in ("one", "a", "b"))
    assert a == b != one
    write_video(tmp_path / "exact.mp4", video, 24, lossless=True, threads=3)
    assert np.array_equal(read_video(tmp_path / "exact.mp4")[0], video)


def test_views_of_frames_are_written_as_they_look(tmp_path: Path) -> None:
    video = noise(4, 20, 20)[::-1, ::-1, 2:18:2]
    write_video(tmp_path / "new" / "a.mp4", video, 8, lossless=True)
    assert np.array_equal(read_video(tmp_path / "new" / "a.mp4")[0], video)


@pytest.mark.parametrize(
    ("frames", "fps", "name", "message"),
    [
        (noise(2, 31, 32), 24, "a.mp4", "frames of 31x32: expected even sides, or lossless=True"),
        (noise().astype(np.float32), 24, "a.mp4", "expected uint8 frames T x H x W x 3, got float32 5 x 32"),
        (noise()[:0], 24, "a.mp4", "got uint8 0 x 32 x 48 x 3"),
        (noise()[0], 24, "a.mp4", "got uint8 32 x 48 x 3"),
        (noise(), 0, "a.mp4", r"fps: expected a number in \(0, 240\], got 0"),
        (noise(), float("nan"), "a.mp4", "fps: expected a number"),
        (noise(), 24, "a.avi", r"written as .mp4, got .*a.avi"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, frames: np.ndarray, fps: float, name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, frames, fps)
    assert not list(tmp_path.iterdir())


def test_a_kill_leaves_no_half_video(tmp_path: Path) -> None:
    program = (
        "import numpy as np\n"
        "from luve_lightning.data.video_files import write_video\n"
        "frames = np.random.default_rng(0).integers(0, 256, (200, 360, 640, 3), dtype=np.uint8)\n"
        f"write_video({str(tmp_path / 'a.mp4')!r}, frames, 24)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program])

    def begun_or_ended() -> bool:
        return any(path.stat().st_size > 100_000 for path in tmp_path.iterdir()) or writer.poll() is not None

    assert wait_for(begun_or_ended)
    assert writer.poll() is None
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert not (tmp_path / "a.mp4").exists()
    with pytest.raises(FileNotFoundError, match="no videos there"):
        find_videos(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text"])
def test_bad_files_have_a_reason_in_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.mp4"
    if damage != "missing":
        write_video(path, noise(), 24)
        content = path.read_bytes()
        changed = {"empty": b"", "cut": content[: len(content) // 2], "text": b"no video"}
        path.write_bytes(changed[damage])
    with pytest.raises(ClipError) as caught:
        read_video(path)
    assert caught.value.reason
    assert "\n" not in str(caught.value)


def test_damage_inside_a_frame_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, smooth(40), 24)
    content = bytearray(path.read_bytes())
    for step in range(10):  # what decord would hide
        content[len(content) // 2 + 50 * step] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(ClipError, match="is damaged"):
        read_video(path)


def test_a_picture_is_written_without_loss_and_always_the_same(tmp_path: Path) -> None:
    frame = noise()[0]
    write_picture(tmp_path / "new" / "a.png", frame)
    write_picture(tmp_path / "b.png", frame)
    assert (tmp_path / "new" / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    frames, fps = read_video(tmp_path / "b.png")
    assert np.array_equal(frames, frame[None])
    assert fps == 0
    with pytest.raises(ValueError, match=r"pictures are written as \.png"):
        write_picture(tmp_path / "a.jpg", frame)
    with pytest.raises(ValueError, match="expected uint8 H x W x 3, got float32"):
        write_picture(tmp_path / "a.png", frame.astype(np.float32))


def test_pictures_of_a_folder_where_they_are_wanted(tmp_path: Path) -> None:
    for name in ("b.png", "b.jpg", "b.json", "a.JPG", "c.txt"):
        (tmp_path / name).touch()
    # b.jpg is the contact sheet of b.png.
    assert [path.name for path in find_videos(tmp_path, pictures=True)] == ["a.JPG", "b.png"]
    with pytest.raises(FileNotFoundError, match="no videos there"):
        find_videos(tmp_path)
    for name in ("d.mp4", "d.json", "d.jpg"):
        (tmp_path / name).touch()
    # Beside videos, only pictures that were generated.
    assert [path.name for path in find_videos(tmp_path, pictures=True)] == ["b.png", "d.mp4"]
    assert [path.name for path in find_videos(tmp_path)] == ["d.mp4"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no videos there, nor pictures"):
        find_videos(tmp_path / "empty", pictures=True)


def test_videos_of_a_folder_by_name(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.MKV", ".hidden.mp4", "notes.txt", "c.json"):
        (tmp_path / name).touch()
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "d.mp4").touch()
    assert [path.name for path in find_videos(tmp_path)] == ["a.MKV", "b.mp4"]
    (tmp_path / "b.webm").touch()
    with pytest.raises(ValueError, match=r"b\.mp4 and b\.webm have the same name"):
        find_videos(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder of videos"):
        find_videos(tmp_path / "nothing")


@pytest.mark.parametrize("lossless", [False, True])
def test_a_file_written_while_its_frames_arrive_has_the_same_bytes(tmp_path: Path, lossless: bool) -> None:
    frames = noise(40)
    write_video(tmp_path / "after.mp4", frames, 24, lossless, threads=2)
    growing, path = np.zeros_like(frames), tmp_path / "new" / "a.mp4"
    with VideoInProgress(path, 24, lossless, threads=2) as video:
        video.arrived(noise(40), 7)  # decoding begins anew, in other memory
        for first in (0, 1, 17):
            last = min(len(frames), first + 16)
            growing[first:last] = frames[first:last]
            video.arrived(growing, last)
        growing[33:] = frames[33:]
        video.arrived(growing, len(frames))
        assert not path.exists()
        assert video.finish()
    assert path.read_bytes() == (tmp_path / "after.mp4").read_bytes()
    assert [file.name for file in path.parent.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("there", [0, 5, 40])
def test_a_file_that_is_given_up_leaves_the_old_one(tmp_path: Path, there: int) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with VideoInProgress(path, 24) as video:
        video.arrived(noise(40), there)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_what_goes_wrong_while_frames_arrive_is_told_in_the_end(tmp_path: Path) -> None:
    with VideoInProgress(tmp_path / "a.mp4", 24) as video:
        assert not video.finish(), "no frame arrived"
        video.arrived(noise(3)[:, :-1], 3)
        with pytest.raises(ValueError, match="expected even sides"):
            video.finish()
    (tmp_path / "file").write_text("")
    with VideoInProgress(tmp_path / "file" / "a.mp4", 24) as video:
        video.arrived(noise(3), 3)
        with pytest.raises(OSError, match="file"):
            video.finish()
    with VideoInProgress(tmp_path / "a.png", 24) as video:
        video.arrived(noise(1), 1)
        assert not video.finish(), "a picture is written at once"
