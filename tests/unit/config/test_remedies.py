"""Every error of the user's says what to do about it: wherever one is made, and whatever a lower layer left out."""

from __future__ import annotations

import ast
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.client import unpack
from orchestrator.errors import ClusterUnreachable, RunFailed, UserError, VerificationFailed

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("atoll", "faults", "orchestrator", "strategies", "workers")
KINDS = {"UserError", "RunFailed", "ClusterUnreachable", "VerificationFailed"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def kinds_of_errors(trees: list[tuple[str, ast.Module]]) -> set[str]:
    """`UserError`, and whatever is derived from it."""
    found = set(KINDS)
    while True:
        derived = {
            node.name
            for _, tree in trees
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).split(".")[-1] in found for base in node.bases)
        }
        if derived <= found:
            return found
        found |= derived


def test_no_error_is_made_without_a_remedy() -> None:
    trees = list(sources())
    kinds, num, bare = kinds_of_errors(trees), 0, []
    for place, tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in kinds:
                num += 1
                remedies = [keyword.value for keyword in node.keywords if keyword.arg == "remedy"]
                if not remedies or (isinstance(remedies[0], ast.Constant) and not remedies[0].value):
                    bare.append(f"{place}:{node.lineno}")
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
