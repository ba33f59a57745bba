"""Write nested plain values as TOML (the standard library only reads it)."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
LONG_INTEGER = 10_000
SHORT_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def format_value(value: Any) -> str:
    """One value as TOML on one line.

    Raises:
        ValueError: TOML has no such value (None, an arbitrary object).
    """
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return f"{value:_}" if abs(value) >= LONG_INTEGER else str(value)
        case float():
            return _format_float(value)
        case str():
            return _quote(value)
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case list() | tuple():
            return f"[{', '.join(format_value(item) for item in value)}]"
        case Mapping():
            items = (f"{format_key(key)} = {format_value(item)}" for key, item in value.items())
            return f"{{ {', '.join(items)} }}" if value else "{}"
        case _:
            raise ValueError(f"TOML cannot hold {value!r} ({type(value).__name__})")


def format_key(key: Any) -> str:
    """One key, quoted where TOML asks for it.

    Raises:
        ValueError: the key is not a string.
    """
    if not isinstance(key, str):
        raise ValueError(f"a TOML key is a string, not {key!r} ({type(key).__name__})")
    return key if BARE_KEY.fullmatch(key) else _quote(key)


def format_tables(tables: Mapping[str, Mapping[str, Any]], notes: Mapping[str, str] | None = None) -> str:
    """Tables of values as a TOML document; a value of None becomes a comment that says it is not set.

    Args:
        tables: section -> key -> value.
        notes: "section.key" -> comment put behind the value, for example where it came from.

    Raises:
        ValueError: a value that TOML cannot hold; the message names the key.
    """
    return "\n".join(_lines(tables, notes or {})) + "\n"


def _lines(tables: Mapping[str, Mapping[str, Any]], notes: Mapping[str, str]) -> Iterator[str]:
    for position, (section, values) in enumerate(tables.items()):
        if position:
            yield ""
        yield f"[{format_key(section)}]"
        for key, value in values.items():
            try:
                line = f"# {key} is not set" if value is None else f"{format_key(key)} = {format_value(value)}"
            except ValueError as error:
                raise ValueError(f"{section}.{key}: {error}") from error
            note = notes.get(f"{section}.{key}")
            yield f"{line:<40}  # {note}" if note else line


def _format_float(value: float) -> str:
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return repr(value)


def _quote(text: str) -> str:
    return f'"{"".join(_escape(character) for character in text)}"'


def _escape(character: str) -> str:
    if character in SHORT_ESCAPES:
        return SHORT_ESCAPES[character]
    if ord(character) < 0x20 or ord(character) == 0x7F:
        return f"\\u{ord(character):04x}"
    return character
