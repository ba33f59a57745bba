"""Arithmetic on half-open ranges of sample positions.

Two shapes are used: a *span list* keeps the order in which a member consumes its leases (positions may jump back
when returned samples are leased again); an *interval set* is sorted, disjoint and merged (free samples, the ledger).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Range = tuple[int, int]


def count(ranges: Iterable[Range]) -> int:
    """Number of positions in `ranges`."""
    num = 0
    for start, stop in ranges:  # quicker than `sum` of a generator: there is mostly one, and this is asked all the time
        num += stop - start
    return num


def append(spans: list[Range], extra: Iterable[Range]) -> None:
    """Append `extra` to a span list in place, joining a range that continues the last one."""
    for start, stop in extra:
        if stop <= start:
            raise ValueError(f"empty or backward range {start}:{stop}")
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], stop)
        else:
            spans.append((start, stop))


def cut(spans: Sequence[Range], since: int, upto: int) -> tuple[Range, ...]:
    """The positions numbered `since` up to (not including) `upto` of a span list, in its order."""
    if not 0 <= since <= upto:
        raise ValueError(f"cut {since}:{upto} is not a forward slice")
    out: list[Range] = []
    offset = found = 0
    for start, stop in spans:
        length = stop - start
        low = since - offset if since > offset else 0
        high = upto - offset if upto - offset < length else length
        if low < high:
            append(out, ((start + low, start + high),))
            found += high - low
        offset += length
        if offset >= upto:
            break
    if found != upto - since:
        raise ValueError(f"cut {since}:{upto} reaches beyond the {offset} positions there are")
    return tuple(out)


def union(first: Iterable[Range], second: Iterable[Range]) -> tuple[Range, ...]:
    """Interval set of everything in either; overlaps are allowed."""
    out: list[Range] = []
    for start, stop in sorted([*first, *second]):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return tuple(out)


def subtract(first: Iterable[Range], second: Iterable[Range]) -> tuple[Range, ...]:
    """Interval set of what is in `first` and not in `second`."""
    out: list[Range] = []
    holes = sorted(second)
    for start, stop in union(first, ()):
        cursor = start
        for low, high in holes:
            if high <= cursor or low >= stop:
                continue
            if low > cursor:
                out.append((cursor, low))
            cursor = max(cursor, high)
            if cursor >= stop:
                break
        if cursor < stop:
            out.append((cursor, stop))
    return tuple(out)


def intersect(first: Iterable[Range], second: Iterable[Range]) -> tuple[Range, ...]:
    """Interval set of what is in both."""
    base = union(first, ())
    return subtract(base, subtract(base, second))


def take(free: Sequence[Range], num: int) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
    """Split an interval set into its first `num` positions (fewer if there are fewer) and the rest."""
    taken: list[Range] = []
    rest: list[Range] = []
    for start, stop in free:
        use = min(stop - start, num)
        if use:
            taken.append((start, start + use))
            num -= use
        if start + use < stop:
            rest.append((start + use, stop))
    return tuple(taken), tuple(rest)
