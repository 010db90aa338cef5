"""What the mini world shows: captions agree with pixels, cameras go where they say, edges are true."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from luve_lightning.data.mini_world import CRF, captions, vocabulary
from luve_lightning.data.mini_world.paint import apply_grade, draw_scene, paint_scene
from luve_lightning.data.mini_world.scene import (
    DIRECTIONS,
    PHOTOGRAPHS,
    SHAPES,
    Camera,
    Grade,
    Scene,
    Sprite,
    camera_path,
    load_photograph,
    motion_per_frame,
    photograph_named,
    photographs_of,
    progress,
    sprite_path,
)
from luve_lightning.data.video_files import encode_h264

STILL = Camera("", "", "", "", "steady", (256.0, 256.0), 64.0, 0.0, 1.0, 0.0, 0.0)


def scene_of(camera: Camera, *sprites: Sprite, url: str = "skimage-gravel", size: int = 64, frames: int = 9) -> Scene:
    return Scene(0, "train", 0, frames, size, 16, url, Grade(), camera, sprites)


def crop(url: str, center: tuple[int, int], side: int) -> np.ndarray:
    left, top = center[0] - side // 2, center[1] - side // 2
    picture = load_photograph(photograph_named(url))[:, top : top + side, left : left + side]
    return picture.mul(255).round().byte().permute(1, 2, 0).numpy()


def shift_between(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    """Returns by how many pixels (x, y) the picture moved, by phase correlation."""
    window = np.outer(np.hanning(first.shape[0]), np.hanning(first.shape[1]))
    a, b = (np.fft.fft2((image - image.mean()) * window) for image in (first, second))
    cross = b * a.conj()
    y, x = np.unravel_index(np.argmax(np.fft.ifft2(cross / (np.abs(cross) + 1e-9)).real), first.shape)
    height, width = first.shape
    return int(x if x <= width // 2 else x - width), int(y if y <= height // 2 else y - height)


def test_a_still_camera_shows_the_photographs_own_pixels() -> None:
    frames = paint_scene(scene_of(STILL)).numpy()
    assert frames.shape == (9, 64, 64, 3)
    for frame in frames:
        np.testing.assert_array_equal(frame, crop("skimage-gravel", (256, 256), 64))


def test_a_wide_window_is_antialiased() -> None:
    frames = paint_scene(scene_of(replace(STILL, window=192.0)))
    picture = load_photograph(photograph_named("skimage-gravel"))[None, :, 160:352, 160:352]
    expected = F.interpolate(picture, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)[0].permute(1, 2, 0)
    assert (frames[4].float() - expected * 255).abs().max() <= 1.0


@pytest.mark.parametrize(("turn", "quarter"), [("clockwise", 1), ("counterclockwise", -1)])
def test_a_camera_turning_clockwise_turns_the_picture_the_other_way(turn: str, quarter: int) -> None:
    frames = paint_scene(scene_of(replace(STILL, turn=turn, degrees=180.0))).numpy().astype(int)
    upright = crop("skimage-gravel", (256, 256), 64).astype(int)
    assert np.abs(frames[4] - upright).max() <= 1
    assert np.abs(frames[-1] - np.rot90(upright, quarter)).max() <= 1
    assert np.abs(frames[0] - np.rot90(upright, -quarter)).max() <= 1


@pytest.mark.parametrize(("zoom", "wide"), [("in", 0), ("out", -1)])
def test_zooming_in_narrows_the_window(zoom: str, wide: int) -> None:
    frames = paint_scene(scene_of(replace(STILL, zoom=zoom, ratio=4.0))).numpy().astype(float)
    narrow = -1 - wide
    # The middle quarter of the wide end is the whole narrow end.
    small = frames[narrow].reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.abs(frames[wide][24:40, 24:40] - small).mean() < 4
    assert np.abs(frames[narrow][24:40, 24:40] - small).mean() > 20


@pytest.mark.parametrize("pan", list(DIRECTIONS))
def test_a_panning_caption_agrees_with_the_decoded_motion(pan: str, tmp_path: Path) -> None:
    # 64 pixels over 8 steps: 8 pixels a frame; a camera going left moves the picture right.
    scene = scene_of(replace(STILL, pan=pan, distance=1.0))
    encode_h264(tmp_path / "pan.mp4", paint_scene(scene).numpy(), 16, CRF)
    with av.open(str(tmp_path / "pan.mp4")) as container:
        frames = [frame.to_ndarray(format="gray").astype(float) for frame in container.decode(video=0)]
    assert captions(scene)["Camera Movement"] == f"the camera pans {pan} ."
    moved = shift_between(frames[4], frames[5])
    expected = {"left": (8, 0), "right": (-8, 0), "up": (0, 8), "down": (0, -8)}
    parts = [expected[word] for word in pan.split(" and ")]
    assert moved == tuple(np.sum(parts, axis=0))


@pytest.mark.slow
def test_drawn_pans_move_as_captioned() -> None:
    scenes = [draw_scene(5, "train", index, 9, 64, 16) for index in range(80)]
    pans = [scene for scene in scenes if scene.camera.pan and not scene.camera.zoom and not scene.camera.turn]
    assert len(pans) >= 15
    agreed = 0
    for scene in pans[:15]:
        frames = paint_scene(replace(scene, sprites=())).float().mean(dim=-1).numpy()
        moved = shift_between(frames[3], frames[5])
        way = DIRECTIONS[scene.camera.pan]
        agreed += all(np.sign(-step) == np.sign(direction) for step, direction in zip(moved, way, strict=True))
    # Smooth gradients (the colour wheel) have no phase peak to find.
    assert agreed >= 13


def test_the_motion_score_is_the_pan_in_pixels_a_frame() -> None:
    assert motion_per_frame(scene_of(replace(STILL, pan="left", distance=1.0))) == pytest.approx(8.0)
    assert motion_per_frame(scene_of(STILL)) == 0.0


def test_most_clips_move_visibly_and_all_move() -> None:
    scenes = [draw_scene(0, "train", index, 33, 192, 16) for index in range(100)]
    assert sum(motion_per_frame(scene) > 1.0 for scene in scenes) > 70
    for scene in scenes:
        assert motion_per_frame(scene) > 0 or any(sprite.action != "waits" for sprite in scene.sprites)


def test_cameras_stay_on_their_photograph_and_windows_are_sharp() -> None:
    for split in ("train", "val", "test"):
        for index in range(60):
            scene = draw_scene(1, split, index, 33, 192, 16)
            _, height, width = load_photograph(photograph_named(scene.url)).shape
            centers, windows, angles = camera_path(scene.camera, 33)
            reach = windows * (np.abs(np.cos(angles)) + np.abs(np.sin(angles))) / 2
            assert (centers - reach[:, None]).min() > -0.01
            assert (np.array([width, height]) - centers - reach[:, None]).min() > -0.01
            assert min(150, 0.74 * min(height, width)) <= windows.min() <= windows.max() <= 400


def test_clips_cover_every_photograph_and_no_place_twice() -> None:
    for split, count in (("train", 21), ("val", 2), ("test", 3)):
        scenes = [draw_scene(0, split, index, 33, 192, 16) for index in range(2 * count)]
        shown = Counter(scene.url for scene in scenes)
        assert shown == {photograph.url: 2 * photograph.weight for photograph in photographs_of(split)}
        assert len({(scene.url, scene.camera.center) for scene in scenes}) == 2 * count


def test_only_train_is_graded_and_text_is_never_mirrored() -> None:
    assert all(draw_scene(0, split, i, 9, 64, 16).grade == Grade() for split in ("val", "test") for i in range(20))
    scenes = [draw_scene(0, "train", index, 9, 64, 16) for index in range(120)]
    assert len({scene.grade for scene in scenes}) == 120
    assert {scene.grade.flip for scene in scenes} == {True, False}
    assert not any(scene.grade.flip for scene in scenes if scene.url in ("skimage-page", "skimage-text"))


def test_grades_do_what_they_say() -> None:
    picture = torch.rand(3, 7, 5, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.2
    grey = torch.full((3, 2, 2), 0.3)
    assert torch.equal(apply_grade(picture, Grade()), picture)
    torch.testing.assert_close(apply_grade(picture, Grade(flip=True)), picture.flip(-1))
    torch.testing.assert_close(apply_grade(picture, Grade(brightness=1.1)), picture * 1.1)
    torch.testing.assert_close(apply_grade(picture, Grade(contrast=0.8)), 0.45 + (picture - 0.45) * 0.8)
    torch.testing.assert_close(apply_grade(grey, Grade(hue=20.0, saturation=1.3)), grey)
    red = torch.tensor([0.8, 0.2, 0.2]).view(3, 1, 1)
    torch.testing.assert_close(apply_grade(red, Grade(hue=120.0)), red.roll(1, dims=0))
    no_color = apply_grade(picture, Grade(saturation=0.0))
    torch.testing.assert_close(no_color[0], no_color[2])


def test_a_sprite_is_cut_from_its_photograph_and_has_soft_edges() -> None:
    sprite = Sprite(
        "square", "", "waits", "", "steady", (0.0, 0.0), (0.0, 0.0), 0.5, 0.0, 0.0, "skimage-coins", (100.0, 80.0, 32.0)
    )
    frames = paint_scene(scene_of(STILL, sprite))
    # Radius half of half a frame: 32 pixels across, one pixel of the cut each; the square fills 0.85 of it.
    inside = crop("skimage-coins", (116, 96), 32)
    np.testing.assert_array_equal(frames[0, 20:44, 20:44].numpy(), inside[4:28, 4:28])
    outside = crop("skimage-gravel", (256, 256), 64)
    np.testing.assert_array_equal(frames[0, :18].numpy(), outside[:18])
    edge = frames[0, 18, 20:44].float()
    blend = torch.from_numpy(0.6 * inside[2, 4:28].astype(np.float32) + 0.4 * outside[18, 20:44])
    assert (edge - blend).abs().max() <= 1.0


@pytest.mark.parametrize("direction", list(DIRECTIONS))
def test_sprites_move_where_the_caption_says(direction: str) -> None:
    found = 0
    for index in range(400):
        for sprite in draw_scene(2, "train", index, 9, 64, 16).sprites if found < 3 else ():
            if sprite.direction == direction:
                positions, _, _ = sprite_path(sprite, 9)
                steps = np.sign(np.diff(positions, axis=0))
                assert (steps == DIRECTIONS[direction]).all()
                assert np.abs(positions).max() <= 0.91
                found += 1
    assert found >= 3


def test_sprites_grow_shrink_circle_and_spin() -> None:
    base = Sprite(
        "star", "", "grows", "", "smooth", (0.1, 0.2), (0.1, 0.2), 0.3, 5.0, 90.0, "skimage-coins", (0, 0, 30)
    )
    _, radii, angles = sprite_path(base, 9)
    assert (np.diff(radii) > 0).all()
    assert np.degrees(angles[-1] - angles[0]) == pytest.approx(90)
    assert (np.diff(sprite_path(replace(base, action="shrinks"), 9)[1]) < 0).all()
    circle = sprite_path(replace(base, action="circles"), 9)[0]
    np.testing.assert_allclose(np.linalg.norm(circle - [0.1, 0.2], axis=1), 0.3)
    sway = sprite_path(replace(base, action="sways"), 9)[0]
    assert np.ptp(sway[:, 0]) > 0.5
    assert np.ptp(sway[:, 1]) == 0


def test_captions_have_one_form() -> None:
    subjects = {photograph.subject for photograph in PHOTOGRAPHS}
    words = set(vocabulary())
    for index in range(150):
        for split in ("train", "val", "test"):
            caption = captions(draw_scene(4, split, index, 9, 64, 16))["Summarized Description"]
            sentences = caption.split(" . ")
            assert caption.endswith(" .")
            assert sentences[0].removeprefix("a photograph of ") in subjects
            assert sentences[1].startswith("the camera ")
            assert 3 <= len(sentences) <= 4
            assert set(caption.split()) <= words
            assert any(shape in sentences[2] for shape in SHAPES) or sentences[2] == "nothing moves in front ."


@pytest.mark.parametrize("easing", ["steady", "smooth", "starting", "stopping"])
def test_easings_run_from_0_to_1_without_turning_back(easing: str) -> None:
    way = progress(easing, 33)
    assert (way[0], way[-1]) == (0.0, 1.0)
    assert (np.diff(way) > 0).all()
