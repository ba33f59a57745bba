from __future__ import annotations

import platform
from dataclasses import replace

import pytest

from orchestrator.cluster.versions import disagreements, my_versions
from orchestrator.version import PROTOCOL_VERSION


def test_one_machine_agrees_with_itself() -> None:
    mine = my_versions()
    assert disagreements(mine, mine) == []
    assert mine.python == platform.python_version()
    assert mine.python.count(".") == 2
    assert mine.protocol == PROTOCOL_VERSION == 1


@pytest.mark.parametrize("key", ["python", "ray", "atoll"])
def test_each_difference_shows_both_sides(key: str) -> None:
    mine = my_versions()
    [text] = disagreements(mine, replace(mine, **{key: "0.0.9"}))
    assert "0.0.9 there" in text
    assert f"{getattr(mine, key)} here" in text


def test_all_differences_are_named() -> None:
    theirs = replace(my_versions(), python="3.11.99", ray="9", atoll="9", protocol=9)
    assert len(disagreements(my_versions(), theirs)) == 4
