"""The planner: its bytes are those that a run sends, its memory those that were measured, every preset has a cost."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli.plan import plan as plan_command
from orchestrator.config import list_presets, load_config, parse_config
from orchestrator.errors import UserError
from orchestrator.local import LocalRun
from orchestrator.metrics import ExchangeRow, read_rows
from orchestrator.planner import COSTS, GOOD_UTILISATION, WHOLE_ROUND, Case, choose, cost_of, entry_of, steps_for
from orchestrator.planning import (
    EXAMPLES,
    Plan,
    case_of,
    curves,
    island_presets,
    make_plan,
    markdown,
    round_bytes,
    sentence,
)
from orchestrator.quantities import parse_count, parse_rate, parse_seconds, show_bytes, show_rate, show_seconds
from strategies.config import StrategyConfig
from tests.small_run import make_pack, small_config

ROOT = Path(__file__).resolve().parents[3]
CASE = Case(num_params=1_200_000_000, num_islands=4, link_bit_per_s=200e6, rtt_s=0.08, step_s=0.9)


def test_every_preset_and_every_strategy_has_a_cost() -> None:
    for name in list_presets():
        config = load_config(name).config
        assert config.strategy.name in COSTS, f"{name}: one entry in COSTS of orchestrator/planner.py is missing"
        cost = cost_of(name, config, CASE)
        assert 0 < cost.utilisation <= 1 and cost.memory_bytes > 0
    known = set(StrategyConfig.model_json_schema()["properties"]["name"]["enum"])
    assert known <= set(COSTS), "a strategy without a cost cannot be planned for"
    assert set(list_presets()) >= EXAMPLES


def test_a_strategy_without_an_entry_is_named() -> None:
    strategy = StrategyConfig().model_copy(update={"name": "new"})
    with pytest.raises(UserError, match=r"'new' has no entry"):
        entry_of(load_config("diloco").config.model_copy(update={"strategy": strategy}))


@pytest.mark.parametrize(
    ("islands", "values"),
    [
        (2, ("codec.name=fp32",)),
        (3, ("codec.name=int8", "codec.block=64")),
        (3, ("codec.name=topk", "codec.block=1024")),
        (2, ("codec.name=int4", "strategy.num_fragments=2", "model.layers=2")),
        (3, ("strategy.name=ddp", "strategy.inner_steps=1")),
        (3, ("codec.name=int8", "codec.block=64", "robust.verify=true")),
    ],
    ids=["fp32", "int8", "topk", "fragments", "ddp", "verify"],
)
def test_bytes_are_those_that_a_run_sends(tmp_path: Path, islands: int, values: tuple[str, ...]) -> None:
    changes = (f"run.islands={islands}", "train.tokens=2560", "strategy.inner_steps=4", "exchange.copies=1", *values)
    config = small_config(make_pack(tmp_path), *changes)
    run = LocalRun(config, tmp_path / "run")
    run.start()
    finished = run.run(max_turns=3000)
    run.close()
    assert finished is not None and finished.reason == "done"
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if isinstance(row, ExchangeRow)]
    whole = [row for row in rows if len(row.roster) == islands and row.attempts == 1]
    fragments = config.strategy.num_fragments
    # From the second round on: what members fetch when they join is counted with the first.
    later = [row for row in whole if row.version > 1][: 2 * fragments]
    assert len(later) == 2 * fragments, "no two rounds with everybody"
    case = case_of(run.config, num_islands=islands, link_bit_per_s=1e9, rtt_s=0.0, step_s=1.0)
    cost = cost_of("run", run.config, case)
    sent = sum(row.bytes for row in later) / 2 / islands
    assert sent == pytest.approx(cost.bytes_per_round, rel=0.02)


def test_memory_is_what_was_measured() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())
    for codec in ("int8", "fp32"):
        config = parse_config(f"[data]\ncorpus='stdlib'\n[codec]\nname='{codec}'").config
        cost = cost_of(codec, config, replace(CASE, num_params=found["params"], num_islands=2))
        bare = 4 * 4 * found["params"]  # parameters, gradients, two moments: they are in the bare loop as well
        more = found[codec]["island_mb"] * 1e6 - found["bare_pss_bytes"]
        assert cost.memory_bytes - bare == pytest.approx(more, rel=0.1)


def test_formulas_of_the_exchange() -> None:
    config = load_config("diloco").config
    cost = cost_of("diloco", config, CASE)
    # 2 (M - 1) / M of one byte a value, and a scale for each 4,096 of them.
    assert cost.bytes_per_round == pytest.approx(1.5 * CASE.num_params * (1 + 4 / 4096), rel=1e-4)
    assert cost.round_s == pytest.approx(100 * 0.9 + cost.exchange_s)
    assert cost.exchange_s == pytest.approx(5 * 0.08 + 8 * cost.bytes_per_round / (0.92 * 200e6) + 4.8)
    assert cost.needs_bit_per_s == pytest.approx(8 * cost.bytes_per_round / 90)
    alone = cost_of("diloco", config, replace(CASE, num_islands=1))
    assert alone.bytes_per_round == 0 and alone.utilisation == 1.0
    far = cost_of("diloco", config, replace(CASE, rtt_s=0.5, link_bit_per_s=10e9))
    assert far.window_bound and not cost.window_bound


@pytest.mark.parametrize("name", sorted(WHOLE_ROUND))
def test_what_is_hidden_behind_computing_is_not_waited_for(name: str) -> None:
    config = load_config("diloco").config
    hidden = config.model_copy(update={"strategy": config.strategy.model_copy(update={"name": name})})
    fast = replace(CASE, link_bit_per_s=1e9)
    blocking, cost = cost_of("blocking", config, fast), cost_of(name, hidden, fast)
    assert cost.bytes_per_round == blocking.bytes_per_round and cost.exchange_s == blocking.exchange_s
    assert cost.utilisation == 1.0 > blocking.utilisation
    # A link that cannot carry a round's bytes in a round is waited for all the same.
    slow = cost_of(name, hidden, replace(CASE, link_bit_per_s=20e6))
    assert slow.utilisation < 0.2 and slow.round_s >= 8 * slow.bytes_per_round / 20e6


def test_more_bandwidth_never_hurts_and_more_steps_help() -> None:
    for points in curves(CASE, {}).values():
        shares = [share for _, share in points]
        assert shares == sorted(shares) and shares[-1] <= 1
    config = load_config("diloco").config
    cost = cost_of("diloco", config, CASE)
    steps = steps_for(cost, CASE)
    enough = cost_of("diloco", config.with_values({"strategy.inner_steps": steps}), CASE)
    fewer = cost_of("diloco", config.with_values({"strategy.inner_steps": steps - 2}), CASE)
    assert fewer.utilisation < GOOD_UTILISATION <= enough.utilisation


def test_the_choice_departs_no_further_than_the_link_demands() -> None:
    fast = replace(CASE, num_params=1_000_000, link_bit_per_s=100e9, rtt_s=1e-4)
    assert make_plan(fast, {}).start_from == "ddp"
    made = make_plan(replace(CASE, num_params=10_000_000), {})
    assert made.start_from not in EXAMPLES | {"ddp"}
    rows = {row.preset: row for row in made.rows}
    assert rows[made.start_from].utilisation >= GOOD_UTILISATION
    slow = [cost_of(name, load_config(name).config, replace(CASE, link_bit_per_s=1e5)) for name in ("ddp", "diloco")]
    assert choose(slow).preset == "diloco"


def test_a_preset_that_does_not_fit_is_named_and_the_rest_is_planned() -> None:
    config = parse_config(
        "[data]\ncorpus='stdlib'\n[model]\nlayers=2\n[strategy]\nnum_fragments=5\ninner_steps=100"
    ).config
    case = case_of(config, num_islands=2, link_bit_per_s=1e8, rtt_s=0.01, step_s=0.1)
    made = make_plan(case, {"mine": config})
    assert "the model has 2 layers" in made.misfits["mine"] and made.start_from in list_presets()
    assert "mine" not in curves(case, {"mine": config})


def test_the_command(tmp_path: Path) -> None:
    asked = "--params 1.2e9 --islands 4 --link 200Mbit --rtt 80ms --step 0.9s".split()
    plot = tmp_path / "plan.svg"
    done = CliRunner().invoke(plan_command, [*asked, "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("1.2 G parameters on 4 islands, 200 Mbit/s and 80 ms round trip")
    assert "start from " in done.output and " 100 %" in done.output
    for name in island_presets():
        assert f"\n{name} " in done.output
    drawing = ET.fromstring(plot.read_text())
    names = {title.text for title in drawing.iter("{http://www.w3.org/2000/svg}title")}
    assert names == set(island_presets()) - EXAMPLES
    answer = CliRunner().invoke(plan_command, [*asked, "--json"])
    assert Plan.model_validate_json(answer.output).params == 1_200_000_000


def test_the_command_reads_step_and_islands_from_a_run(tmp_path: Path) -> None:
    run = LocalRun(small_config(make_pack(tmp_path), "run.islands=2", "train.tokens=1920"), tmp_path / "run")
    run.start()
    (tmp_path / "run" / "config.toml").write_text(run.config.to_toml())
    run.run(max_turns=2000)
    run.close()
    done = CliRunner().invoke(plan_command, [str(tmp_path / "run"), "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    made = Plan.model_validate_json(done.output)
    assert made.islands == 2 and made.step_s > 0 and "this run" in {row.preset for row in made.rows}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["diloco", "--islands", "2"], "how long one inner step takes"),
        (["diloco", "--step", "1s"], "number of islands is not known"),
        (["--params", "1e9", "--step", "1s", "--islands", "2", "--link", "fast"], "'fast' is not a positive quantity"),
        (["--params", "1e9", "--step", "0s", "--islands", "2"], "'0s' is not a positive quantity"),
        (["demo", "--step", "1s", "--set", "model.factory=a:b"], "known when it is built"),
    ],
)
def test_what_is_missing_is_said(arguments: list[str], complaint: str) -> None:
    done = CliRunner().invoke(plan_command, arguments)
    assert isinstance(done.exception, UserError) and complaint in str(done.exception)


def test_quantities() -> None:
    assert parse_count("350M", place="x") == 350_000_000 and parse_count("1.2e9", place="x") == 1_200_000_000
    assert parse_rate("200Mbit", place="x") == parse_rate("25MB/s", place="x") == 200e6
    assert parse_seconds("80ms", place="x") == pytest.approx(0.08) and parse_seconds("2min", place="x") == 120
    assert show_bytes(25_800_000) == "25.8 MB" and show_rate(999.7) == "1 kbit/s" and show_seconds(0.004) == "4 ms"
    assert sentence(25_800_000, 90) == "synchronising 25.8 MB every 90 s: needs 2.29 Mbit/s at each island"


def test_bytes_of_a_model_that_is_not_the_built_in_one() -> None:
    config = load_config("diloco").config.with_values({"model.factory": "mine:build"})
    assert round_bytes(config, num_islands=2) is None
    assert round_bytes(config, num_islands=2, num_params=4096) == 4096 + 16 + 4
    assert round_bytes(config, num_islands=1, num_params=4096) is None


def test_the_table_for_documents_has_every_preset_but_the_examples() -> None:
    text = markdown(make_plan(CASE, {}))
    rows = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")} - {"preset", "---"}
    assert rows == set(island_presets()) - EXAMPLES
