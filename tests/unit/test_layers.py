"""The rules of the layers, read from the source: who imports whom, and what the pure layers do without."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("strategies", "faults", "workers", "orchestrator")
# The public face stands above all four; nothing below imports it.
OURS = (*LAYERS, "atoll", "benchmarks", "tests")

MAY_IMPORT = {
    "strategies": {"strategies"},
    "faults": {"faults", "strategies"},
    "workers": {"strategies", "workers"},
    "orchestrator": {"faults", "orchestrator", "strategies", "workers"},
    "atoll": {"faults", "orchestrator", "strategies", "workers"},
}
# The tools that cause failures wrap what the workers use; the judgement of failures does not.
FAULT_TOOLS = {"faults.plan", "faults.inject", "faults.chaos", "faults.eavesdrop", "faults.links", "faults.process",
               "faults.stage", "faults.virtual", "faults.lab"}  # fmt: skip

HEAVY = {"torch", "ray"}
# Imported by the controller and the command line, which answer without torch and Ray.
LIGHT_WORKERS = {"workers.config", "workers.messages", "workers.data.index", "workers.schedule"}
LIGHT_STRATEGIES = {"strategies.config", "strategies.fragments"}
RAY_IN_WORKERS: set[str] = set()
# The shells: the controller's and the islands' actors need Ray (never torch), a run in one process trains in it.
SHELLS = {
    "orchestrator.actor_tools": {"ray"},
    "orchestrator.arriving": {"ray"},
    "orchestrator.actors": {"ray"},
    "orchestrator.caretaker": {"ray"},
    "orchestrator.controls": {"ray"},
    "orchestrator.keeper": {"ray"},
    "orchestrator.hands": {"ray"},
    "orchestrator.ending": {"ray"},
    "orchestrator.dashboard.actor": {"ray"},
    "orchestrator.island_actor": {"ray"},
    "orchestrator.pipeline.actors": {"ray"},
    "orchestrator.pipeline.controller": {"ray"},
    "orchestrator.pipeline.controls": {"ray"},
    "orchestrator.pipeline.local": {"torch"},
    "orchestrator.local": {"torch"},
}

IMPURE_MODULES = {
    "asyncio", "builtins", "concurrent", "datetime", "io", "logging", "multiprocessing", "os", "pathlib", "pickle",
    "queue", "random", "ray", "secrets", "shutil", "signal", "socket", "subprocess", "tempfile", "threading",
    "time", "uuid",
}  # fmt: skip
IMPURE_CALLS = {"open", "print", "input", "breakpoint", "exec", "eval"}
# Drawn from the global generator, or different bits on different machines.
IMPURE_TORCH = {"rand", "randn", "randint", "randperm", "manual_seed", "seed", "save", "load", "normal", "bernoulli"}

BROAD_EXCEPT_ALLOWED = {"orchestrator.controller", "faults.ray_errors"}
MAX_LINES = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Import:
    module: str
    line: int
    at_module_level: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    name: str
    path: Path
    tree: ast.Module
    imports: tuple[Import, ...] = field(default=())

    @property
    def layer(self) -> str:
        return self.name.partition(".")[0]


@cache
def all_modules() -> dict[str, Module]:
    files = [
        ROOT / "atoll" / "__init__.py",
        *(path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))),
    ]
    modules = (read_module(path, ROOT) for path in files)
    return {module.name: module for module in modules}


def read_module(path: Path, root: Path) -> Module:
    parts = path.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return Module(name=name, path=path, tree=tree, imports=tuple(find_imports(tree)))


def find_imports(tree: ast.Module) -> Iterator[Import]:
    """All imports that run; what only a type checker sees is left out."""
    yield from _imports_in(tree.body, at_module_level=True)


def _imports_in(body: list[ast.stmt], *, at_module_level: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module=alias.name, line=node.lineno, at_module_level=at_module_level)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            for alias in node.names:
                # `from a import b` may mean the module a.b: both are named, a name that is no module is ignored.
                full = f"{node.module}.{alias.name}"
                yield Import(module=full, line=node.lineno, at_module_level=at_module_level)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from _imports_in(node.orelse, at_module_level=at_module_level)
        else:
            inside = at_module_level and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            children = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            handlers = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.ExceptHandler)]
            cases = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.match_case)]
            nested = [statement for block in (*handlers, *cases) for statement in block.body]
            yield from _imports_in([*children, *nested], at_module_level=inside)


def first_name(module: str) -> str:
    return module.partition(".")[0]


def imported_modules(name: str) -> list[str]:
    """The modules of ours that run when a dotted name is imported: its packages, and the one that it is or is in."""
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return [prefix for prefix in prefixes if prefix in all_modules()]


def allowed_layers(module: Module) -> set[str]:
    tool = any(module.name == name or module.name.startswith(f"{name}.") for name in FAULT_TOOLS)
    return MAY_IMPORT[module.layer] | ({"workers"} if tool else set())


def modules_of(*layers: str) -> list[Module]:
    return [module for module in all_modules().values() if module.layer in layers]


def pure_modules() -> list[Module]:
    pure_faults = [m for m in modules_of("faults") if not any(m.name.startswith(name) for name in FAULT_TOOLS)]
    return [*modules_of("strategies"), *(m for m in pure_faults if m.name not in BROAD_EXCEPT_ALLOWED)]


def heavy_path(name: str) -> tuple[str, ...] | None:
    """The shortest chain of imports at module level by which a module reaches torch or Ray, or None.

    A shell may reach what it is a shell of.
    """
    heavy = HEAVY - SHELLS.get(name, set())
    waiting, seen = [(name,)], {name}
    for chain in waiting:
        for imported in all_modules()[chain[-1]].imports:
            if not imported.at_module_level:
                continue
            if first_name(imported.module) in heavy:
                return (*chain, imported.module)
            fresh = [ours for ours in imported_modules(imported.module) if ours not in seen]
            seen.update(fresh)
            waiting.extend((*chain, ours) for ours in fresh)
    return None


def complaints_about_layers(module: Module) -> list[str]:
    wrong = [i for i in module.imports if first_name(i.module) in OURS]
    wrong = [i for i in wrong if first_name(i.module) not in allowed_layers(module)]
    return [f"{module.path}:{i.line} imports {i.module}" for i in wrong]


def complaints_about_purity(module: Module) -> list[str]:
    found = [f"{module.path}:{i.line} imports {i.module}" for i in module.imports if is_impure(i.module)]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_CALLS:
            found.append(f"{module.path}:{node.lineno} calls {node.func.id}")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            if node.attr in IMPURE_TORCH:
                found.append(f"{module.path}:{node.lineno} uses torch.{node.attr}")
    return found


def is_impure(module: str) -> bool:
    return first_name(module) in IMPURE_MODULES or module.startswith("numpy.random")


def broad_handlers(module: Module) -> list[str]:
    handlers = [node for node in ast.walk(module.tree) if isinstance(node, ast.ExceptHandler)]
    broad = [h for h in handlers if h.type is None or ast.unparse(h.type) in ("Exception", "BaseException")]
    # One that only cleans up and raises again catches nothing.
    return [f"{module.path}:{h.lineno}" for h in broad if not isinstance(h.body[-1], ast.Raise)]


@pytest.mark.parametrize("layer", [*LAYERS, "atoll"])
def test_imports_point_one_way(layer: str) -> None:
    assert modules_of(layer), f"no module in {layer}"
    assert [line for module in modules_of(layer) for line in complaints_about_layers(module)] == []


def test_pure_layers_have_no_clock_no_randomness_and_no_io() -> None:
    assert [line for module in pure_modules() for line in complaints_about_purity(module)] == []


def test_controller_and_command_line_import_neither_torch_nor_ray() -> None:
    names = {module.name for module in modules_of("orchestrator")} | (
        (LIGHT_WORKERS | LIGHT_STRATEGIES) & all_modules().keys()
    )
    chains = [" -> ".join(chain) for name in sorted(names) if (chain := heavy_path(name)) is not None]
    assert chains == []
    assert names >= SHELLS.keys()


def test_workers_know_ray_in_one_place() -> None:
    found = [m.name for m in modules_of("workers") if any(first_name(i.module) == "ray" for i in m.imports)]
    assert set(found) <= RAY_IN_WORKERS


def test_exceptions_are_caught_by_name() -> None:
    modules = [module for module in all_modules().values() if module.name not in BROAD_EXCEPT_ALLOWED]
    assert [line for module in modules for line in broad_handlers(module)] == []


def test_only_config_reads_toml() -> None:
    readers = {m.name for m in all_modules().values() if any(i.module.startswith("tomllib") for i in m.imports)}
    # Two take single values from what they find in a run directory, also one that an older version wrote; a topology
    # of the lab is no part of a run, and a plan of faults is a file of its own.
    assert readers <= {
        "orchestrator.config",
        "orchestrator.fault_plan",
        "orchestrator.topology",
        "orchestrator.ledger_view",
        "orchestrator.report.load",
    }


def test_layers_are_empty_packages() -> None:
    for layer in LAYERS:
        body = [node for node in all_modules()[layer].tree.body if not isinstance(node, ast.Expr)]
        assert not body, f"{layer}/__init__.py holds more than a docstring"


def test_files_are_short_enough_to_read() -> None:
    lengths = {str(m.path): len(m.path.read_text(encoding="utf-8").splitlines()) for m in all_modules().values()}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_the_rules_find_what_they_forbid(tmp_path: Path) -> None:
    (tmp_path / "strategies").mkdir()
    path = tmp_path / "strategies" / "bad.py"
    path.write_text(
        "import time\nfrom typing import TYPE_CHECKING\nimport torch\n"
        "if TYPE_CHECKING:\n    import ray\n"
        "def f():\n    from workers.store import BlobStore\n    torch.randn(3)\n    open('x')\n"
        "try:\n    import numpy.random\nexcept Exception:\n    pass\n"
    )
    module = read_module(path, tmp_path)
    assert complaints_about_layers(module) == [f"{path}:7 imports workers.store.BlobStore"]
    complaints = complaints_about_purity(module)
    assert {line.rpartition(":")[2].partition(" ")[2] for line in complaints} == {
        "imports time",
        "imports numpy.random",
        "uses torch.randn",
        "calls open",
    }
    assert broad_handlers(module) == [f"{path}:12"]
    assert [i.module for i in module.imports if i.at_module_level and i.module != "typing.TYPE_CHECKING"] == [
        "time",
        "torch",
        "numpy.random",
    ]
