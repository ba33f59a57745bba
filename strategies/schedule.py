"""When each fragment is sent.

Source: Streaming DiLoCo (arXiv 2501.18512), algorithm 2: every fragment once in H inner steps, evenly spread. Steps are
counted from 1, so one fragment is sent after step H, 2H, ... as in DiLoCo.
"""

from __future__ import annotations

from strategies.errors import SettingError


def check_divides(inner_steps: int, num_fragments: int) -> None:
    """Raise SettingError unless all fragments can have the period `inner_steps` at even distances.

    An interval of floor(H / P) would have the period P floor(H / P) instead of H, unnoticed.
    """
    if inner_steps > 1 and inner_steps % num_fragments:
        raise SettingError(
            f"strategy.inner_steps = {inner_steps} is not a multiple of strategy.num_fragments = {num_fragments}: "
            f"set it to {periods_that_divide(inner_steps, num_fragments)}"
        )


def periods_that_divide(inner_steps: int, num_fragments: int) -> str:
    """The two nearest periods that a number of fragments divides: "96 or 102"; one where there is none below."""
    below = inner_steps // num_fragments * num_fragments
    above = below + num_fragments
    return f"{below} or {above}" if below else str(above)


def offset_of(fragment: int, *, num_fragments: int, inner_steps: int) -> int:
    """The inner step, counted from 1, after which a fragment is sent first: `(p + 1) H / P`."""
    if not 0 <= fragment < num_fragments:
        raise IndexError(f"there are {num_fragments} fragments; fragment {fragment} does not exist")
    return max((fragment + 1) * inner_steps // num_fragments, 1)


def is_due(step: int, *, fragment: int, num_fragments: int, inner_steps: int) -> bool:
    """Return whether fragment number `fragment` is sent after inner step `step` (1 for the first step).

    Fragment p is sent after the steps (p + 1) H / P + kH; with H = 1 all are sent after every step. Raises ValueError
    for a period that the number of fragments does not divide.
    """
    check_divides(inner_steps, num_fragments)
    offset = offset_of(fragment, num_fragments=num_fragments, inner_steps=inner_steps)
    return step >= offset and (step - offset) % inner_steps == 0


def overlap_steps_at(overlap_steps: int, round_steps: int, *, whole_round: bool) -> int:
    """Steps between a contribution and the step at which its result is due: it is before the next one of its fragment.

    `whole_round`: it may be in that very step, since what is under way is no part of the next contribution.
    """
    return min(overlap_steps, round_steps if whole_round else round_steps - 1)
