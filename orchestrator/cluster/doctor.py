"""Checks whether this machine can be in a cluster, one after the other, each with what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from orchestrator.cluster import door_client
from orchestrator.cluster.door_client import ClusterInfo
from orchestrator.cluster.join_string import JoinString
from orchestrator.cluster.preflight import check_gcs, check_way_back
from orchestrator.cluster.versions import disagreements, my_versions
from orchestrator.errors import ClusterUnreachable, UserError
from strategies.codecs.backends import REMEDY, resolve_backend

TRANSFER_BYTES = 64 * 1024 * 1024
CLOCK_S = 5.0
SLOW_MBIT = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """What one check found.

    Attributes:
        ok: False where the machine cannot take part.
        remedy: what to do, empty if there is nothing to do.
    """

    name: str
    ok: bool
    found: str
    remedy: str = ""


def examine(place: JoinString) -> Iterator[Check]:
    """All checks; those that need what an earlier one did not find are left out."""
    try:
        info = door_client.visit(place)
    except UserError as error:
        reached = not isinstance(error, ClusterUnreachable)
        if reached:
            yield Check(name="door", ok=True, found=place.door)
        yield Check(name="token" if reached else "door", ok=False, found=error.message, remedy=error.remedy or "")
        return
    yield Check(name="door", ok=True, found=f"{place.door}, {1000 * info.round_trip_s:.1f} ms")
    yield Check(name="token", ok=True, found="the same on both sides")
    yield _versions(info)
    yield _attempt("Ray", lambda: check_gcs(place, info), info.gcs_address)
    yield _attempt("way back", lambda: check_way_back(place, info), f"to {info.my_address}")
    yield check_codecs()
    yield _clock(info)
    yield _speed(place)


def _versions(info: ClusterInfo) -> Check:
    mine = my_versions()
    different = disagreements(mine, info.versions)
    found = "; ".join(different) or f"Python {mine.python}, Ray {mine.ray}, Atoll {mine.atoll}"
    remedy = "install the same versions on all machines" if different else ""
    return Check(name="versions", ok=not different, found=found, remedy=remedy)


def _attempt(name: str, check: Callable[[], None], found: str) -> Check:
    try:
        check()
    except (UserError, OSError) as error:
        message, remedy = getattr(error, "message", str(error)), getattr(error, "remedy", None)
        return Check(name=name, ok=False, found=message, remedy=remedy or "")
    return Check(name=name, ok=True, found=found)


def check_codecs() -> Check:
    """Which form of the codecs runs here; the torch form does the same, several times slower, and fails nothing."""
    backend, warning = resolve_backend("auto")
    if warning is None:
        return Check(name="codecs", ok=True, found=f"compiled ({backend})")
    return Check(name="codecs", ok=True, found=f"{backend} form, several times slower", remedy=REMEDY)


def _clock(info: ClusterInfo) -> Check:
    offset_s, doubt_s = info.clock_offset_s, info.round_trip_s / 2
    found = f"{offset_s:+.3f} s there, to within {doubt_s:.3f} s"
    if abs(offset_s) - doubt_s <= CLOCK_S:
        return Check(name="clock", ok=True, found=found)
    # No decision compares two clocks, so this fails nothing.
    return Check(name="clock", ok=True, found=found, remedy="logs of the two will not line up: turn on NTP")


def _speed(place: JoinString) -> Check:
    try:
        mbit = door_client.measure_link(place, TRANSFER_BYTES) * 8 / 1e6
    except UserError as error:
        return Check(name="link", ok=False, found=error.message, remedy=error.remedy or "")
    remedy = "" if mbit >= SLOW_MBIT else "slow: choose a codec with few bits, and long rounds"
    return Check(
        name="link", ok=True, found=f"{mbit:,.0f} Mbit/s from there to here over one connection", remedy=remedy
    )
