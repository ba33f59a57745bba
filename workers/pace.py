"""What a training thread does and how long its steps usually take: told with each heartbeat. Pure; clock passed in.

Another thread reads it while a step goes on, which is how a step that never ends is seen (`faults/stragglers.py`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

STEPS = 32
MIN_STEPS = 3


@dataclass(kw_only=True, slots=True)
class Pace:
    """One training thread, on its process's own clock.

    `own_loop`: the loop is not the built-in one, and may do anything inside a step: the longest step that it was seen
    to make and come back from counts as usual, too (half of it, so that twice its length is no hang). `tick_s`: how
    often the other thread looks.
    """

    own_loop: bool = False
    tick_s: float = 0.5
    doing: str = "starting"
    since_s: float = 0.0
    ticked_s: float | None = None
    steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS))
    num_steps: int = 0

    def begin(self, doing: str, now: float) -> None:
        """From now on it does something else; `step` is a step, the first ones of which have no usual length."""
        if doing == "step":
            doing = "stepping" if self.num_steps >= MIN_STEPS else "first_steps"
        self.doing, self.since_s = doing, now

    def stepped(self, now: float) -> None:
        """A step has ended. The built-in loop goes on at once; what another loop does before the next is its own."""
        self.num_steps += 1
        if self.num_steps > 1:  # the first one compiles, and fills caches
            self.steps_s.append(now - self.since_s)
        self.begin("between" if self.own_loop else "step", now)

    def tick(self, now: float) -> None:
        """The other thread is alive. If it was not for long, the whole process stood still, and no step was under way.

        A process that was stopped, a machine that was suspended or has no time for anybody: none of that is a hang.
        """
        excess_s = 0.0 if self.ticked_s is None else now - self.ticked_s - 2 * self.tick_s
        self.ticked_s = now
        if excess_s > 0:
            self.since_s = min(self.since_s + excess_s, now)

    def usual_step_s(self) -> float:
        """Its usual step, seconds; 0 while that is not known."""
        if not self.steps_s:
            return 0.0
        usual = median(self.steps_s)
        return max(usual, max(self.steps_s) / 2) if self.own_loop else usual
