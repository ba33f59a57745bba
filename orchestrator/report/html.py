"""Markup that cannot be forged: plain strings are escaped, only what `el` made goes in as it is."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

_VOID = frozenset({"meta", "br", "hr", "col", "path", "line", "rect", "circle", "use"})


class Markup(str):
    """Text that is already HTML or SVG."""

    __slots__ = ()


Child = str | Markup | None


def el(name: str, /, *children: Child, **attributes: object) -> Markup:
    """An element. `class_` becomes class, other underscores become hyphens; None and False attributes are left out."""
    written = "".join(
        f" {_attribute_name(key)}" if value is True else f' {_attribute_name(key)}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID and not children:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[Child], between: str = "") -> Markup:
    """Children one after another, plain strings escaped."""
    return Markup(
        between.join(
            child if isinstance(child, Markup) else html.escape(child, quote=False)
            for child in children
            if child is not None
        )
    )


def data_block(values: Any) -> Markup:
    """A JSON block that scripts read; it cannot end its element early."""
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    return Markup(f'<script type="application/json">{text}</script>')


def table(
    head: Sequence[str], rows: Iterable[Sequence[Child]], *, caption: str, numeric: Sequence[int] = (), css: str = ""
) -> Markup:
    """A table that scrolls sideways where it does not fit; `numeric` are the columns set to the right."""
    right = set(numeric)

    def cell(name: str, i: int, child: Child, **attributes: object) -> Markup:
        return el(name, child, class_="num" if i in right else None, **attributes)

    return el(
        "div",
        el(
            "table",
            el("caption", caption, class_="unseen"),
            el("thead", el("tr", *(cell("th", i, text, scope="col") for i, text in enumerate(head)))),
            el("tbody", *(el("tr", *(cell("td", i, child) for i, child in enumerate(row))) for row in rows)),
        ),
        class_=f"scroll {css}".strip(),
        tabindex="0",
        role="region",
        aria_label=caption,
    )


def _attribute_name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
