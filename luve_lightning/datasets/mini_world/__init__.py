"""The mini world: real photographs filmed by a moving camera, as mp4 clips with UltraVideo's CSV."""

from luve_lightning.datasets.mini_world.captions import vocabulary
from luve_lightning.datasets.mini_world.manifest import OtherWorldError
from luve_lightning.datasets.mini_world.render import RenderReport, render_mini_world

__all__ = ["OtherWorldError", "RenderReport", "render_mini_world", "vocabulary"]
