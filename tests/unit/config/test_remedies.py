"""Every error of the user's says what to do about it: wherever one is made, and whatever a lower layer left out."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.client import unpack
from orchestrator.errors import ClusterUnreachable, RunFailed, UserError, VerificationFailed

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("atoll", "faults", "orchestrator", "strategies", "workers")
KINDS = {"UserError", "RunFailed", "ClusterUnreachable", "VerificationFailed"}


def kinds_of_errors(texts: list[str]) -> set[str]:
    """`UserError`, and whatever is derived from it."""
    found = set(KINDS)
    while True:
        derived = {
            name
            for text in texts
            for name, bases in re.findall(r"^class (\w+)\((.*)\):", text, re.MULTILINE)
            if found & set(re.findall(r"\w+", bases))
        }
        if derived <= found:
            return found
        found |= derived


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield node.func.id if isinstance(node.func, ast.Name) else node.func.attr, node


def test_no_error_is_made_without_a_remedy() -> None:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    texts = {path: path.read_text() for path in paths}
    kinds, num, bare = kinds_of_errors(list(texts.values())), 0, []
    made = re.compile(rf"\b({'|'.join(kinds)})\(")
    for path, text in texts.items():
        for name, call in calls(ast.parse(text)) if made.search(text) else ():
            if name in kinds:
                num += 1
                remedies = [keyword.value for keyword in call.keywords if keyword.arg == "remedy"]
                if not remedies or (isinstance(remedies[0], ast.Constant) and not remedies[0].value):
                    bare.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert num > 150 and bare == []
    for kind in (UserError, RunFailed, ClusterUnreachable, VerificationFailed):
        assert inspect.signature(kind).parameters["remedy"].default is inspect.Parameter.empty


@pytest.mark.parametrize("kind", [UserError, RunFailed, ClusterUnreachable, VerificationFailed])
def test_an_error_says_what_to_do_also_after_it_crossed_a_process(kind: type[UserError]) -> None:
    error = pickle.loads(pickle.dumps(kind("it broke", place="here", remedy="that")))
    assert type(error) is kind and str(error) == "it broke (place: here; try: that)"


def test_what_comes_through_a_door_without_a_remedy_gets_one() -> None:
    with pytest.raises(ClusterUnreachable) as raised:
        unpack({"error": {"message": "it broke", "place": None, "remedy": None, "code": 4}})
    assert "atoll status" in raised.value.remedy
