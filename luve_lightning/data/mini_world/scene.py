"""A clip of the mini world: its scene, its captions, and its line of the CSV."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from luve_lightning.data.mini_world.photographs import PHOTOGRAPHS, SPLITS, photograph_named
from luve_lightning.data.video_index import COLUMNS

# Part of every clip's id: raise it whenever the same arguments would give other pixels.
RENDERER = 1
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up and left": (-1, -1),
    "up and right": (1, -1),
    "down and left": (-1, 1),
    "down and right": (1, 1),
}
# Over the whole clip: pan in windows, zoom as a ratio, turn in degrees.
SPEEDS: dict[str, dict[str, tuple[float, float]]] = {
    "slowly": {"pan": (0.18, 0.32), "zoom": (1.15, 1.3), "turn": (8.0, 16.0)},
    "": {"pan": (0.32, 0.6), "zoom": (1.3, 1.6), "turn": (16.0, 35.0)},
    "quickly": {"pan": (0.6, 1.0), "zoom": (1.6, 2.0), "turn": (35.0, 60.0)},
}
EASINGS = ("steady", "smooth", "starting", "stopping")
SHAPES = ("circle", "square", "triangle", "star", "ring", "hexagon", "cross", "heart")
# Radius of a sprite in half frames.
SPRITE_SIZES = {"small": (0.2, 0.28), "": (0.28, 0.38), "large": (0.38, 0.5)}
SPRITE_ACTIONS = {"moves": 60, "circles": 10, "sways": 10, "grows": 7, "shrinks": 7, "waits": 6}


@dataclass(frozen=True)
class Camera:
    """A square window that travels over a photograph.

    Attributes:
        pan: A key of `DIRECTIONS`, or "" for none.
        zoom: "in", "out" or "".
        turn: "clockwise", "counterclockwise" or "" (the camera's; the picture turns the other way).
        speed: A key of `SPEEDS`; "slowly", "" or "quickly".
        easing: Course of the movement over the clip, one of `EASINGS`.
        center: Window centre halfway, in pixels of the photograph, x then y.
        window: Window side halfway, in pixels of the photograph (geometric mean of both ends).
        distance: Length of the pan on each of its axes, in windows.
        ratio: Larger over smaller window side.
        degrees: Whole turn.
        tilt: Angle halfway, degrees, clockwise.
    """

    pan: str
    zoom: str
    turn: str
    speed: str
    easing: str
    center: tuple[float, float]
    window: float
    distance: float
    ratio: float
    degrees: float
    tilt: float


@dataclass(frozen=True)
class Sprite:
    """A shape cut from another photograph, moving in front. Positions are in half frames, (0, 0) the centre.

    Attributes:
        shape: One of `SHAPES`.
        size: A key of `SPRITE_SIZES`.
        action: A key of `SPRITE_ACTIONS`.
        direction: A key of `DIRECTIONS` when it moves, else "".
        easing: One of `EASINGS`.
        start: Position in the first frame (the middle of a circle or sway), x then y.
        stop: Position in the last frame; equals `start` unless it moves.
        radius: Radius in half frames.
        angle: Angle in the first frame, degrees, clockwise.
        spin: Degrees of spin over the clip; 0 for none.
        texture: `url` of the photograph of its texture.
        cut: Left, top and side of the cut, in pixels of that photograph.
    """

    shape: str
    size: str
    action: str
    direction: str
    easing: str
    start: tuple[float, float]
    stop: tuple[float, float]
    radius: float
    angle: float
    spin: float
    texture: str
    cut: tuple[float, float, float]


@dataclass(frozen=True)
class Grade:
    """A mild colour grade to widen the few photographs, for train clips only; held-out ones stay unchanged.

    Attributes:
        flip: Whether the photograph is mirrored.
        brightness: Factor on every channel.
        contrast: Factor on the distance from medium grey.
        saturation: Factor on the distance from the pixel's own grey.
        hue: Rotation about the grey axis, degrees.
        balance: Factors on red, green and blue.
    """

    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    balance: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Scene:
    """Everything a clip is made of; the same scene always gives the same pixels."""

    seed: int
    split: str
    index: int
    frames: int
    size: int
    fps: int
    url: str
    grade: Grade
    camera: Camera
    sprites: tuple[Sprite, ...]
    renderer: int = RENDERER

    @property
    def clip_id(self) -> str:
        """40 hexadecimal digits: the SHA-1 of this description, seed included."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def progress(easing: str, frames: int) -> np.ndarray:
    """Returns the progress of a movement in each frame, float64 `T`, from 0 to 1."""
    time = np.linspace(0.0, 1.0, frames)
    if easing == "smooth":
        return time * time * (3 - 2 * time)
    if easing == "starting":
        return time**1.6
    if easing == "stopping":
        return 1 - (1 - time) ** 1.6
    return time


def camera_path(camera: Camera, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns where the camera looks in each frame.

    Returns:
        Window centres `T x 2` (x, y) and window sides `T`, both in pixels of the photograph, and angles `T`
        in radians, clockwise.
    """
    way = progress(camera.easing, frames) - 0.5
    direction = np.array(DIRECTIONS.get(camera.pan, (0, 0)), dtype=np.float64)
    centers = np.asarray(camera.center) + way[:, None] * direction * camera.distance * camera.window
    zoom = {"in": -1, "out": 1}.get(camera.zoom, 0)
    windows = camera.window * camera.ratio ** (zoom * way)
    turn = {"clockwise": 1, "counterclockwise": -1}.get(camera.turn, 0)
    angles = np.radians(camera.tilt + turn * camera.degrees * way)
    return centers, windows, angles


def sprite_path(sprite: Sprite, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns where a sprite is in each frame.

    Returns:
        Positions `T x 2` (x, y) and radii `T` in half frames, angles `T` in radians, clockwise.
    """
    way = progress(sprite.easing, frames)
    start, stop = np.asarray(sprite.start), np.asarray(sprite.stop)
    positions = start + way[:, None] * (stop - start)
    if sprite.action == "circles":
        positions = positions + 0.3 * np.stack([np.cos(2 * np.pi * way), np.sin(2 * np.pi * way)], axis=1)
    elif sprite.action == "sways":
        positions = positions + np.stack([0.35 * np.sin(2 * np.pi * way), np.zeros_like(way)], axis=1)
    grown = {"grows": 0.5 + 0.6 * way, "shrinks": 1.1 - 0.6 * way}.get(sprite.action, np.ones_like(way))
    return positions, sprite.radius * grown, np.radians(sprite.angle + sprite.spin * way)


def motion_per_frame(scene: Scene) -> float:
    """Returns the background's average motion per frame, in pixels of the clip."""
    centers, windows, angles = camera_path(scene.camera, scene.frames)
    points = np.array([[0, 0], [-1, -1], [1, -1], [-1, 1], [1, 1]]) / 2
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    turned = np.stack(
        [cos * points[:, 0] - sin * points[:, 1], sin * points[:, 0] + cos * points[:, 1]], axis=-1
    )
    places = centers[:, None] + windows[:, None, None] * turned
    steps = np.linalg.norm(np.diff(places, axis=0), axis=-1) / windows[:-1, None] * scene.size
    return float(steps.mean()) if scene.frames > 1 else 0.0


def source_pixels(scene: Scene) -> float:
    """Returns the number of photograph pixels behind one pixel of the clip, per axis, on average."""
    _, windows, _ = camera_path(scene.camera, scene.frames)
    return float(windows.mean()) / scene.size


_ACTIONS = {
    "circles": "moves in a circle",
    "sways": "sways left and right",
    "grows": "grows",
    "shrinks": "shrinks",
    "waits": "stands still",
}
_LIGHTS = ("the light is dim .", "the light is bright .", "the light is natural .")
_SHOTS = ("a close shot .", "a medium shot .", "a wide shot .")
_MOODS = ("calm", "lively", "fast")
_STYLE = "a photograph in color ."
_GREY_STYLE = "a photograph in black and white ."


def summarized_description(scene: Scene) -> str:
    """Returns the caption for conditioning: subject, camera, then one sentence per sprite."""
    sprites = [_sprite(sprite) for sprite in scene.sprites] or ["nothing moves in front ."]
    return " ".join([background(scene), camera_movement(scene), *sprites])


def brief_description(scene: Scene) -> str:
    """Returns subject and camera only."""
    return f"{background(scene)} {camera_movement(scene)}"


def detailed_description(scene: Scene) -> str:
    """Returns the caption with shot, light and style."""
    return " ".join([summarized_description(scene), shot_type(scene), lighting(scene), style(scene)])


def background(scene: Scene) -> str:
    """Returns the subject of the photograph."""
    return f"a photograph of {photograph_named(scene.url).subject} ."


def theme(scene: Scene) -> str:
    """Returns the subject alone."""
    return photograph_named(scene.url).subject


def camera_movement(scene: Scene) -> str:
    """Returns what the camera does; directions are the camera's, so the picture moves the other way."""
    camera = scene.camera
    works = []
    if camera.pan:
        works.append(f"pans {camera.pan}")
    if camera.zoom:
        works.append(f"zooms {camera.zoom}")
    if camera.turn:
        works.append(f"turns {camera.turn}")
    speed = f" {camera.speed}" if camera.speed else ""
    return f"the camera {' and '.join(works) or 'stands still'}{speed} ."


def style(scene: Scene) -> str:
    """Returns whether the photograph is in colour."""
    return _STYLE if photograph_named(scene.url).color else _GREY_STYLE


def shot_type(scene: Scene) -> str:
    """Returns how much of the photograph the camera sees."""
    return _SHOTS[(scene.camera.window > 215) + (scene.camera.window > 290)]


def lighting(scene: Scene) -> str:
    """Returns how the clip was graded."""
    return _LIGHTS[0 if scene.grade.brightness < 0.93 else 1 if scene.grade.brightness > 1.07 else 2]


def atmosphere(scene: Scene) -> str:
    """Returns one word for the amount of motion."""
    moving = sum(sprite.action != "waits" for sprite in scene.sprites) + (scene.camera.speed == "quickly")
    return _MOODS[min(moving, 2)]


def vocabulary() -> tuple[str, ...]:
    """Returns every word that a caption can hold, including the full stop, sorted."""
    phrases = [
        *(f"{p.subject} {p.texture}" for p in PHOTOGRAPHS),
        *DIRECTIONS,
        *SHAPES,
        *SPEEDS,
        *SPRITE_SIZES,
    ]
    phrases += [*_ACTIONS.values(), *_LIGHTS, *_SHOTS, *_MOODS, _STYLE, _GREY_STYLE]
    phrases += [
        "a photograph of .",
        "the camera stands still",
        "pans zooms in out and turns clockwise counterclockwise",
    ]
    phrases += ["moves and spins", "nothing moves in front"]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


def _sprite(sprite: Sprite) -> str:
    words = [sprite.size, photograph_named(sprite.texture).texture, sprite.shape]
    does = f"moves {sprite.direction}" if sprite.action == "moves" else _ACTIONS[sprite.action]
    spins = " and spins" if sprite.spin else ""
    noun = " ".join(word for word in words if word)
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun} {does}{spins} ."


def catalog_csv(scenes: Sequence[Scene]) -> str:
    """Returns the CSV of all clips.

    A photograph stands for a source video, and its clips follow one another in it (`start_frame` up to, not
    including, `end_frame`). Scores: `vtss_score` is photograph pixels per clip pixel (1 or more is sharp),
    `motion_score` is the background's motion in pixels per frame, `video_clip_score` is 1, since captions are
    exact.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    shown: dict[str, int] = {}
    for scene in scenes:
        start = shown.get(scene.url, 0)
        shown[scene.url] = start + scene.frames
        writer.writerow(_row(scene, start))
    return text.getvalue()


def splits_json(scenes: Sequence[Scene]) -> str:
    """Returns the photographs (`url`) of each split's clips."""
    splits = {split: sorted({scene.url for scene in scenes if scene.split == split}) for split in SPLITS}
    return json.dumps(splits, indent=2) + "\n"


def _row(scene: Scene, start: int) -> dict[str, object]:
    stop = start + scene.frames
    return {
        "clip_id": scene.clip_id,
        "url": scene.url,
        "frame_width": scene.size,
        "frame_height": scene.size,
        "fps": scene.fps,
        "start_frame": start,
        "end_frame": stop,
        "total_frames": scene.frames,
        "start_time": round(start / scene.fps, 4),
        "end_time": round(stop / scene.fps, 4),
        "duration": round(scene.frames / scene.fps, 4),
        "vtss_score": round(source_pixels(scene), 4),
        "motion_score": round(motion_per_frame(scene), 4),
        "video_clip_score": 1.0,
        "Brief Description": brief_description(scene),
        "Detailed Description": detailed_description(scene),
        "Background": background(scene),
        "Theme Description": theme(scene),
        "Style": style(scene),
        "Shot Type": shot_type(scene),
        "Camera Movement": camera_movement(scene),
        "Lighting": lighting(scene),
        "Video Atmosphere": atmosphere(scene),
        "Summarized Description": summarized_description(scene),
    }
