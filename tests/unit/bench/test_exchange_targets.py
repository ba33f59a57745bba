"""What the exchange benchmark calls a miss, and one exchange of it in small."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import exchange
from strategies.config import CodecConfig
from strategies.registry import build_codec

GOOD: dict[str, Any] = {
    "place": "two-regions", "codec": "fp32", "params": 50_000_000, "of_optimum": 0.95, "of_flight": 0.9,
    "over_gloo": 6.0, "over_formula": 0.01,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, []),
        ({"of_optimum": 0.89}, ["of_optimum 0.89 < 0.9"]),
        ({"over_gloo": 4.9}, ["over_gloo 4.9 < 5.0"]),
        ({"params": 200_000_000, "over_gloo": 5.5}, ["over_gloo 5.5 < 6.0"]),
        ({"codec": "int4", "over_gloo": 14.0}, ["over_gloo 14.0 < 15.0"]),
        ({"place": "loopback", "over_gloo": 0.6}, []),
        ({"place": "loopback", "over_gloo": 0.4}, ["over_gloo 0.4 < 0.5"]),
        ({"place": "slow-pair", "of_flight": 0.9}, ["of_flight 0.9 < 0.93"]),
        ({"over_formula": -0.03}, ["payload bytes differ from the formula by -3.0 %"]),
        ({"params": 1000, "over_gloo": 0.1, "over_formula": 0.5}, []),
    ],
)
def test_a_missed_target_is_named(changed: dict[str, Any], told: list[str]) -> None:
    assert exchange.missed({**GOOD, **changed}) == told


def test_formula_is_that_of_the_codecs() -> None:
    for name, bits in exchange.BITS.items():
        codec = build_codec(CodecConfig.model_validate({"name": name}))
        assert 8 * codec.num_bytes(1 << 24) / (1 << 24) == pytest.approx(bits, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_one_small_exchange_on_loopback() -> None:
    with exchange.nodes_of("loopback") as nodes:
        found = exchange.measure_exchange(nodes, "int8", 1 << 20, 2)
    assert len(found["seconds"]) == 2 and all(0 < seconds < 60 for seconds in found["seconds"])
    assert found["bytes_per_param"] == pytest.approx(exchange.BITS["int8"] / 8, rel=0.02)
