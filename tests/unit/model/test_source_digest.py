"""The code of a run is the same on every machine, or is refused there."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.config import ModelConfig
from workers.model.errors import ModelError
from workers.model.factory import build_model
from workers.source import SourceChanged, check_source, source_digest

FACTORY = "import torch\nfrom own_layers import WIDTH\n\n\ndef build(options):\n    return torch.nn.Linear(WIDTH, 2)\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder with a module, one that it imports, one that it does not, and a package."""
    (tmp_path / "own_model.py").write_text(FACTORY)
    (tmp_path / "own_layers.py").write_text("WIDTH = 3\n")
    (tmp_path / "own_notes.py").write_text("")
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("")
    (tmp_path / "own_package" / "loop.py").write_text("from . import parts\nfrom .deep.more import x\n")
    (tmp_path / "own_package" / "parts.py").write_text("import own_notes\n")
    (tmp_path / "own_package" / "deep").mkdir()
    (tmp_path / "own_package" / "deep" / "more.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        if name in ("own_model", "own_layers", "own_notes") or name.startswith("own_package"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("function", "file", "counts"),
    [
        ("own_model:build", "own_model.py", True),
        ("own_model:build", "own_layers.py", True),
        ("own_model:build", "own_notes.py", False),
        ("own_package.loop:run", "own_package/parts.py", True),
        ("own_package.loop:run", "own_package/deep/more.py", True),
        ("own_package.loop:run", "own_notes.py", False),
    ],
)
def test_what_counts(function: str, file: str, counts: bool, folder: Path) -> None:
    before = source_digest(function)
    assert before is not None and before == source_digest(function)
    with (folder / file).open("a") as out:
        out.write("changed = True\n")
    assert (source_digest(function) != before) == counts


def test_where_the_folder_is_does_not_count(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_digest("own_model:build")
    other = tmp_path / "elsewhere"
    other.mkdir()
    for name in ("own_model.py", "own_layers.py"):
        (other / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setattr(sys, "path", [str(other), *sys.path])
    importlib.invalidate_caches()
    assert source_digest("own_model:build") == before


def test_another_module_is_refused_where_the_model_is_built(folder: Path) -> None:
    digest = source_digest("own_model:build")
    config = ModelConfig(factory="own_model:build", factory_digest=digest)
    assert build_model(config, vocab_size=4, seq_len=4, seed=0).num_params == 8
    (folder / "own_layers.py").write_text("WIDTH = 4\n")
    with pytest.raises(ModelError, match=r"model\.factory = 'own_model:build': own_model is .*own_model\.py here"):
        build_model(config, vocab_size=4, seq_len=4, seed=0)
    with pytest.raises(SourceChanged, match=r"unset train\.loop_digest"):
        check_source("own_model:build", digest, key="train.loop")
