"""The mini world: real photographs filmed by a moving camera, as mp4 clips with UltraVideo's CSV."""

from luve_lightning.data.mini_world.render import OtherWorldError, RenderReport, render_mini_world, vocabulary

__all__ = ["OtherWorldError", "RenderReport", "render_mini_world", "vocabulary"]
