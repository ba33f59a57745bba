"""What a module of the user's says, as one digest: its source, and that of its own modules that it imports.

Of a module in a package, the modules of that package count; of one on its own, those that lie beside it. Installed
packages do not: their versions are another matter. Nothing is executed.
"""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3

from workers.digest import DIGEST_BYTES

INSTALLED = ("purelib", "platlib", "stdlib", "platstdlib")


class SourceChanged(ValueError):
    """A module is another one on this machine than in the run."""


def source_digest(function: str) -> str | None:
    """Digest of the sources behind 'package.module:function'; None for a module without a file of Python."""
    module = function.partition(":")[0]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    file = Path(spec.origin)
    depth = module.count(".") + (file.name == "__init__.py")
    root = file.parents[depth]
    top = module.split(".")[0]
    alone = depth == 0 and str(root) not in {sysconfig.get_path(name) for name in INSTALLED}
    found: dict[str, Path] = {}
    todo = [(module, file)]
    while todo:
        name, path = todo.pop()
        if name in found:
            continue
        found[name] = path
        for wanted in _imports(name, path):
            beside = _file_of(root, wanted)
            if beside is not None and (alone or wanted.split(".")[0] == top):
                todo.append((wanted, beside))
    hasher = blake3()
    for name, path in sorted(found.items()):
        data = path.read_bytes()
        hasher.update(f"{name}\0{len(data)}\0".encode())
        hasher.update(data)
    return hasher.hexdigest(length=DIGEST_BYTES)


def check_source(function: str, digest: str | None, *, key: str) -> None:
    """Compare the sources behind a function with those of the run (`digest`; None: not known). Raises SourceChanged."""
    if digest is None:
        return
    here = source_digest(function)
    if here != digest:
        module = function.partition(":")[0]
        spec = importlib.util.find_spec(module)
        where = spec.origin if spec is not None else "nowhere"
        raise SourceChanged(
            f"{key} = {function!r}: {module} is {where} here, with digest {here}, and the run began with {digest}: "
            f"bring the same code (its own imports count too) to every machine, or unset {key}_digest with "
            "`atoll train --resume` to go on with what is there now"
        )


def _imports(name: str, path: Path) -> Iterator[str]:
    """Full names of everything that could be a module among what a file imports."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level and package else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from _with_parents(base)
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names)


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1) if parts[0])


def _file_of(root: Path, name: str) -> Path | None:
    place = root.joinpath(*name.split("."))
    for file in (place.with_name(place.name + ".py"), place / "__init__.py"):
        if file.is_file():
            return file
    return None
