"""Whoever type-checks a program that imports atoll gets the types that are written in it (PEP 561)."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[3]
TYPED = ("atoll", "faults", "orchestrator", "strategies", "workers")


def public_functions(body: list[ast.stmt]) -> list[ast.FunctionDef]:
    found: list[ast.FunctionDef] = []
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += public_functions(node.body)
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
            found.append(node)
    return found


def test_the_packages_say_that_they_are_typed() -> None:
    for name in TYPED:
        assert (ROOT / name / "py.typed").exists(), name


def test_everything_public_has_types() -> None:
    functions = public_functions(ast.parse((ROOT / "atoll" / "__init__.py").read_text(encoding="utf-8")).body)
    assert len(functions) > 15
    for function in functions:
        assert function.returns is not None or function.name == "__init__", function.name
        told = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        assert all(argument.annotation is not None for argument in told if argument.arg != "self"), function.name
