"""A hook of mkdocs: decision records enter the navigation by themselves, pages not written yet leave it."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any


def decisions(docs: Path) -> list[dict[str, str]]:
    """Heading -> page of every record."""
    pages = sorted((docs / "adr").glob("*.md"))
    return [{page.read_text(encoding="utf-8").splitlines()[0].lstrip("# "): f"adr/{page.name}"} for page in pages]


def written(entry: Any, docs: Path) -> Any:
    """A part of the navigation without pages that do not exist; None if nothing is left."""
    if isinstance(entry, str):
        return entry if (docs / entry).is_file() else None
    if isinstance(entry, list):
        return [kept for part in entry if (kept := written(part, docs)) is not None] or None
    kept = {title: inner for title, part in entry.items() if (inner := written(part, docs)) is not None}
    return kept or None


def on_config(config: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Called by mkdocs when it has read mkdocs.yml."""
    docs = Path(config["docs_dir"])
    config["nav"] = [*written(config["nav"], docs), {"Decisions": decisions(docs)}]
    return config
