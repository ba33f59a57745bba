"""Numbers as people read them, and ticks where people expect them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.report import format as fmt
from orchestrator.report.html import Markup, data_block, el
from orchestrator.report.scale import Axis, Scale, Unit

UNITS: tuple[Unit, ...] = ("progress", "time", "count", "bytes", "loss", "seconds", "rate", "index")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (fmt.count(0), "0"),
        (fmt.count(999.6), "1 k"),
        (fmt.count(12_345), "12.3 k"),
        (fmt.count(6_123_456), "6.12 M"),
        (fmt.num_bytes(1_500_000), "1.5 MB"),
        (fmt.num_bytes(12), "12 B"),
        (fmt.duration(0.0312), "31.2 ms"),
        (fmt.duration(4.25), "4.25 s"),
        (fmt.duration(59.97), "1 min 00 s"),
        (fmt.duration(92), "1 min 32 s"),
        (fmt.duration(7500), "2 h 05 min"),
        (fmt.duration(200_000), "2 d 7 h"),
        (fmt.clock(92.44), "1:32.4"),
        (fmt.clock(59.97), "1:00.0"),
        (fmt.clock(7500), "2:05:00"),
        (fmt.percent(0.934), "93.4 %"),
        (fmt.ratio(165.2), "165\u00d7"),
        (fmt.ratio(0.5), "0.5\u00d7"),
        (fmt.ratio(12345.0), "12 345\u00d7"),
        (fmt.loss(1.61803), "1.618"),
        (fmt.plural(1, "fault"), "1 fault"),
        (fmt.plural(12, "fault"), "12 faults"),
    ],
)
def test_numbers(text: str, wanted: str) -> None:
    assert text.replace(fmt.NBSP, " ") == wanted


def test_unknown_is_a_dash() -> None:
    for write in (fmt.count, fmt.num_bytes, fmt.loss, fmt.percent, fmt.ratio, fmt.duration, fmt.clock):
        assert write(None) == fmt.UNKNOWN
    assert fmt.ratio(float("inf")) == fmt.UNKNOWN


@given(
    unit=st.sampled_from(UNITS),
    values=st.lists(st.floats(min_value=0, max_value=1e9), max_size=5),
    log=st.booleans(),
    from_zero=st.booleans(),
)
def test_every_axis_has_a_range_and_ticks_inside_it(
    unit: Unit, values: list[float], log: bool, from_zero: bool
) -> None:
    axis = Axis(title="", unit=unit, log=log, from_zero=from_zero and not log)
    low, high = axis.limits(values)
    assert low < high
    ticks = axis.ticks(low, high, target=6)
    assert len(ticks) <= 20
    scale = Scale(low=low, high=high, start_px=0, end_px=100, log=log)
    assert all(-0.01 <= scale(value) <= 100.01 for value, _ in ticks)
    shown = [value for value in values if value > 0 or not log]
    assert all(-0.01 <= scale(value) <= 100.01 for value in shown)


def test_labels_of_small_steps_are_distinct() -> None:
    axis = Axis(title="loss", unit="loss")
    labels = [label for _, label in axis.ticks(1.512, 1.548, target=5)]
    assert len(labels) == len(set(labels)) >= 3


def test_text_is_escaped_and_markup_is_not() -> None:
    assert el("p", "<b>", el("i", "&"), title='"<') == '<p title="&quot;&lt;">&lt;b&gt;<i>&amp;</i></p>'
    assert isinstance(el("p"), Markup)


def test_a_data_block_cannot_end_early() -> None:
    assert "</script>" not in data_block({"name": "</script>"}).removesuffix("</script>")
