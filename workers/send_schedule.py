"""When a member sends each fragment, when a result is due, and for how long it waits for one that is late (pure).

    step:     ... s ............................ s + tau ................... s + H
    fragment:     sent                             its result is applied      sent again

Steps are those of this process. A result that is there earlier waits for its step, so that a run does not depend on
how fast its links are; one that is late is waited for, up to `wait_s`, and then training goes on without it. Where no
step can be made until something changes, nothing is held back. `workers/sync.py` and the simulator share this.

The period may change while a run goes on, for each fragment with its next version. Fragments at even distances have
them again after one period each between the old length and the new one: the j-th of P waits `H + (j + 1)(H' - H) / P`.
"""

from __future__ import annotations

from collections.abc import Callable

from strategies.schedule import offset_of


class SendSchedule:
    """The steps of one process, and what is due after which of them."""

    def __init__(
        self,
        *,
        num_fragments: int,
        staggered: bool,
        inner_steps: Callable[[int, float], int],
        overlap_at: Callable[[int, float], int],
        own_pace: bool = False,
    ) -> None:
        """`staggered`: fragments at even distances. Both functions are of a fragment, as of its version, and progress.

        `inner_steps`: steps of a round that starts there; `overlap_at`: steps until a result is due; `own_pace`: a
        period ends with a commit of what was sent, whatever others commit meanwhile.
        """
        self.own_pace = own_pace
        self.num_fragments, self.staggered = num_fragments, staggered
        self.inner_steps, self.overlap_at = inner_steps, overlap_at
        self.total_steps = 0
        self.marks = [0] * num_fragments
        self.sent_at = [0] * num_fragments
        self.due_in = [0] * num_fragments
        self.rounds = [1] * num_fragments
        self.overdue_s: list[float | None] = [None] * num_fragments
        for fragment in range(num_fragments):
            self._mark(fragment, 0, self.round_steps(fragment, 0.0))

    def round_steps(self, fragment: int, progress: float) -> int:
        """Local steps of a fragment's round that starts at `progress`."""
        return max(self.inner_steps(fragment, progress), 1)

    def longest_round(self, progress: float) -> int:
        """Local steps of a round of the fragment that has the longest."""
        return max(self.round_steps(fragment, progress) for fragment in range(self.num_fragments))

    def on_time(self, fragment: int, progress: float) -> bool:
        """Whether a round's steps were made since the fragment was sent (or came here)."""
        return self.total_steps - self.marks[fragment] >= self.round_steps(fragment, progress)

    def joins(self, *, late: bool, open_seen: bool) -> bool:
        """Whether a member that is late offers before its time, because somebody has opened an exchange."""
        return late and open_seen and not self.own_pace

    def sent(self, fragment: int, progress: float) -> None:
        """The fragment was sent after the present step."""
        self.sent_at[fragment], self.overdue_s[fragment] = self.total_steps, None
        self.due_in[fragment] = max(self.overlap_at(fragment, progress), 0)

    def is_due(self, fragment: int) -> bool:
        """Whether the result of what was sent is to be applied after the present step, or was to be before it."""
        return self.total_steps - self.sent_at[fragment] >= self.due_in[fragment]

    def moved(self, fragment: int, progress: float, *, included: bool = False) -> None:
        """The fragment came to a new version; `included`: by what was sent, so that the period counts from there."""
        overlapped = included and self.due_in[fragment] > 0
        self.overdue_s[fragment] = None
        if self.own_pace and not included:
            return
        begun = self.sent_at[fragment] if overlapped else self.total_steps
        self._mark(fragment, begun, self.round_steps(fragment, progress))

    def restart(self) -> None:
        """Everything that was not committed is dropped: all periods begin now."""
        self.marks = [self.total_steps] * self.num_fragments
        self.overdue_s = [None] * self.num_fragments

    def wait_begins(self, fragment: int, now: float) -> None:
        """A result is due and not here: the member waits from now on, unless it does already."""
        if self.overdue_s[fragment] is None:
            self.overdue_s[fragment] = now

    def waited_out(self, now: float, wait_s: float) -> bool:
        """Whether the result that was due last has been waited for long enough."""
        since = [at for at in self.overdue_s if at is not None]
        return bool(since) and now - max(since) >= wait_s

    def _mark(self, fragment: int, step: int, round_steps: int) -> None:
        """Begin a period. At first, and where rounds of one step are over, fragments are spread over the period."""
        before = self.rounds[fragment]
        if self.staggered and (self.total_steps == 0 or before == 1 < round_steps):
            offset = offset_of(fragment, num_fragments=self.num_fragments, inner_steps=round_steps)
            step += offset - round_steps
        elif self.staggered and before != round_steps:
            turn = 1 + self.rounds.count(round_steps)  # of this fragment among those that have come to the new length
            step += before + turn * (round_steps - before) // self.num_fragments - round_steps
        self.marks[fragment], self.rounds[fragment] = step, round_steps
