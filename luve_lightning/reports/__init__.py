"""The report: results, curves, spectra, comparisons and videos on one self-contained page."""

from luve_lightning.reports.comparisons import Comparison
from luve_lightning.reports.report import PageText, ReportInputs, build_report

__all__ = ["Comparison", "PageText", "ReportInputs", "build_report"]
