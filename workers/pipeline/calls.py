"""One request of a trainer to a stage peer: what both, and the controller, know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["forward", "backward"]
FORWARD_SIZE, BACKWARD_SIZE = 1.0, 2.5
"""What a call costs a peer; a backward runs the forward again."""


def evaluation_of(number: int) -> int:
    """Version -> the negative number of its evaluation among the steps, and back."""
    return -1 - number


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One request to one peer. `attempt` grows with every call of the trainer.

    A negative step is an evaluation (`evaluation_of`): forward through all stages, the last of which says the loss.
    """

    step: int
    microbatch: int
    stage: int
    direction: Direction
    attempt: int
    peer: str

    @property
    def version(self) -> int:
        """That of the parameters: a step is made with those of as many commits."""
        return self.step if self.step >= 0 else evaluation_of(self.step)

    @property
    def size(self) -> float:
        """Its cost, for the router."""
        return FORWARD_SIZE if self.direction == "forward" else BACKWARD_SIZE
