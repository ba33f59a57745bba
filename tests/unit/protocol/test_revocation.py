"""When the controller asks whether a version is held by nobody (protocol 1.8)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.revocation import nobody_reports
from workers.messages import Version

HEAD = Version(n=3, chain="c3")


def process(n: int | None, *, holds_next: bool = False) -> Any:
    report = None if n is None else SimpleNamespace(n=n, holds_next=holds_next)
    return SimpleNamespace(report=lambda fragment: report)


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ([process(2), process(1)], True),
        ([process(2), process(-1)], True),
        ([process(2), process(3)], False),
        ([process(2), process(2, holds_next=True)], False),
        ([process(2), process(None)], False),
        ([process(-1), process(-1)], False),
        ([], False),
    ],
    ids=[
        "all older",
        "one has nothing",
        "one has it",
        "one has its result",
        "one is silent",
        "nobody can go on",
        "none",
    ],
)
def test_nobody_reports(processes: list[Any], expected: bool) -> None:
    assert nobody_reports(processes, 0, HEAD) is expected
