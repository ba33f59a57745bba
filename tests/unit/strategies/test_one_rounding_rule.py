"""No operation that rounds differently on different CPUs may be used in `strategies/`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import strategies

FORBIDDEN = {
    "lerp", "addcmul", "addcdiv", "addmm", "addmv", "addr", "baddbmm", "matmul", "mm", "bmm", "mv", "dot", "vdot",
    "einsum", "tensordot", "inner", "linear", "sum", "nansum", "mean", "prod", "cumsum", "norm", "vector_norm", "var",
    "std", "logsumexp", "softmax", "exp", "log", "pow", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tanh", "compile",
    "randn", "rand", "normal_", "optim", "set_flush_denormal",
}  # fmt: skip
EXACT = {("math", "prod"), ("math", "sqrt"), ("np", "sqrt")}  # of integers; rounded once
SOURCES = sorted(Path(next(iter(strategies.__path__))).rglob("*.py"))


def violations(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            name = node.attr
            if isinstance(node.value, ast.Name) and (node.value.id, name) in EXACT:
                continue
            if name.rstrip("_") in FORBIDDEN or name in FORBIDDEN or name.startswith("_foreach"):
                found.append(f"line {node.lineno}: .{name}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            fused = {k.arg for k in node.keywords} & {"alpha", "value"}
            if fused and node.func.attr.rstrip("_") in {"add", "sub", "rsub", "subtract"}:
                found.append(f"line {node.lineno}: .{node.func.attr}({fused.pop()}=)")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            found.append(f"line {node.lineno}: @")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_only_operations_with_one_rounding(path: Path) -> None:
    found = violations(path.read_text(encoding="utf-8"))
    if path.name == "elementwise.py":  # `square_root`: CUDA's is rounded once
        assert [text.split()[-1] for text in found] == [".sqrt"]
    else:
        assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "x.add_(y, alpha=2)",
        "torch.lerp(x, y, w)",
        "x.addcmul_(y, z)",
        "x @ y",
        "x.sum()",
        "torch.optim.SGD",
        "x.sqrt()",
    ],
)
def test_the_rule_sees(line: str) -> None:
    assert len(violations(line)) == 1


def test_there_are_sources_to_look_at() -> None:
    assert {"outer.py", "int8.py", "merge.py"} <= {path.name for path in SOURCES}
