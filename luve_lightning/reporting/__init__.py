"""What people look at: the report page, dashboards, the human study, the judge."""

from luve_lightning.reporting.chart import Chart, Mark, Series, draw_chart
from luve_lightning.reporting.comparisons import Comparison
from luve_lightning.reporting.document import data_uri, render_document
from luve_lightning.reporting.report import PageText, ReportInputs, build_report

__all__ = [
    "Chart",
    "Comparison",
    "Mark",
    "PageText",
    "ReportInputs",
    "Series",
    "build_report",
    "data_uri",
    "draw_chart",
    "render_document",
]
