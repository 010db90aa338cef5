"""Captions: what is seen and how it moves, in one form of sentence and few words.

    a photograph of a cat . the camera pans left and zooms in slowly . a small coffee star moves up .

Words and full stops are separated by single spaces, so a word-level tokenizer needs only `split()`.
"""

from __future__ import annotations

from luve_lightning.data.mini_world.photographs import PHOTOGRAPHS, photograph_named
from luve_lightning.data.mini_world.scene import DIRECTIONS, SHAPES, SPEEDS, SPRITE_SIZES, Scene, Sprite

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
    """Returns the caption for conditioning: subject, camera, then one sentence a sprite."""
    sprites = [_sprite(sprite) for sprite in scene.sprites] or ["nothing moves in front ."]
    return " ".join([background(scene), camera_movement(scene), *sprites])


def brief_description(scene: Scene) -> str:
    """Returns subject and camera only."""
    return f"{background(scene)} {camera_movement(scene)}"


def detailed_description(scene: Scene) -> str:
    """Returns the caption with shot, light and style."""
    return " ".join([summarized_description(scene), shot_type(scene), lighting(scene), style(scene)])


def background(scene: Scene) -> str:
    """Returns what the photograph shows."""
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
    """Returns one word for how much moves."""
    moving = sum(sprite.action != "waits" for sprite in scene.sprites) + (scene.camera.speed == "quickly")
    return _MOODS[min(moving, 2)]


def vocabulary() -> tuple[str, ...]:
    """Returns every word a caption can hold, the full stop among them, sorted."""
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
