"""The module `atoll`: cheap to import, complete, and strict about configurations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import atoll
from orchestrator.config import flatten, make_config
from orchestrator.own_loop import script_config

HEAVY = ("torch", "ray", "pydantic", "numpy", "pyarrow", "rich", "click")


def test_importing_atoll_imports_nothing_heavy() -> None:
    code = f"import sys, atoll; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "[]"


def test_everything_public_is_there_and_documented() -> None:
    assert sorted(atoll.__all__) == dir(atoll)
    for name in atoll.__all__:
        value = getattr(atoll, name)
        assert name in ("Config", "__version__") or value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Iland'"):
        _ = atoll.Iland
    for name in ("batches", "samples", "step", "stop", "progress", "name", "num_islands", "run_dir", "summary"):
        assert getattr(atoll.Island, name).__doc__


def test_a_configuration_from_a_preset_a_file_values_and_itself(tmp_path: Path) -> None:
    preset = atoll.load_config("demo")
    (tmp_path / "my.toml").write_text(preset.to_toml())
    assert atoll.load_config(tmp_path / "my.toml") == preset == atoll.load_config(preset)
    changed = atoll.load_config("demo", {"train.tokens": 77, "data": {"path": tmp_path}})
    assert (changed.train.tokens, changed.data.path, changed.data.corpus) == (77, str(tmp_path), None)
    assert changed.strategy == preset.strategy
    values = atoll.load_config({"data.corpus": "stdlib", "train": {"lr": 0.5}}, {"train.tokens": 3})
    assert (values.train.lr, values.train.tokens) == (0.5, 3)
    own = make_config({"data.samples": 10}, base=preset)
    assert (own.data.samples, own.data.corpus) == (10, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train.tokns": 3}, r"unknown key 'tokns' in \[train\].*configuration that was given.*train\.tokens"),
        ({"tokens": 3}, r"unknown section or key 'tokens'.*train\.tokens"),
        ({"train.tokens": 1e6}, r"train\.tokens = 1000000\.0 is not allowed: it takes an integer"),
        ({"data.path": "a", "data.samples": 5}, r"data\.path = 'a' and data\.samples = 5 are both set"),
        ({"data.path": "a", "data.samples": 5, "data.corpus": "stdlib"}, "are all set"),
        ({"data": {"corpus": None}}, r"neither data\.path nor data\.corpus is set.*data\.samples"),
    ],
)
def test_values_that_are_wrong(values: dict[str, object], message: str) -> None:
    with pytest.raises(atoll.UserError, match=message):
        atoll.load_config("demo", values)


def test_ways_to_write_values_meet() -> None:
    assert flatten({"train": {"lr": 1, "tokens": 2}, "train.lr": 3}) == {"train.lr": 3, "train.tokens": 2}
    config = script_config({"train": {"per_island": {"island-0": {"threads": 2}}}}, num_samples=8)
    assert config.train.for_island("island-0").threads == 2
    assert (config.run.islands, config.data.samples) == (1, 8)


def test_data_of_the_loop_needs_a_loop() -> None:
    with pytest.raises(atoll.UserError, match=r"data\.samples = 9: .*train\.loop is not set"):
        atoll.train({"data.samples": 9})


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ("no_such_module:main", "train.loop = 'no_such_module:main': looked for the module 'no_such_module'"),
        ("tests.own_loops:train_image", "nothing of that name; did you mean 'train_images'"),
        ("tests.own_loops:images", "it is called without arguments, but its signature is"),
    ],
)
def test_a_loop_that_is_not_there_is_noticed_before_ray_starts(loop: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(atoll.LoopError, match=message):
        atoll.train({"data.samples": 9, "train.loop": loop, "run.islands": 1}, tmp_path / "run", quiet=True)
