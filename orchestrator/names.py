"""Names: the nearest of some to one that was mistyped, and what a label of a machine may be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

SIMILAR_ENOUGH = 0.6
# Those of Kubernetes, which Ray takes: its own message for others is about its command line.
LABEL_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LABEL_KEY = re.compile(rf"(?:{LABEL_PART}/)?{LABEL_PART}", re.ASCII)
LABEL_VALUE = re.compile(LABEL_PART, re.ASCII)


def nearest(name: str, choices: Sequence[str]) -> str | None:
    """The choice that looks most like a name, or None when none does."""
    matches = difflib.get_close_matches(name.lower(), choices, n=1, cutoff=SIMILAR_ENOUGH)
    return matches[0] if matches else None


def label_problem(key: str, value: str) -> str | None:
    """What is wrong with a label, None if nothing is."""
    for what, text, form in (("key", key, LABEL_KEY), ("value", value, LABEL_VALUE)):
        if form.fullmatch(text) is None:
            allowed = "up to 63 of A-Z a-z 0-9 . _ - with a letter or digit at both ends"
            return f"{text!r} cannot be the {what} of a label: {allowed}"
    return None
