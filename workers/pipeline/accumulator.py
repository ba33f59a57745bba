"""What a stage peer has counted: each microbatch once per step, whatever is lost, doubled, late or sent again.

Pure bookkeeping of ids; the gradients are in the shell (`workers/pipeline/peer.py`). The rules (exchange protocol,
section 4): a backward that timed out may have been counted, so its trainer first withdraws it. The answer "not done" is
a promise: that attempt, still under way in a network or in this peer, will not be counted here any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum


class Begin(Enum):
    """What to do with a backward request."""

    RUN = "run"
    RUNNING = "running"  # a repeated message: the reply comes
    DONE = "done"  # counted already: send the reply again
    WITHDRAWN = "withdrawn"
    FENCED = "fenced"
    OTHER_VERSION = "other version"
    DRAINING = "draining"


@dataclass(kw_only=True, slots=True)
class _Step:
    running: dict[int, int] = field(default_factory=dict)  # microbatch -> attempt
    counted: dict[int, int] = field(default_factory=dict)
    refused: dict[int, int] = field(default_factory=dict)  # microbatch -> attempts up to this one will not be counted
    fenced: bool = False


def is_refused(attempt: int, refused: int | None) -> bool:
    """Whether an attempt was promised not to be counted."""
    return refused is not None and attempt <= refused


class Accumulator:
    """One peer's record for its stage. `version` is the number of steps committed in the stage."""

    def __init__(self, *, version: int = 0, num_open_steps: int = 1) -> None:
        self._version = version
        self._num_open = num_open_steps
        self._steps: dict[int, _Step] = {}
        self._draining = False

    @property
    def version(self) -> int:
        """Steps committed in the stage."""
        return self._version

    @property
    def is_empty(self) -> bool:
        """Whether nothing is under way and nothing waits for a commit: the peer may leave its stage."""
        return not any(step.running or (step.counted and not step.fenced) for step in self._steps.values())

    def begin(self, step: int, microbatch: int, attempt: int) -> Begin:
        """A backward request arrived. `step` counts from 0 and is made with the parameters of that many commits.

        A refusal is a promise as well: the trainer goes elsewhere at once, and a copy of the request that comes late,
        when this peer could do it, must be refused as the first one was.
        """
        if step < self._version:
            return Begin.OTHER_VERSION
        record = self._steps.setdefault(step, _Step())
        begin = self._judge(record, step, microbatch, attempt)
        if begin is Begin.RUN:
            record.running[microbatch] = attempt
        elif begin is Begin.RUNNING:
            record.running[microbatch] = max(attempt, record.running[microbatch])
        elif begin is not Begin.DONE:
            record.refused[microbatch] = max(attempt, record.refused.get(microbatch, attempt))
        return begin

    def _judge(self, record: _Step, step: int, microbatch: int, attempt: int) -> Begin:
        if record.fenced:
            return Begin.FENCED
        if microbatch in record.counted:
            return Begin.DONE
        if is_refused(attempt, record.refused.get(microbatch)):
            return Begin.WITHDRAWN
        if step >= self._version + self._num_open:
            return Begin.OTHER_VERSION
        if microbatch in record.running:
            return Begin.RUNNING
        return Begin.DRAINING if self._draining else Begin.RUN

    def finish(self, step: int, microbatch: int) -> bool:
        """The gradient is there; return whether it counts. False: withdrawn, fenced or committed meanwhile."""
        record = self._steps.get(step)
        if record is None or record.fenced:
            return False
        attempt = record.running.pop(microbatch, None)
        if attempt is None or is_refused(attempt, record.refused.get(microbatch)):
            return False
        record.counted[microbatch] = attempt
        return True

    def fail(self, step: int, microbatch: int) -> None:
        """The backward failed here and added nothing."""
        if (record := self._steps.get(step)) is not None:
            record.running.pop(microbatch, None)

    def withdraw(self, step: int, microbatch: int, attempt: int) -> bool:
        """Return whether the microbatch is counted; if not, attempts up to this one never will be."""
        if step < self._version:
            return False  # committed without it, or with it at somebody else
        record = self._steps.setdefault(step, _Step())
        if microbatch in record.counted and not record.fenced:
            return True
        record.refused[microbatch] = max(attempt, record.refused.get(microbatch, attempt))
        running = record.running.get(microbatch)
        if running is not None and is_refused(running, record.refused[microbatch]):
            del record.running[microbatch]
        return False

    def fence(self, step: int) -> None:
        """Nothing of this peer may enter the step: it was given up for it."""
        record = self._steps.setdefault(step, _Step())
        record.fenced = True
        record.running.clear()
        record.counted.clear()

    def restart(self, step: int) -> None:
        """The step is begun anew: whatever was counted, promised or fenced in it belongs to an older round."""
        self._steps.pop(step, None)

    def drain(self, on: bool = True) -> None:
        """Take no new microbatches (before leaving the stage), or again."""
        self._draining = on

    def offer(self, step: int) -> tuple[int, ...]:
        """Microbatches that this peer's sum of the step holds, in order."""
        record = self._steps.get(step)
        return () if record is None or record.fenced else tuple(sorted(record.counted))

    def commit(self, step: int) -> None:
        """The stage committed the step: it is forgotten here. Steps commit in order; a repeated one does nothing."""
        if step < self._version:
            return
        assert step == self._version, f"commit of step {step} at version {self._version}"
        self._steps.pop(step, None)
        self._version = step + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Cover:
    """What the offers of a step lack to be exactly its microbatches: nothing, if it may be committed."""

    missing: tuple[int, ...]
    doubled: tuple[int, ...]
    foreign: tuple[int, ...]

    @property
    def exact(self) -> bool:
        """Whether every microbatch is there once."""
        return not (self.missing or self.doubled or self.foreign)


def cover(offers: Mapping[str, Iterable[int]], wanted: Iterable[int]) -> Cover:
    """Compare what peers offer with the microbatches of the step: the roster must be a disjoint cover."""
    times: dict[int, int] = {}
    for ids in offers.values():
        for microbatch in ids:
            times[microbatch] = times.get(microbatch, 0) + 1
    expected = set(wanted)
    return Cover(
        missing=tuple(sorted(expected - times.keys())),
        doubled=tuple(sorted(microbatch for microbatch, count in times.items() if count > 1)),
        foreign=tuple(sorted(times.keys() - expected)),
    )
