"""What every row of the journal is, whoever defines it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Base of all records."""

    kind: ClassVar[str] = ""
