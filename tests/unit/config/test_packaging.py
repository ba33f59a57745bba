from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import atoll
from orchestrator.config import list_presets, presets_dir
from orchestrator.topology import list_topologies

ROOT = Path(__file__).resolve().parents[3]
LAYERS = ("faults", "orchestrator", "strategies", "workers")
DATA_SUFFIXES = {".LICENSE", ".html", ".css", ".js", ".json", ".toml", ".txt", ".svg", ".typed"}

LOOK_INSIDE = """
import json
from orchestrator.config import list_presets, load_config, presets_dir
import atoll
print(json.dumps({
    "presets": [load_config(name).config.run.name for name in list_presets()],
    "presets_dir": str(presets_dir()),
    "version": atoll.__version__,
}))
"""


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~ ;]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip would put into site-packages: the wheel of a copy of the tree, unpacked."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in (*LAYERS, "atoll", "cluster_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", build, str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(target / done.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(target)
    return target


def test_presets_are_found_from_a_checkout() -> None:
    assert presets_dir() == ROOT / "cluster_configs" / "runs"


def test_presets_are_found_from_an_installed_wheel(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", LOOK_INSIDE]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30, check=True
    )
    assert json.loads(done.stdout) == {
        "presets": list(list_presets()),
        "presets_dir": str(installed / "orchestrator" / "presets"),
        "version": atoll.__version__,
    }


def test_wheel_has_every_file_of_the_packages_and_nothing_else(installed: Path) -> None:
    wanted = {"atoll/__init__.py", "atoll/py.typed"} | {
        f"orchestrator/presets/{path.name}" for path in list_presets().values()
    }
    wanted |= {f"orchestrator/topologies/{path.name}" for path in list_topologies().values()}
    for layer in LAYERS:
        files = [path for path in (ROOT / layer).rglob("*") if path.suffix in {".py"} | DATA_SUFFIXES]
        wanted |= {str(path.relative_to(ROOT)) for path in files}
    found = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    found = {name for name in found if ".dist-info/" not in name and not name.endswith((".whl", ".pyc"))}
    assert found == wanted


def test_wheel_has_the_command(installed: Path) -> None:
    (entry_points,) = installed.glob("atoll-*.dist-info/entry_points.txt")
    assert "atoll = orchestrator.cli.main:main" in entry_points.read_text()


def test_constraints_pin_everything_that_is_required_and_allow_it() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    declared = project()["project"]
    extras = declared["optional-dependencies"]
    wanted = requirement_names([*declared["dependencies"], *extras["test"], *extras["check"]])
    assert wanted - pins.keys() == set()
    assert [line for line in lines if "+" in line] == [], "a build tag ties the pin to one kind of machine"


def test_core_dependencies_are_those_that_were_agreed() -> None:
    agreed = "ray torch numpy pyarrow click pydantic rich safetensors tokenizers blake3 aiohttp".split()
    assert requirement_names(project()["project"]["dependencies"]) == set(agreed)
    adr = (ROOT / "docs" / "adr" / "0001-dependencies.md").read_text(encoding="utf-8")
    named = requirement_names([r for extra in project()["project"]["optional-dependencies"].values() for r in extra])
    missing = [name for name in {*agreed, *named} - {"atoll"} if f"`{name}`" not in adr]
    assert missing == []
