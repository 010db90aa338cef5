"""Web pages of one file: templates, styles and scripts put together, line charts, no external requests."""

from luve_lightning.pages.chart import Chart, Mark, Series, draw_chart
from luve_lightning.pages.document import data_uri, render_document

__all__ = ["Chart", "Mark", "Series", "data_uri", "draw_chart", "render_document"]
