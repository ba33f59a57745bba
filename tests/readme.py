"""What the README shows, as code that tests can run."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def blocks(heading: str, language: str) -> list[str]:
    """Code blocks of a language ("" for commands) below a heading of the README."""
    text = README.read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None, f"the README has no section {heading!r}"
    found = re.findall(r"^```(\w*)\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    return [code for name, code in found if name == language]


def commands(text: str) -> list[list[str]]:
    """The words of each `atoll ...` in a text."""
    return [line.split()[1:] for line in re.findall(r"^`?(atoll [^`\n]+)", text, re.MULTILINE)]
