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
            f"set it to {max(inner_steps // num_fragments, 1) * num_fragments} or another multiple"
        )


def is_due(step: int, *, fragment: int, num_fragments: int, inner_steps: int) -> bool:
    """Return whether fragment number `fragment` is sent after inner step `step` (1 for the first step).

    Fragment p is sent after the steps (p + 1) H / P + kH; with H = 1 all are sent after every step.
    """
    check_divides(inner_steps, num_fragments)
    if not 0 <= fragment < num_fragments:
        raise IndexError(f"there are {num_fragments} fragments; fragment {fragment} does not exist")
    offset = (fragment + 1) * inner_steps // num_fragments
    return step >= 1 and (step - offset) % inner_steps == 0
