"""`build_report`: from run directories to an HTML file."""

from __future__ import annotations

import os
import re
from pathlib import Path

from orchestrator.report.compare import compare_page
from orchestrator.report.load import ReportError, load_run
from orchestrator.report.page import single_run_page


def build_report(run_dir: Path, other: Path | None = None) -> Path:
    """Write the report of a run, or of two side by side, and return its path.

    Reads config.toml, summary.json and metrics.jsonl of each; what is missing is said in the report. One run:
    `run_dir/report.html`; two: `run_dir/report-vs-<name of other>.html`. Raises ReportError where a directory holds
    no run, or the file cannot be written.
    """
    run = load_run(run_dir)
    if other is None:
        return _write(run_dir / "report.html", single_run_page(run))
    second = load_run(other)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", other.resolve().name) or "other"
    return _write(run_dir / f"report-vs-{name}.html", compare_page(run, second))


def _write(target: Path, page: str) -> Path:
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        scratch.write_text(page, encoding="utf-8")
        os.replace(scratch, target)
    except OSError as error:
        raise ReportError(
            f"cannot write {target}: {error.strerror}", remedy="free some space, or check the folder's permissions"
        ) from error
    finally:
        scratch.unlink(missing_ok=True)
    return target
