from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.config import RunConfig, config_schema, list_presets, load_config, parse_config
from orchestrator.config_errors import allowed_values, dotted_keys
from orchestrator.errors import ClusterUnreachable, UserError
from workers.config import DataConfig, TrainConfig

MINIMAL = '[data]\ncorpus = "stdlib"\n'


def load_demo(*overrides: str) -> RunConfig:
    return load_config("demo", overrides=overrides).config


def complaint(*overrides: str, run: str = "demo") -> UserError:
    with pytest.raises(UserError) as caught:
        load_config(run, overrides=overrides)
    return caught.value


def test_presets_are_the_documented_ones() -> None:
    strategies = [
        "async-dn", "decoupled", "delayed", "diloco", "eager", "gossip", "muloco", "noloco", "sparseloco", "streaming",
        "swarm", "swarm-diloco",
    ]  # fmt: skip
    assert list(list_presets()) == sorted(["ddp", "debug", "demo", "robust", "storm", *strategies])


@pytest.mark.parametrize("name", list_presets())
def test_preset_loads_is_named_after_its_file_and_survives_a_round_trip(name: str) -> None:
    loaded = load_config(name)
    assert loaded.config.run.name == name
    assert parse_config(loaded.config.to_toml()).config == loaded.config
    assert parse_config(loaded.to_toml()).config == loaded.config
    assert RunConfig.model_validate_json(loaded.config.model_dump_json()) == loaded.config


def test_ddp_preset_is_the_baseline_of_diloco() -> None:
    diloco, ddp = load_config("diloco").config, load_config("ddp").config
    assert (diloco.train, diloco.data, diloco.model, diloco.eval) == (ddp.train, ddp.data, ddp.model, ddp.eval)


def test_short_presets_say_why_their_momentum_is_small() -> None:
    demo = load_demo()
    assert (demo.strategy.outer_lr, demo.strategy.outer_momentum) == (0.9, 0.5)
    assert "2,000 steps" in list_presets()["demo"].read_text()


def test_every_key_has_a_description() -> None:
    schema = config_schema()
    keys = [(name, key, text) for name, part in schema["$defs"].items() for key, text in part["properties"].items()]
    assert len(keys) > 60
    assert [(name, key) for name, key, text in keys if not text.get("description")] == []
    json.dumps(schema)


def test_origin_of_each_value(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[data]\ncorpus = "stdlib"\n\n[train]\nlr = 1e-4\n')
    loaded = load_config(path, overrides=["train.batch_size=4", "model.dim=64"])
    assert loaded.origins["train.lr"] == f"{path}:5"
    assert loaded.origins["data.corpus"] == f"{path}:2"
    assert loaded.origins["train.batch_size"] == "--set train.batch_size=4"
    assert loaded.origins["train.beta1"] == "default"
    assert loaded.origins["run.name"] == f"name of {path}"
    assert loaded.config.run.name == "mine"
    assert set(loaded.origins) == set(dotted_keys(RunConfig))
    assert re.search(rf"^lr = 0.0001 +# {re.escape(str(path))}:5$", loaded.to_toml(), re.MULTILINE)


def test_a_file_whose_name_is_no_run_name_still_loads(tmp_path: Path) -> None:
    path = tmp_path / ".my run!.toml"
    path.write_text(MINIMAL)
    assert load_config(path).config.run.name == "my-run-"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.tokens=1_000", "train", "tokens", 1000),
        ("train.lr=1e-3", "train", "lr", 1e-3),
        ("train.lr=1", "train", "lr", 1.0),
        ("codec.error_feedback=true", "codec", "error_feedback", True),
        ("codec.name=bf16", "codec", "name", "bf16"),
        ('codec.name="bf16"', "codec", "name", "bf16"),
        ("data.path=/some where/text=1", "data", "path", "/some where/text=1"),
        ("run.name=2026-11-20", "run", "name", "2026-11-20"),
        ("run.islands=auto", "run", "islands", "auto"),
        ("run.islands=2", "run", "islands", 2),
        (" train.seed = 5", "train", "seed", 5),
        ("model.factory=my_models.conv:build", "model", "factory", "my_models.conv:build"),
    ],
)
def test_set_takes_toml_or_text(override: str, section: str, key: str, value: Any) -> None:
    found = getattr(getattr(load_demo(override), section), key)
    assert found == value
    assert type(found) is type(value)


def test_a_later_set_wins_and_an_empty_one_goes_back_to_the_default() -> None:
    assert load_demo("train.lr=0.5", "train.lr=0.25").train.lr == 0.25
    assert load_demo("train.lr=0.5", "train.lr=").train.lr == TrainConfig.model_fields["lr"].default


def test_set_reaches_into_tables() -> None:
    config = load_demo("train.per_island.island-1.threads=2", "train.per_island.island-1.batch_size=4")
    assert config.train.for_island("island-1").threads == 2
    assert config.train.for_island("island-1").batch_size == 4
    assert config.train.for_island("island-0") == config.train.model_copy(update={"per_island": {}})
    assert parse_config(config.to_toml()).config == config
    options = load_demo("model.factory=a.b:c", "model.options.width=3", "model.options.deep.x=[1, 2]").model.options
    assert options == {"width": 3, "deep": {"x": [1, 2]}}


def test_data_path_takes_the_place_of_the_presets_corpus() -> None:
    loaded = load_config("demo", overrides=["data.path=packs/mine"])
    assert (loaded.config.data.path, loaded.config.data.corpus) == ("packs/mine", None)
    assert loaded.origins["data.corpus"] == "unset by --set data.path=packs/mine"


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("train.lrr=1", "train.lr"),
        ("trian.lr=1", "train"),
        ("tokens=5", "train.tokens"),
        ("inner_steps=5", "strategy.inner_steps"),
        ("train.inner_steps=5", "strategy.inner_steps"),
        ("train.innersteps=5", "strategy.inner_steps"),
        ("codec.errorfeedback=true", "codec.error_feedback"),
        ("train.per_island.island-1.thread=2", "train.per_island.island-1.threads"),
        ("qqq.zzz=1", f"one of {', '.join(RunConfig.model_fields)}"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(override: str, remedy: str) -> None:
    error = complaint(override)
    assert "unknown" in error.message
    assert repr(override.partition("=")[0].split(".")[-1]) in error.message or "section" in error.message
    assert (error.place, error.remedy) == (f"--set {override}", remedy)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=0", "train.lr = 0 is not allowed: it takes a number above 0 up to 10"),
        ("train.lr=abc", 'train.lr = "abc" is not allowed: it takes a number above 0 up to 10'),
        ("train.lr=nan", "train.lr = nan is not allowed"),
        ("train.lr=true", "train.lr = true is not allowed"),
        ("train.tokens=1e6", "train.tokens = 1000000.0 is not allowed: it takes an integer from 1"),
        ("train.beta1=1", "train.beta1 = 1 is not allowed: it takes a number from 0 below 1"),
        ("codec.name=int9", 'codec.name = "int9" is not allowed: it takes one of fp32, bf16, int8'),
        ("run.islands=0", "run.islands = 0 is not allowed: it takes an integer from 1 up to 4096 or 'auto'"),
        ("run.replace=1", "run.replace = 1 is not allowed: it takes true or false"),
        ("train=5", "train = 5: train is a table of settings"),
        ("train.batch_size={a=1}", "train.batch_size = { a = 1 } is not allowed: it takes an integer"),
        ("train.lr.x=1", "lr is a value, it has no key 'x'"),
        ("train.device=gpu", 'train.device = "gpu" is not allowed'),
        ("model.factory=nocolon", 'model.factory = "nocolon" is not allowed'),
        ("data.digest=xyz", 'data.digest = "xyz" is not allowed'),
        ("train.per_island.island-1.threads=0", "train.per_island.island-1.threads = 0 is not allowed"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_range(override: str, message: str) -> None:
    error = complaint(override)
    assert error.message.startswith(message)
    assert error.place == f"--set {override}"


def test_a_number_for_a_name_is_answered_with_the_quotes_to_use() -> None:
    remedy = complaint("run.name=2026").remedy
    assert remedy is not None
    quoted = re.search(r"--set '([^']+)'", remedy)
    assert quoted is not None
    assert load_demo(quoted[1]).run.name == "2026"


def test_several_wrong_values_are_all_named() -> None:
    message = complaint("codec.name=x", "train.lr=-1", "train.tokens=0").message
    assert message.startswith("train.tokens = 0")
    assert "(and wrong as well: train.lr, codec.name)" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.corpus="], "neither data.path nor data.corpus is set"),
        (["data.path=x", "data.corpus=stdlib"], "are both set"),
        (["model.heads=3"], "model.heads = 3 does not divide model.dim = 128"),
        (["model.heads=128"], "model.dim / model.heads = 1 is odd"),
        (["model.kv_heads=3"], "model.kv_heads = 3 does not divide model.heads = 4"),
        (["model.options.a=1"], "model.factory, which is not set"),
        (["model.factory=a:b", "model.init_from=x"], "belongs to the built-in model"),
        (["train.accumulation=3"], "train.accumulation = 3 does not divide train.batch_size = 8"),
        (["train.per_island.island-1.accumulation=3"], "does not divide train.batch_size = 8 for island-1"),
        (["train.per_island.island-3.threads=1"], "the run has no island of this name"),
        (["train.per_island.first.threads=1"], "the run has no island of this name"),
        (["exchange.min_members=4"], "exchange.min_members = 4 is more than run.islands = 3"),
        (["strategy.name=ddp"], "strategy.inner_steps = 20, but strategy.name = 'ddp'"),
        (["strategy.name=ddp", "strategy.inner_steps=1", "strategy.warmup_sync=0.1"], "has no meaning"),
        (["strategy.name=ddp", "strategy.inner_steps=1", "train.optimizer=muon"], "is not available"),
        (["exchange.suspect_s=0.1"], "exchange.suspect_s = 0.1 is not longer than exchange.heartbeat_s = 0.5"),
        (["exchange.limbo_s=2"], "exchange.limbo_s = 2 is not longer than exchange.suspect_s = 2.5"),
        (["run.redundancy=buddy", "run.islands=1"], "has nobody who could keep a copy"),
        (["exchange.chunk_values=100"], "is no multiple of codec.block = 4096"),
        (["robust.history=true"], "robust.rule = 'mean' does not begin from anything"),
        (["robust.clip_times=2"], "robust.rule = 'mean' shortens nothing"),
        (["robust.rule=clip", "robust.clip_times=5"], "is above robust.refuse_times = 4"),
        (
            ["robust.rule=centered_clip", "robust.history=true", "strategy.outer=average"],
            "which strategy.outer = 'average' has none of",
        ),
        (
            ["robust.rule=centered_clip", "robust.history=true", "strategy.outer_momentum=0"],
            "which strategy.outer_momentum = 0 has none of",
        ),
    ],
)
def test_settings_that_do_not_fit(overrides: list[str], message: str) -> None:
    error = complaint(*overrides)
    assert message in error.message
    assert error.remedy
    assert error.place is not None
    assert error.place.startswith(("--set", "preset demo"))


def test_settings_that_do_not_fit_are_refused_in_python_too() -> None:
    with pytest.raises(ValidationError, match=r"neither data\.path nor data\.corpus is set; try data\.corpus"):
        RunConfig()
    assert RunConfig(data=DataConfig(corpus="stdlib")).train.lr == 1e-3


def test_with_values_checks_like_a_file() -> None:
    demo = load_demo()
    assert demo.with_values({"data.digest": "ab" * 16}).data.digest == "ab" * 16
    with pytest.raises(UserError, match=r"model.heads = 3 does not divide"):
        demo.with_values({"model.heads": 3})
    with pytest.raises(UserError, match="unknown key 'head'"):
        demo.with_values({"model.head": 3})


@pytest.mark.parametrize(
    ("run", "message", "remedy"),
    [
        ("dmeo", "no preset, file or run directory is called 'dmeo'", "demo (presets are"),
        ("nowhere/at/all.toml", "is called 'nowhere/at/all.toml'", "the path of a TOML file"),
    ],
)
def test_a_run_that_is_not_there(run: str, message: str, remedy: str) -> None:
    error = complaint(run=run)
    assert message in error.message
    assert error.remedy is not None
    assert remedy in error.remedy


def test_broken_files_are_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[train]\nlr = \n")
    error = complaint(run=str(path))
    assert "line 2" in error.message
    assert error.place == str(path)
    path.write_bytes(b"\xff\xfe")
    assert "cannot read" in complaint(run=str(path)).message
    path.write_text('[data]\ncorpus = "stdlib"\n[train]\nlr = 0.1\nbatchsize = 3\n')
    assert (complaint(run=str(path)).place, complaint(run=str(path)).remedy) == (f"{path}:5", "train.batch_size")
    path.write_text("tokens = 5\n")
    assert (complaint(run=str(path)).place, complaint(run=str(path)).remedy) == (f"{path}:1", "train.tokens")


@pytest.mark.parametrize("override", ["train.lr", "=1", ".lr=1", "train.=1"])
def test_a_malformed_set_is_refused(override: str) -> None:
    assert "is not of the form section.key=value" in complaint(override).message


def test_a_run_directory_is_a_configuration(tmp_path: Path) -> None:
    config = load_demo("train.seed=9")
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert load_config(tmp_path).config == config


def test_values_that_toml_cannot_hold_are_refused() -> None:
    config = load_demo("model.factory=a:b").with_values({"model.options": {"thing": object()}})
    with pytest.raises(UserError, match=r"model.options: TOML cannot hold"):
        config.to_toml()


@given(
    lr=st.floats(min_value=1e-30, max_value=10, exclude_min=True),
    tokens=st.integers(min_value=1, max_value=2**62),
    seed=st.integers(min_value=0, max_value=2**63 - 1),
    path=st.text(min_size=1, alphabet=st.characters(codec="utf-8")),
    options=st.dictionaries(
        st.text(max_size=5, alphabet=st.characters(codec="utf-8")),
        st.recursive(
            st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(alphabet=st.characters(codec="utf-8")),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=5,
        ),
        max_size=3,
    ),
)
def test_any_configuration_survives_a_round_trip(
    lr: float, tokens: int, seed: int, path: str, options: dict[str, Any]
) -> None:
    values = {"train.lr": lr, "train.tokens": tokens, "train.seed": seed, "model.factory": "a:b"}
    config = load_demo("data.path=x").with_values({**values, "model.options": options, "data.path": path})
    assert parse_config(config.to_toml()).config == config


def test_allowed_values_are_described_for_every_key() -> None:
    for section, field in RunConfig.model_fields.items():
        model = field.annotation
        assert model is not None
        for key in model.model_fields:
            described = allowed_values(model, key)
            assert described and "another type" not in described, f"{section}.{key}"


def test_errors_survive_pickling_with_their_exit_code() -> None:
    error = ClusterUnreachable("no answer", place="run.address", remedy="ray start --head")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ClusterUnreachable
    assert (again.message, again.place, again.remedy, again.exit_code) == ("no answer", error.place, error.remedy, 4)
    assert str(again) == "no answer (place: run.address; try: ray start --head)"
