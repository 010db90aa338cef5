"""Combinations of a photograph, a motion of the camera and a sprite: which are held out, and scenes that show them.

A model that has seen every photograph, motion and sprite, but not every combination, can be asked for a new one. All
three are told apart by eye at 96x96, in any half of a clip: the camera sees most of a photograph and moves steadily.

Of what is collected, a part is badly taken. A world may have a share of such clips in training, for whoever selects.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Literal, get_args

import numpy as np

from luve_lightning.data.mini_world.scene import (
    DIRECTIONS,
    SPLITS,
    STAGE,
    Camera,
    ColoredSprite,
    Grade,
    Photograph,
    Scene,
    camera_path,
    load_photograph,
    photograph_named,
)
from luve_lightning.data.video_index import PARTS

WorldKind = Literal["varied", "combinations", "photographs"]
WORLD_KINDS: tuple[WorldKind, ...] = get_args(WorldKind)

# The camera's work: pan, zoom and turn of a `Camera`.
MOTIONS: dict[str, tuple[str, str, str]] = {
    **{way: (way, "", "") for way in ("left", "right", "up", "down")},
    **{way: ("", way, "") for way in ("in", "out")},
    **{way: ("", "", way) for way in ("clockwise", "counterclockwise")},
}
# The sprites of combinations: word and levels of the colour, action, direction, and degrees of spin over a clip.
SPRITES: dict[str, tuple[str, tuple[int, int, int], str, str, float]] = {
    "heart": ("red", (226, 24, 40), "grows", "", 0.0),
    "star": ("yellow", (255, 222, 20), "waits", "", 200.0),
    "ring": ("blue", (24, 70, 230), "sways", "", 0.0),
    "triangle": ("green", (20, 170, 50), "moves", "up", 0.0),
    "cross": ("white", (250, 250, 250), "waits", "", -200.0),
    "circle": ("orange", (250, 130, 10), "circles", "", 0.0),
    "square": ("purple", (150, 40, 190), "shrinks", "", 0.0),
    "hexagon": ("turquoise", (20, 205, 205), "moves", "right", 0.0),
}

# Flaws of a take: how often each occurs next to the others, and its smallest and largest amount (`paint_take`). Soft,
# noisy and over-compressed clips are the most common. A person sees each at its smallest amount and rejects the clip.
FLAWS: dict[str, tuple[int, float, float]] = {
    "blurred": (3, 1.6, 3.0),
    "noisy": (2, 22.0, 40.0),
    "blocky": (2, 10.0, 5.0),
    "dark": (1, 0.3, 0.18),
    "blown": (1, 1.8, 2.6),
    "shaky": (1, 3.5, 6.0),
    "frozen": (1, 0.85, 1.0),
    "stuttering": (1, 4.0, 7.0),
}


@dataclass(frozen=True)
class Combination:
    """Keys of `STAGE`, `MOTIONS` and `SPRITES`."""

    photograph: str
    motion: str
    sprite: str

    @classmethod
    def of(cls, url: str) -> Combination:
        """The combination that an index's `url` names."""
        return cls(*url.split("+"))

    @property
    def url(self) -> str:
        """Its name as a source video."""
        return f"{self.photograph}+{self.motion}+{self.sprite}"

    @property
    def split(self) -> str:
        """Where it belongs: of ten, one to validation, one to test and the others to training.

        Two combinations that differ in the motion or the sprite alone are never held out for the same split, so each
        pair of parts occurs in training. A photograph that is held out whole takes its combinations with it.
        """
        shown = photograph_named(self.photograph)
        if shown.split != "train":
            return shown.split
        place = STAGE.index(shown) + 3 * list(MOTIONS).index(self.motion) + list(SPRITES).index(self.sprite)
        return {0: "val", 1: "test"}.get(place % 10, "train")


def combinations_of(kind: WorldKind, split: str) -> list[Combination]:
    """Returns the combinations that a split of a world shows, in a fixed order.

    Raises:
        ValueError: For a varied world, which has none.
    """
    if kind == "varied":
        raise ValueError("a varied world has no combinations")
    shown = [photograph for photograph in STAGE if photograph.split == ("train" if kind == "combinations" else split)]
    every = (Combination(photograph.url, *parts) for photograph in shown for parts in product(MOTIONS, SPRITES))
    return [combination for combination in every if combination.split == split]


@dataclass(frozen=True)
class StagedScene(Scene):
    """A scene that shows a combination.

    Attributes:
        motion: A key of `MOTIONS`.
        sprite: A key of `SPRITES`.
    """

    motion: str = ""
    sprite: str = ""

    @property
    def parts(self) -> tuple[str, str, str]:
        """Keys of its photograph, motion and sprite."""
        return self.url, self.motion, self.sprite

    @property
    def described(self) -> dict[str, str]:
        """What it is made of, by names of `PARTS`."""
        return dict(zip(PARTS, (self.split, *self.parts), strict=False))

    @property
    def source(self) -> str:
        """The source video that the clip is from: its combination."""
        return Combination(*self.parts).url


@dataclass(frozen=True)
class FlawedScene(StagedScene):
    """A scene that was taken badly.

    Attributes:
        flaw: A key of `FLAWS`.
        amount: How much of it, between the flaw's smallest and largest amount.
    """

    flaw: str = ""
    amount: float = 0.0

    @property
    def described(self) -> dict[str, str]:
        """What it is made of, and its flaw."""
        return {**super().described, "flaw": self.flaw}


def draw_stage(
    kind: WorldKind, seed: int, split: str, count: int, frames: int, size: int, fps: int, flaws: float = 0.0
) -> Iterator[StagedScene]:
    """Draws the first clips of a split, each independent of how many there are.

    All combinations come in turn, in an order of the seed's, a photograph never a second time before all others. Then
    they come again, seen anew. Flawed takes are spread evenly over photographs and over the takes of a combination: of
    n takes n times `flaws` are flawed, rounded up or down. So up to a half, two takes show each combination well once.

    Args:
        kind: "combinations" or "photographs".
        seed: Seed of the world, >= 0.
        split: "train", "val" or "test".
        count: Number of clips.
        frames: Length of a clip.
        size: Side of the square frame in pixels.
        fps: Frames per second.
        flaws: Share of training clips that are flawed takes (`FLAWS`), from 0 to less than 1; other splits have none.

    Yields:
        The scenes.

    Raises:
        ValueError: Such a share is impossible, or the world is a varied one.
    """
    if not 0 <= flaws < 1:
        raise ValueError(f"flaws: expected a share of the training clips, from 0 to less than 1, got {flaws:g}")
    every, number = combinations_of(kind, split), SPLITS.index(split)
    begun = _begun(np.random.default_rng([seed, number, 0, 4]), every)
    for index in range(count):
        turn, place = divmod(index, len(every))
        if not place:
            order = _order(np.random.default_rng([seed, number, turn, 2]), every)
        shown = order[place]
        rng = np.random.default_rng([seed, number, index, 3])
        scene = StagedScene(
            seed=seed,
            split=split,
            index=index,
            frames=frames,
            size=size,
            fps=fps,
            url=shown.photograph,
            grade=Grade(),
            camera=_draw_camera(rng, photograph_named(shown.photograph), *MOTIONS[shown.motion]),
            sprites=(_draw_sprite(rng, shown.sprite),),
            renderer=STAGE_RENDERER,
            motion=shown.motion,
            sprite=shown.sprite,
        )
        before, after = (math.floor(take * flaws + begun[shown]) for take in (turn, turn + 1))
        flawed = split == "train" and after > before
        yield _flawed(np.random.default_rng([seed, number, index, 5]), scene) if flawed else scene


# Part of every clip's id: raise it whenever the same arguments would give other pixels.
STAGE_RENDERER = 101


def _begun(rng: np.random.Generator, combinations: list[Combination]) -> dict[Combination, float]:
    """How much of a flawed take each combination begins with, spread evenly over those of a photograph, in (0, 1)."""
    found: dict[Combination, float] = {}
    for shown in dict.fromkeys(combination.photograph for combination in combinations):
        of_photograph = [combination for combination in combinations if combination.photograph == shown]
        places = (rng.permutation(len(of_photograph)) + 0.5) / len(of_photograph)
        found |= zip(of_photograph, places.tolist(), strict=True)
    return found


def _flawed(rng: np.random.Generator, scene: StagedScene) -> FlawedScene:
    weights = np.array([weight for weight, *_ in FLAWS.values()], dtype=np.float64)
    flaw = str(rng.choice(list(FLAWS), p=weights / weights.sum()))
    _, low, high = FLAWS[flaw]
    amount = round(low + float(rng.random()) * (high - low), 3)
    return FlawedScene(**{field.name: getattr(scene, field.name) for field in fields(scene)}, flaw=flaw, amount=amount)


def _order(rng: np.random.Generator, combinations: list[Combination]) -> list[Combination]:
    """Photographs in turn, each with what is left of its combinations, rare motions and sprites first."""
    left: dict[str, list[Combination]] = {}
    for place in rng.permutation(len(combinations)):
        left.setdefault(combinations[int(place)].photograph, []).append(combinations[int(place)])
    shown, order = Counter[str](), []
    while left:
        for place in rng.permutation(len(left)):
            of_photograph = list(left.values())[int(place)]
            chosen = min(of_photograph, key=lambda combination: shown[combination.motion] + shown[combination.sprite])
            of_photograph.remove(chosen)
            shown.update((chosen.motion, chosen.sprite))
            order.append(chosen)
        left = {photograph: rest for photograph, rest in left.items() if rest}
    return order


def _draw_camera(rng: np.random.Generator, photograph: Photograph, pan: str, zoom: str, turn: str) -> Camera:
    height, width = load_photograph(photograph).shape[1:]
    window = min(height, width) * _uniform(rng, 0.64, 0.69)
    camera = Camera(
        pan=pan,
        zoom=zoom,
        turn=turn,
        speed="",
        easing="steady",
        center=(0.0, 0.0),
        window=round(window, 3),
        distance=0.4 if pan else 0.0,
        ratio=1.5 if zoom else 1.0,
        degrees=40.0 if turn else 0.0,
        tilt=_uniform(rng, -2.0, 2.0),
    )
    way, windows, angles = camera_path(camera, 33)
    reach = windows * (np.abs(np.cos(angles)) + np.abs(np.sin(angles))) / 2
    first = (reach[:, None] - way).max(axis=0)
    last = np.array([width, height]) - (reach[:, None] + way).max(axis=0)
    middle = np.array([width, height]) / 2 + rng.uniform(-0.08, 0.08, 2) * window
    center = np.clip(middle, np.minimum(first, last), np.maximum(first, last))
    return replace(camera, center=(round(float(center[0]), 3), round(float(center[1]), 3)))


def _draw_sprite(rng: np.random.Generator, shape: str) -> ColoredSprite:
    _, color, action, direction, spin = SPRITES[shape]
    middle = rng.uniform(-0.35, 0.35, 2)
    step = np.array(DIRECTIONS.get(direction, (0, 0))) * 0.4
    start, stop = middle - step, middle + step
    return ColoredSprite(
        shape=shape,
        size="",
        action=action,
        direction=direction,
        easing="steady",
        start=(round(float(start[0]), 4), round(float(start[1]), 4)),
        stop=(round(float(stop[0]), 4), round(float(stop[1]), 4)),
        radius=_uniform(rng, 0.28, 0.32),
        angle=_uniform(rng, -8.0, 8.0),
        spin=spin,
        texture="gravel",
        cut=(110.0, 110.0, 60.0),
        color=color,
    )


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return round(float(rng.uniform(low, high)), 4)
