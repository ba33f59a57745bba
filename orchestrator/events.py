"""What goes into the coordinator and what comes out of it: frozen values, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from workers.messages import Batch, Envelope
from workers.records import MemberId, Row, Scalar

# ---------------------------------------------------------------- events


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """An envelope arrived from a member's process."""

    envelope: Envelope


@dataclass(frozen=True, kw_only=True, slots=True)
class Flushed:
    """Every row up to and including number `seq` is durable."""

    seq: int


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalFullNow:
    """The last append left nothing behind (no space): commits stop until it works again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessDied:
    """The process with this nonce (or any process of `name`, if none joined yet) is known to be dead.

    `hopeless`: the user's settings or code are wrong, another process would end the same way. `raised`: an exception
    ended its training, nobody killed it. `taken`: its machine was taken away, on notice or not, or nobody can reach it.
    `hung`: it lived and did nothing.
    """

    name: str
    nonce: str | None
    why: str
    raised: bool = False
    hopeless: bool = False
    taken: Literal["", "preempted", "lost"] = ""
    hung: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultInjected:
    """Somebody made something go wrong on purpose; `detail`: what exactly, as it was asked for."""

    fault: str
    member: str
    detail: str = "injected on purpose"


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultNoticed:
    """Something went wrong that the shell around the coordinator noticed."""

    fault: str
    member: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaveRequested:
    """A member shall leave the run: it hands over what it has, and its process is ended then. Asked for repeatedly."""

    name: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Operated:
    """Somebody asked for something (a dashboard's button): it is on the record, with what came of it."""

    action: str
    member: str
    by: str
    outcome: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRequested:
    """The user wants the run to stop, resumable; `save` = let members save their local state first."""

    save: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingsRequested:
    """The user changes settings, checked before: `(key, value)` each."""

    values: tuple[tuple[str, Scalar], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PauseRequested:
    """The user wants that no samples are trained on for now, or that training goes on."""

    paused: bool
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveRequested:
    """The user wants a snapshot of the anchor now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnbanRequested:
    """The user wants a banned member's contributions again."""

    member: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackRequested:
    """The user wants to go on from an older snapshot: its name, and version and chain of each fragment."""

    name: str
    versions: tuple[int, ...]
    chains: tuple[str, ...]
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovered:
    """The journal was rebuilt from the members' copies: every incarnation is fenced and joins anew (1.2 rule 5)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """Time passed."""


Event = (
    Received
    | Flushed
    | JournalFullNow
    | ProcessDied
    | FaultInjected
    | FaultNoticed
    | LeaveRequested
    | Operated
    | StopRequested
    | SettingsRequested
    | PauseRequested
    | SaveRequested
    | UnbanRequested
    | RollbackRequested
    | Recovered
    | Tick
)

# ---------------------------------------------------------------- commands


@dataclass(frozen=True, kw_only=True, slots=True)
class Append:
    """Write these rows and flush them, then say `Flushed`."""

    rows: tuple[Row, ...]


class Send(NamedTuple):
    """Deliver a batch to the process with the batch's nonce."""

    batch: Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Spawn:
    """Start a new process for a member."""

    name: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """End the process with this nonce (it was fenced or is not needed any more).

    `save_stack`: write down first where its threads are: it hangs, and that is how its user learns in what.
    """

    name: str
    nonce: str
    why: str
    save_stack: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A row for metrics.jsonl."""

    row: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Say:
    """A decision with its reason, for the log and for people."""

    text: str
    member: str = ""
    level: str = "info"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """The run is over; `reason` is done, stopped or failed."""

    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RolledBack:
    """A rollback to these versions is durable: snapshots of later ones are no part of the history any more."""

    versions: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Die:
    """A higher term exists: this controller must end without another word."""

    why: str


Command = Append | Send | Spawn | End | Metric | Say | Finish | RolledBack | Die


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultTrack:
    """One fault from injection to recovery; seconds since the run's start, None while unknown.

    `estimated`: when it happened is not known, `injected_s` is the last sign of life.
    """

    fault: str
    member: str
    injected_s: float | None
    detected_s: float
    victim: MemberId
    estimated: bool = False
    next_commit_s: float | None = None
    back_s: float | None = None
    contributed_s: float | None = None
