"""What a peer has made of its own and not every fragment of its stage has: the account of steps, by fragment (pure).

A synchronisation of a fragment that a peer is in holds the peer's steps up to the one after which it was sent. A step
is committed in the stage when that is so of every fragment; until then it is the peer's, and goes with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class Work:
    """See the module. `since`: by fragment, the first step that it lacks; `counted`: step -> microbatches."""

    stage: int
    since: list[int]
    counted: dict[int, int] = field(default_factory=dict)

    @classmethod
    def begin(cls, stage: int, step: int, num_fragments: int) -> Work:
        """Of a peer whose first step this is."""
        return cls(stage=stage, since=[step] * num_fragments)

    @property
    def num_microbatches(self) -> int:
        """That are not committed in the stage."""
        return sum(self.counted.values())

    def count(self, step: int, num_microbatches: int) -> None:
        """The peer made a step with so many microbatches."""
        self.counted[step] = self.counted.get(step, 0) + num_microbatches

    def rate(self, fragment: int, before: int) -> float:
        """Microbatches in a step of those that the fragment lacks, up to the step `before`; 0: there is none.

        How many steps there were is in the displacement's length (exchange protocol, 1.6).
        """
        lacking = [num for step, num in self.counted.items() if self.since[fragment] <= step < before]
        return sum(lacking) / len(lacking) if lacking else 0.0

    def commit(self, fragments: Iterable[int], before: int) -> int:
        """These fragments hold the steps before this one; returns the microbatches that all of them hold now."""
        for fragment in fragments:
            self.since[fragment] = before
        return self._forget(min(self.since))

    def _forget(self, before: int) -> int:
        done = sum(num for step, num in self.counted.items() if step < before)
        self.counted = {step: num for step, num in self.counted.items() if step >= before}
        return done

    def lose(self) -> tuple[int, int]:
        """The peer is gone: microbatches of steps that no fragment holds, and of those that some hold (partial)."""
        newest = max(self.since)
        partial = sum(num for step, num in self.counted.items() if step < newest)
        return self.num_microbatches - partial, partial

    def copy(self) -> Work:
        """As it is now."""
        return Work(stage=self.stage, since=list(self.since), counted=dict(self.counted))

    def without(self, step: int) -> Work:
        """As if this step and later ones had not been made: they are made again."""
        return Work(
            stage=self.stage, since=list(self.since), counted={s: n for s, n in self.counted.items() if s < step}
        )
