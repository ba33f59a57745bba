"""A hook of mkdocs: decision records enter the navigation by themselves, in order, their headings as titles."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any


def decisions(docs: Path) -> list[dict[str, str]]:
    """Heading -> page of every record."""
    pages = sorted((docs / "adr").glob("*.md"))
    return [{page.read_text(encoding="utf-8").splitlines()[0].lstrip("# "): f"adr/{page.name}"} for page in pages]


def on_config(config: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Called by mkdocs when it has read mkdocs.yml."""
    config["nav"] = [*config["nav"], {"Decisions": decisions(Path(config["docs_dir"]))}]
    return config
