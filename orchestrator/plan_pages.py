"""The tables of docs/choosing.md: `python -m orchestrator.plan_pages docs/choosing.md` renews them."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator.planner import Case
from orchestrator.planning import make_plan, markdown

# Name in the page's markers -> case. What people have: a building, two regions, home uplinks, a satellite.
CASES = {
    "building": Case(num_params=124_000_000, num_islands=4, link_bit_per_s=10e9, rtt_s=0.0005, step_s=0.5),
    "regions": Case(num_params=1_200_000_000, num_islands=4, link_bit_per_s=1e9, rtt_s=0.08, step_s=0.9),
    "slow-regions": Case(num_params=1_200_000_000, num_islands=4, link_bit_per_s=200e6, rtt_s=0.08, step_s=0.9),
    "homes": Case(num_params=124_000_000, num_islands=8, link_bit_per_s=20e6, rtt_s=0.04, step_s=1.5),
    "satellite": Case(num_params=30_000_000, num_islands=3, link_bit_per_s=10e6, rtt_s=0.6, step_s=0.3),
}
MARKED = re.compile(r"(<!-- plan: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def renewed(page: str) -> str:
    """The page with every table between `<!-- plan: NAME -->` and `<!-- end -->` made anew."""
    return MARKED.sub(lambda match: f"{match[1]}\n{markdown(make_plan(CASES[match[2]], {}))}\n{match[3]}", page)


def main(arguments: Sequence[str]) -> None:
    """Rewrite the pages that are named."""
    for name in arguments:
        path = Path(name)
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
