"""What the training thread of an island does next: the answers of `IslandSync.boundary`."""

from __future__ import annotations

from dataclasses import dataclass

from workers import messages as msg
from workers.ranges import Range


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOn:
    """Make one inner step on these sample positions."""

    ranges: tuple[Range, ...]
    progress: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateNow:
    """Evaluate the anchor, then call `evaluated`."""

    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveNow:
    """Write a snapshot or the local state, then call `saved`."""

    order: msg.Save


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitFor:
    """Nothing to do yet: wait for a change, at most `timeout_s`."""

    reason: str
    timeout_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The controller asks to stop; `save` = write the local state first."""

    save: bool


Action = TrainOn | EvaluateNow | SaveNow | WaitFor | Finished

# What a training thread does, as its heartbeats tell it (`workers/pace.py`).
DOING: dict[type[Action], str] = {
    TrainOn: "step",
    EvaluateNow: "evaluating",
    SaveNow: "saving",
    WaitFor: "waiting",
    Finished: "over",
}
