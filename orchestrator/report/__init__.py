"""The report of a run: `build_report` writes the HTML file, `console_table` is its short form for a terminal."""

from __future__ import annotations

from orchestrator.report.build import build_report
from orchestrator.report.console import console_table
from orchestrator.report.load import ReportError

__all__ = ["ReportError", "build_report", "console_table"]
