"""Where islands are placed in a cluster whose machines come and go. Pure: nodes and islands in, decisions out.

A node has as many places as it has units of the resource `atoll_worker`. An island keeps its place while its process
is replaced there, and loses it with its node; an island that lost its place has the first right to the next free one.
An island with a pack of its own has a place on the machine that has that pack, and nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import count

from orchestrator.build import island_name


def without_others(
    total: Mapping[str, int], available: Mapping[str, int], place_of: Mapping[str, str]
) -> dict[str, int]:
    """Places of each node that are left for this run: those that other runs use are not.

    Ray's figures are a moment old. An island of ours that was just placed is not in them yet: that is why its place is
    not taken for another run's, whatever they say.
    """
    own = Counter(place_of.values())
    return {node: num - max(num - available.get(node, num) - own[node], 0) for node, num in total.items()}


def free_places(nodes: Mapping[str, int], place_of: Mapping[str, str], leaving: Collection[str]) -> Counter[str]:
    """How many islands each node can take; `nodes`: places of each node that is there; none where a node leaves."""
    used = Counter(place_of.values())
    return Counter({node: num - used[node] for node, num in nodes.items() if node not in leaving and num > used[node]})


def choose(free: Mapping[str, int]) -> str | None:
    """The node with the most free places, the first by name among equals; None where there is none."""
    return min((node for node, num in free.items() if num > 0), key=lambda node: (-free[node], node), default=None)


def kept_for(
    nodes: Mapping[str, int], place_of: Mapping[str, str], leaving: Collection[str], owner_at: Mapping[str, str]
) -> dict[str, str]:
    """`{island: node}`: owners of packs that have no place yet, and the machine that has the pack and room for them."""
    free = free_places(nodes, place_of, leaving)
    found = {name: node for node, name in sorted(owner_at.items(), reverse=True) if free[node] > 0}
    return {name: node for name, node in found.items() if name not in place_of}


def fill(
    nodes: Mapping[str, int],
    place_of: Mapping[str, str],
    leaving: Collection[str],
    waiting: Sequence[str],
    owners: Collection[str] = (),
    owner_at: Mapping[str, str] | None = None,
) -> list[tuple[str, str]]:
    """`(island, node)` for every free place: those that wait for one first, then new islands with the lowest names.

    `owners`: islands with packs of their own; `owner_at`: on which node that of which island is.
    """
    free = free_places(nodes, place_of, leaving)
    out = sorted(kept_for(nodes, place_of, leaving, owner_at or {}).items())
    free.subtract(node for _, node in out)
    taken = {*place_of, *waiting, *owners}
    unused = (name for name in map(island_name, count()) if name not in taken)
    queue = [name for name in waiting if name not in owners]
    while (node := choose(free)) is not None:
        name = queue.pop(0) if queue else next(unused)
        out.append((name, node))
        free[node] -= 1
    return out


def displaced(place_of: Mapping[str, str], nodes: Collection[str]) -> list[str]:
    """Islands whose node is not there any more."""
    return sorted(name for name, node in place_of.items() if node not in nodes)
