"""Parts of an exchange that two members work on, whose answers are compared (`robust.verify`). Pure.

Without it one member works on each part, its owner, and its answer counts. With it a second one does the same work, and
two equal answers count. Where they differ a third is asked, and who has another answer than the other two is the liar.
Three different answers blame nobody. An answer is the digest of a reduced part, or the distances that were measured
in it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from workers.records import MemberId

Answers = Mapping[MemberId, Hashable]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What the answers to one part say: the one that counts and who lied, or that one more has to be asked."""

    answer: Hashable | None = None
    liars: tuple[MemberId, ...] = ()
    ask_another: bool = False
    hopeless: bool = False


def deal_checkers(owners: Sequence[MemberId], able: Sequence[MemberId]) -> list[list[MemberId]]:
    """For each part somebody else than its owner, next parts to different ones; empty where there is nobody else."""
    ordered = sorted(able)
    out: list[list[MemberId]] = []
    for part, owner in enumerate(owners):
        others = [member for member in ordered if member != owner]
        at = ordered.index(owner) if owner in ordered else 0
        out.append([others[(at + part) % len(others)]] if others else [])
    return out


def outcome(answers: Answers, workers: Sequence[MemberId], *, verify: bool) -> Outcome:
    """What `answers` of `workers` (the owner first) say; with `verify` two of them must be equal."""
    if not verify:
        return Outcome(answer=answers.get(workers[0]))
    given = {member: answers[member] for member in workers if member in answers}
    by_answer: dict[Hashable, list[MemberId]] = {}
    for member, answer in given.items():
        by_answer.setdefault(answer, []).append(member)
    right = next((answer for answer, who in by_answer.items() if len(who) >= 2), None)
    if right is not None:
        return Outcome(answer=right, liars=tuple(sorted(m for m, answer in given.items() if answer != right)))
    if len(given) < len(workers) or len(workers) < 2:
        return Outcome()
    return Outcome(ask_another=len(workers) == 2, hopeless=len(workers) > 2)
