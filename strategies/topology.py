"""Who averages with whom: mixing matrices, schedules of pairs and groups, and whether they converge. No torch.

Sources: one-peer exponential graphs, Ying et al. 2021 (arXiv 2110.13363), equation 7; random matching and its expected
contraction, Boyd et al. 2006 ("Randomized gossip algorithms"). A matrix `W` acts as `x_i <- sum_j W_ij x_j`. It keeps
the mean if columns sum to 1, keeps a consensus if rows do, and brings members together by its second largest singular
value: `1 -` that is the spectral gap here (for symmetric matrices the usual one). Differs from the paper: a directed
one-peer step has no two members that could commit it together, so exchanges use its sibling on the hypercube
(partner = rank XOR 2^t), which has the same exact average after log2 n rounds if n is a power of two.

Every draw is a hash of seed, round and member: equal on all machines, and a member that joins moves few others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from strategies.errors import SettingError

Matrix = NDArray[np.float64]
Groups = tuple[tuple[str, ...], ...]
"""Of a round: disjoint groups of members, the first of each leads. Who is in none makes no exchange."""

TOLERANCE = 1e-9
MIN_GAP = 1e-6

# ---------------------------------------------------------------- mixing matrices


def ring(num: int) -> Matrix:
    """Each member, its left and its right neighbour, a third each."""
    _need(num, 2, "a ring")
    matrix = np.eye(num) / 3.0
    for rank in range(num):
        matrix[rank, (rank + 1) % num] += 1.0 / 3.0
        matrix[rank, (rank - 1) % num] += 1.0 / 3.0
    return matrix


def one_peer_exponential(num: int, step: int) -> Matrix:
    """Half of one's own and half of the member's `2^(step mod log2 num)` ranks further (directed; Ying et al.)."""
    _need(num, 2, "an exponential graph")
    hop: int = 1 << (step % period_of_exponential(num))
    return 0.5 * (np.eye(num) + np.roll(np.eye(num), hop, axis=1))


def complete(num: int) -> Matrix:
    """The mean of everybody."""
    _need(num, 1, "an average")
    return np.full((num, num), 1.0 / num)


def group_matrix(members: Sequence[str], groups: Groups) -> Matrix:
    """The mean within each group; who is in none keeps what it has. Raises SettingError if groups overlap."""
    rank = {name: index for index, name in enumerate(members)}
    matrix, seen = np.eye(len(members)), set[str]()
    for group in groups:
        for name in group:
            if name not in rank:
                raise SettingError(f"group {group}: {name!r} is no member of this round")
            if name in seen:
                raise SettingError(f"{name!r} is twice in the groups of a round; groups must be disjoint")
            seen.add(name)
        ranks = [rank[name] for name in group]
        matrix[np.ix_(ranks, ranks)] = 1.0 / len(group)
    return matrix


def period_of_exponential(num: int) -> int:
    """Rounds after which the partners of the exponential graph repeat: log2 of the members, rounded up."""
    return max((num - 1).bit_length(), 1)


# ---------------------------------------------------------------- checks


def check_stochastic(matrix: Matrix) -> None:
    """Raise SettingError unless a matrix is doubly stochastic; says which row or column is not."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise SettingError(f"a mixing matrix is square, this one has shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise SettingError("the mixing matrix has an entry that is not finite")
    if (matrix < -TOLERANCE).any():
        row, column = np.argwhere(matrix < -TOLERANCE)[0].tolist()
        raise SettingError(f"the mixing matrix has a negative weight: row {row}, column {column}")
    for axis, what, effect in ((1, "row", "a consensus would not stay one"), (0, "column", "the mean would drift")):
        sums = np.add.reduce(matrix, axis=axis)
        wrong = np.flatnonzero(np.abs(sums - 1.0) > TOLERANCE)
        if len(wrong):
            at = int(wrong[0])
            raise SettingError(f"{what} {at} of the mixing matrix sums to {sums[at]:.6g}, not to 1: {effect}")


def unreachable(matrices: Sequence[Matrix]) -> tuple[int, ...]:
    """Ranks whose values never reach rank 0, or the other way round, over all matrices together."""
    linked = np.maximum.reduce([matrix > TOLERANCE for matrix in matrices])
    found: set[int] = set()
    for edges in (linked, linked.T):
        seen, waiting = {0}, [0]
        while waiting:
            for rank in np.flatnonzero(edges[waiting.pop()]).tolist():
                if rank not in seen:
                    seen.add(rank)
                    waiting.append(rank)
        found |= set(range(len(linked))) - seen
    return tuple(sorted(found))


def contraction(matrices: Sequence[Matrix]) -> float:
    """By how much the matrices, applied in order, shrink any deviation from the mean at least (0 exact, 1 not at all).

    The largest singular value of their product without the mean.
    """
    num = len(matrices[0])
    # The rule of one rounding per operation is for what members compute alike; this only judges a schedule.
    product = np.linalg.multi_dot([*reversed(matrices), np.eye(num)])
    return float(np.linalg.svd(product - 1.0 / num, compute_uv=False)[0])


def spectral_gap(matrices: Sequence[Matrix]) -> float:
    """One minus the contraction per round of a schedule that repeats these matrices."""
    factor = contraction(matrices)
    return 1.0 if factor < TOLERANCE else 1.0 - factor ** (1.0 / len(matrices))


def check_converges(matrices: Sequence[Matrix]) -> float:
    """Return the spectral gap of a schedule that repeats these matrices.

    Raises SettingError with the reason if one is not doubly stochastic, if the members are not connected, or if they
    are and yet never come together (members that only swap what they have).
    """
    if not matrices:
        raise SettingError("a schedule without a round averages nothing")
    for matrix in matrices:
        check_stochastic(matrix)
        if matrix.shape != matrices[0].shape:
            raise SettingError(f"matrices of {len(matrices[0])} and of {len(matrix)} members in one schedule")
    if apart := unreachable(matrices):
        raise SettingError(
            f"the topology is not connected: rank 0 and {_few(apart)} never hear of each other; they would end as "
            "models of their own"
        )
    gap = spectral_gap(matrices)
    if gap < MIN_GAP:
        raise SettingError(
            f"the topology is connected, but its spectral gap is {gap:.1e}: members swap values and never average; "
            "give each a weight of its own"
        )
    return gap


def expected_gap(num: int, group_size: int, *, far_share: float = 1.0) -> float:
    """Spectral gap of the expected matrix of random groups: `far_share (num - G) / (num - 1)`, G groups a round.

    A matrix of disjoint means is a projection: what shrinks in the expected square is what the expected matrix
    shrinks. Rounds among near members count for nothing here, so it is a lower bound for `near_groups`.
    """
    _need(num, 2, "gossip")
    return far_share * (num - -(-num // group_size)) / (num - 1)


# ---------------------------------------------------------------- who meets whom in a round


def shuffled(members: Sequence[str], *, seed: int, round_: int) -> list[str]:
    """The members in an order drawn from seed and round, whatever order they come in."""
    return sorted(members, key=lambda name: (_draw(seed, round_, name), name))


def random_groups(members: Sequence[str], *, seed: int, round_: int, size: int = 2) -> Groups:
    """Random disjoint groups of `size` (2: a matching); the last one may be smaller, a single one is left out."""
    check_group_size(len(members), size)
    return _cut(shuffled(members, seed=seed, round_=round_), size)


def exponential_pairs(members: Sequence[str], *, round_: int) -> Groups:
    """Pairs of ranks that differ in bit `round_ mod log2 n` alone; a rank whose partner does not exist is left out.

    Exact after log2 n rounds if n is a power of two; connected, but not exact, for any other number.
    """
    _need(len(members), 2, "an exponential graph")
    names, bit = sorted(members), 1 << (round_ % period_of_exponential(len(members)))
    return tuple((names[r], names[r | bit]) for r in range(len(names)) if not r & bit and r | bit < len(names))


def ring_pairs(members: Sequence[str], *, round_: int) -> Groups:
    """The edges of a ring in turns: in even rounds (0, 1), (2, 3), ..., in odd ones (1, 2), (3, 4), ..."""
    _need(len(members), 2, "a ring")
    names = sorted(members)
    if round_ % 2:
        names = [*names[1:], names[0]] if len(names) % 2 == 0 else names[1:]
    return _cut(names, 2)


def everybody(members: Sequence[str]) -> Groups:
    """One group of all: a full merge."""
    return (tuple(sorted(members)),) if members else ()


def near_groups(
    members: Sequence[str],
    *,
    regions: Mapping[str, str],
    seed: int,
    round_: int,
    turn: int | None = None,
    size: int = 2,
    keep_gap: float = 0.5,
) -> Groups:
    """Groups within regions, but for a share `keep_gap` of the rounds, which draw from all members.

    So at least `keep_gap` of the spectral gap of `random_groups` is kept. Raises SettingError for a member without a
    region, or if no round would leave them. `turn`: rounds so far, where the number of this one tells another thing.
    """
    check_keep_gap(keep_gap)
    if is_far_round(round_ if turn is None else turn, keep_gap):
        return random_groups(members, seed=seed, round_=round_, size=size)
    return _within(members, regions, seed=seed, round_=round_, size=size)


def _within(members: Sequence[str], regions: Mapping[str, str], *, seed: int, round_: int, size: int) -> Groups:
    """Random groups within regions; whoever is left over in its region meets those left over in others."""
    check_group_size(len(members), size)
    if missing := sorted(set(members) - regions.keys()):
        raise SettingError(f"no region is known of {', '.join(missing)}; near peers cannot be told from far ones")
    by_region: dict[str, list[str]] = {}
    for name in shuffled(members, seed=seed, round_=round_):
        by_region.setdefault(regions[name], []).append(name)
    groups: list[tuple[str, ...]] = []
    left: list[str] = []
    for _, names in sorted(by_region.items()):
        whole = len(names) - len(names) % size
        groups += _cut(names[:whole], size)
        left += names[whole:]
    return (*groups, *_cut(shuffled(left, seed=seed, round_=round_), size))


def is_far_round(round_: int, keep_gap: float) -> bool:
    """Whether a round draws from all members: evenly spread, the share `keep_gap` of all rounds."""
    return int((round_ + 1) * keep_gap + TOLERANCE) > int(round_ * keep_gap + TOLERANCE)


def check_group_size(num: int, size: int) -> None:
    """Raise SettingError unless so many members can meet in groups of `size`."""
    if size < 2:
        raise SettingError(f"groups of {size}: nobody would meet anybody; at least 2")
    _need(num, size, f"a group of {size}")


def check_keep_gap(keep_gap: float) -> None:
    """Raise SettingError unless some rounds, and at most all, draw from all members."""
    if not 0.0 < keep_gap <= 1.0:
        raise SettingError(
            f"keep_gap = {keep_gap}; it must be above 0 (at 0 regions never meet: not connected) and at most 1"
        )


def _cut(names: Sequence[str], size: int) -> Groups:
    parts = (tuple(names[start : start + size]) for start in range(0, len(names), size))
    return tuple(part for part in parts if len(part) > 1)


def _draw(seed: int, round_: int, name: str) -> bytes:
    return blake2b(f"{seed}/{round_}/{name}".encode(), digest_size=16).digest()


def _need(num: int, least: int, what: str) -> None:
    if num < least:
        raise SettingError(f"{what} needs at least {least} members, there {'is' if num == 1 else 'are'} {num}")


def _few(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:5]))
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}{', ...' if len(ranks) > 5 else ''}"
