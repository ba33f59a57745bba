"""Faults that are asked for: `kind:target@when,option=value`, parsed and checked (pure; a storm's seed is an argument).

    kill:island-1@round=15                  SIGKILL once version 15 of the first fragment is committed
    hang:island-2@t=30s,for=6s              its training thread stands still for 6 s, 30 s into the run
    cut:island-0+island-1@round=5,for=10s   these two cannot fetch from each other
    disk_full@t=20s,for=5s                  the controller's disk
    sign_flip:island-3@round=5,for=60s      it sends wrong updates (also scale, noise, send_nan, inner_product,
                                            little_is_enough, copy_cat), trains on wrong targets (label_flip), or
                                            reduces wrongly for others (lying_owner)
    storm@round=2,rate=240,seed=1           random faults, 240 an hour

A file says the same in tables, `[[fault]]` with `kind`, `target`, `round` or `at_s`, `for_s`, and so on (`TABLE_KEYS`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

CONTROLLER = "controller"
Targets = Literal["member", "link", "place", "nobody", "some"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What a kind of fault may be given.

    Attributes:
        targets: member: one of them; link: one, or two with `+`; place: a member or the controller (default); nobody;
            some: any number (default all).
        options: those that it takes. defaults: of those that are not given.
        ends: whether the incarnation that it hits ends by it.
    """

    targets: Targets
    options: tuple[str, ...] = ()
    defaults: tuple[tuple[str, float], ...] = ()
    ends: bool = False


LABEL_FLIP = "label_flip"
GROSS = ("sign_flip", "scale", "noise", "send_nan", "lying_owner")
STEALTHY = ("inner_product", "little_is_enough", "copy_cat", LABEL_FLIP)
ATTACKS = (*GROSS, *STEALTHY)
"""Wrong updates on purpose (`faults/attacker.py`)."""

KINDS: dict[str, Kind] = {
    "kill": Kind(targets="member", ends=True),
    "oom": Kind(targets="member", ends=True),
    "stop": Kind(targets="member", options=("for_s",), defaults=(("for_s", 5.0),)),
    "hang": Kind(targets="member", options=("for_s",)),
    "slow": Kind(targets="member", options=("for_s", "factor"), defaults=(("factor", 3.0),)),
    "cut": Kind(targets="link", options=("for_s",)),
    "heal": Kind(targets="link"),
    "delay": Kind(targets="member", options=("for_s", "by_s"), defaults=(("by_s", 0.5),)),
    "corrupt": Kind(targets="member", ends=True),
    "nan": Kind(targets="member", ends=True),
    **{attack: Kind(targets="member", options=("for_s",)) for attack in ATTACKS},
    "little_is_enough": Kind(targets="member", options=("for_s", "factor")),
    "disk_full": Kind(targets="place", options=("for_s",), defaults=(("for_s", 5.0),)),
    "clock_jump": Kind(targets="place", options=("by_s",), defaults=(("by_s", 3600.0),)),
    "controller_kill": Kind(targets="nobody"),
    "head_kill": Kind(targets="nobody"),
    "storm": Kind(
        targets="some", options=("for_s", "rate", "seed", "kinds"), defaults=(("rate", 240.0), ("seed", 0.0))
    ),
}
STORM_KINDS = ("kill", "hang", "cut")
IN_STORMS = tuple(
    name for name, kind in KINDS.items() if kind.targets in ("member", "link") and name not in ("heal", *ATTACKS)
)
OPTIONS = {"for": "for_s", "factor": "factor", "by": "by_s", "rate": "rate", "seed": "seed", "kinds": "kinds"}
TABLE_KEYS = ("kind", "target", "round", "at_s", *OPTIONS.values())
_FORM = re.compile(r"(?P<kind>\w+)(?::(?P<target>[^@,\s]+))?(?:@(?P<when>\w+)=(?P<at>[^,\s]+))?(?P<rest>(?:,[^,]+)*)")
_UNITS = {"": 1.0, "s": 1.0, "ms": 1e-3, "m": 60.0, "h": 3600.0}
_EXAMPLE = "kind:target@round=N or @t=30s, for example kill:island-1@round=15"


class FaultPlanError(ValueError):
    """A fault that cannot be understood or names nobody; says what would be right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedFault:
    """One fault: what, to whom, when (after a committed round, or seconds into the run; neither: at once), and how.

    Attributes:
        for_s: how long; None: until it is healed, or for good. factor: how many times slower, or how many deviations.
        by_s: seconds of delay, or by which a clock jumps. rate: of a storm, faults an hour. kinds: of a storm.
    """

    kind: str
    targets: tuple[str, ...] = ()
    round: int | None = None
    at_s: float | None = None
    for_s: float | None = None
    factor: float | None = None
    by_s: float | None = None
    rate: float | None = None
    seed: int | None = None
    kinds: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """Whom it hits, as it is written."""
        return "+".join(self.targets)

    @property
    def what(self) -> str:
        """Kind, target and options, without the time."""
        return f"{self.kind}:{self.target}" if self.targets else self.kind

    def __str__(self) -> str:
        """The form it is written in."""
        when = f"@round={self.round}" if self.round is not None else ""
        if self.at_s is not None:
            when = f"@t={self.at_s:g}s"
        values = {"for": _seconds(self.for_s), "factor": _number(self.factor), "by": _seconds(self.by_s)}
        values |= {"rate": _number(self.rate), "seed": _number(self.seed), "kinds": "+".join(self.kinds)}
        return f"{self.what}{when}" + "".join(f",{key}={value}" for key, value in values.items() if value)

    def is_due(self, version: int, now_s: float) -> bool:
        """Whether its time has come; `version`: newest of the first fragment, `now_s`: seconds into the run."""
        return version >= (self.round or 0) and now_s >= (self.at_s or 0.0)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:g}s"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def parse_fault(text: str, members: Collection[str], *, place: str | None = None) -> PlannedFault:
    """Parse one `--fault`; `members` are the names that exist in the run. Raises FaultPlanError."""
    place = place or f"--fault {text!r}"
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise FaultPlanError(f"{place}: expected {_EXAMPLE}")
    values: dict[str, Any] = {"kind": match["kind"]}
    if match["target"]:
        values["target"] = match["target"]
    if match["when"]:
        values |= _when(match["when"], match["at"], place)
    for part in match["rest"].split(",")[1:]:
        name, separator, value = part.strip().partition("=")
        if not separator or name not in OPTIONS:
            raise FaultPlanError(f"{place}: {part.strip()!r} is no option; known: {', '.join(OPTIONS)}")
        values[OPTIONS[name]] = value
    return read_fault(values, members, place=place)


def _when(word: str, value: str, place: str) -> dict[str, Any]:
    if word == "round" and value.isascii() and value.isdigit():
        return {"round": int(value)}
    if word == "t":
        return {"at_s": value}
    raise FaultPlanError(f"{place}: @{word}={value} is no time; expected {_EXAMPLE}")


def read_fault(values: Mapping[str, Any], members: Collection[str], *, place: str) -> PlannedFault:
    """A fault of a table, or of the parts of a text, checked; `place` is said in errors. Raises FaultPlanError."""
    unknown = sorted(set(values) - set(TABLE_KEYS))
    if unknown:
        raise FaultPlanError(f"{place}: unknown key {unknown[0]!r}; known: {', '.join(TABLE_KEYS)}")
    name = values.get("kind")
    if not isinstance(name, str) or name not in KINDS:
        raise FaultPlanError(f"{place}: unknown kind {name!r}; known: {', '.join(KINDS)}")
    kind = KINDS[name]
    for option in OPTIONS.values():
        if option in values and option not in kind.options:
            taken = ", ".join(key for key, value in OPTIONS.items() if value in kind.options) or "none"
            raise FaultPlanError(f"{place}: {name} takes no {option}; its options: {taken}")
    at_round, at_s = values.get("round"), values.get("at_s")
    if at_round is not None and at_s is not None:
        raise FaultPlanError(f"{place}: give a round or a time, not both")
    if at_round is not None and (type(at_round) is not int or at_round < 0):
        raise FaultPlanError(f"{place}: round = {at_round!r}; a round is a whole number, 0 or more")
    plain = dict(kind.defaults) | {key: values[key] for key in OPTIONS.values() if key in values}
    numbers = {key: _quantity(key, value, place) for key, value in plain.items() if key != "kinds"}
    seed = numbers.pop("seed", None)
    return PlannedFault(
        kind=name,
        targets=_targets(kind, values.get("target"), members, place=place, name=name),
        round=at_round,
        at_s=None if at_s is None else _quantity("at_s", at_s, place, least=0.0),
        seed=None if seed is None else int(seed),
        kinds=_kinds(values.get("kinds"), place) if name == "storm" else (),
        **numbers,
    )


def _targets(kind: Kind, given: Any, members: Collection[str], *, place: str, name: str) -> tuple[str, ...]:
    names = _names("target", given, place)
    if kind.targets == "nobody" or (kind.targets == "place" and names in ((), (CONTROLLER,))):
        if names not in ((), (CONTROLLER,)):
            raise FaultPlanError(f"{place}: {name} has no target; {'+'.join(names)!r} is one too many")
        return (CONTROLLER,) if kind.targets == "place" else ()
    most = {"member": 1, "place": 1, "link": 2, "some": max(len(members), 1)}[kind.targets]
    if not names and kind.targets != "some":
        raise FaultPlanError(f"{place}: {name} of whom? This run has {_some(members)}")
    if len(names) > most or len(set(names)) < len(names):
        allowed = "one member" if most == 1 else "one member, or two different ones with +"
        raise FaultPlanError(f"{place}: {name} takes {allowed}, not {'+'.join(names)!r}")
    for member in names:
        if member not in members:
            raise FaultPlanError(f"{place}: there is no member {member!r}; this run has {_some(members)}")
    return names


def _names(key: str, given: Any, place: str) -> tuple[str, ...]:
    """Of a text with + between, or of a list in a file."""
    if given is None:
        return ()
    names = given.split("+") if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise FaultPlanError(f'{place}: {key} = {given!r}; a name, or a list of names like ["island-0", "island-1"]')
    return tuple(names)


def _some(members: Collection[str], most: int = 12) -> str:
    names = sorted(members)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _quantity(key: str, value: Any, place: str, *, least: float | None = None) -> float:
    """A number, seconds with a unit among them; above 0 (or at least `least`; a clock may jump back)."""
    found = re.fullmatch(r"(-?[0-9]+(?:\.[0-9]+)?)(ms|s|m|h)?", str(value)) if type(value) is not bool else None
    if found is None:
        raise FaultPlanError(f"{place}: {key} = {value!r} is no number (seconds may have a unit: 500ms, 30s, 2m)")
    number = float(found[1]) * _UNITS[found[2] or ""]
    too_low = number < least if least is not None else number <= 0
    if too_low and not (key == "seed" and number == 0) and not (key == "by_s" and number < 0):
        raise FaultPlanError(f"{place}: {key} = {value!r} must be above 0")
    return number


def _kinds(given: Any, place: str) -> tuple[str, ...]:
    names = _names("kinds", given, place) or STORM_KINDS
    for name in names:
        if name not in IN_STORMS:
            raise FaultPlanError(f"{place}: a storm has no kind {name!r}; known: {', '.join(IN_STORMS)}")
    return names


def read_plan(tables: Mapping[str, Any], members: Collection[str], *, place: str) -> tuple[PlannedFault, ...]:
    """The faults of a file, from its tables. Raises FaultPlanError that says which of them is wrong."""
    faults = tables.get("fault")
    other = sorted(set(tables) - {"fault"})
    if other or not isinstance(faults, list) or not all(isinstance(fault, dict) for fault in faults):
        found = f", not {other[0]!r}" if other else ""
        raise FaultPlanError(f"{place}: a fault plan is a list of tables [[fault]]{found}")
    return tuple(read_fault(fault, members, place=f"{place}, fault {i + 1}") for i, fault in enumerate(faults))


def due(plan: Sequence[PlannedFault], version: int, now_s: float = 0.0) -> list[PlannedFault]:
    """The faults whose time has come."""
    return [fault for fault in plan if fault.is_due(version, now_s)]
