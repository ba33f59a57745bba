"""The site builds without a warning, every page is in its navigation, and its tables are what the planner says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import atoll
from orchestrator.plan_pages import CASES, MARKED, renewed

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"


def configuration() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def pages(entry: Any) -> list[str]:
    """The files that a part of the navigation names."""
    if isinstance(entry, str):
        return [entry]
    return [page for value in (entry.values() if isinstance(entry, dict) else entry) for page in pages(value)]


def test_every_page_is_in_the_navigation_once() -> None:
    named = pages(configuration()["nav"])
    # The decision records are added by docs/navigation.py.
    files = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if path.parent.name != "adr"}
    assert sorted(named) == sorted(set(named))
    assert set(named) == files, "mkdocs.yml, nav: add the page, or take it out"
    linked = set(re.findall(r"\]\(([\w/-]+\.md)\)", (DOCS / "index.md").read_text(encoding="utf-8")))
    assert linked == files - {"index.md"}, "docs/index.md says what each page is for"


class Ids(HTMLParser):
    """The ids of a page, and what it loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.add(values.get("id") or "")
        rel = values.get("rel")
        if tag in ("script", "link", "img", "iframe") and rel not in ("canonical", "next", "prev"):
            address = values.get("src") or values.get("href") or ""
            if address.startswith(("http:", "https:", "//")):
                self.loads.append(f"{tag} {rel}: {address}")


@pytest.mark.timeout(120)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    api = Ids()
    api.feed((tmp_path / "site" / "reference" / "api.html").read_text(encoding="utf-8"))
    public = {name for name in atoll.__all__ if getattr(getattr(atoll, name), "__module__", "") == "atoll"}
    assert {f"atoll.{name}" for name in public} <= api.ids and len(public) >= 4
    records = {path.stem for path in (DOCS / "adr").glob("*.md")}
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert {stem for stem in records if f"adr/{stem}.html" in home} == records
    of_other_modules = {"orchestrator.config.RunConfig", "orchestrator.handle.Run.stop", "strategies.strategy.Strategy"}
    assert of_other_modules <= api.ids
    for page in (tmp_path / "site").rglob("*.html"):
        found = Ids()
        found.feed(page.read_text(encoding="utf-8"))
        assert found.loads == [], f"{page.name} loads from elsewhere"


def test_the_tables_are_what_the_planner_says_now() -> None:
    text = (DOCS / "choosing.md").read_text(encoding="utf-8")
    assert {match[2] for match in MARKED.finditer(text)} == CASES.keys()
    assert renewed(text) == text, "python -m orchestrator.plan_pages docs/choosing.md"
    assert renewed(text.replace("Start from", "Begin with")) == text
