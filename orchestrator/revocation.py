"""Taking back a commit that nobody holds any more (protocol 1.8, C1, H12).

Reports only raise the question; the decision rests on promises. Every live member is asked with a nonce; "I lack it"
is a promise not to fetch or apply that version until the question is void. One "I hold it", or the head moving, ends
the question. Pure; the clock is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from orchestrator.membership import Process
from workers import messages as msg
from workers.messages import FragmentReport, Version
from workers.records import MemberId, RevokeRecord

ASK_AFTER_S = 2.0
ASK_AGAIN_S = 1.0

Tell = Callable[[MemberId, msg.ControllerBody], None]


@dataclass(kw_only=True, slots=True)
class Question:
    """An open question about one version."""

    version: Version
    nonce: int
    asked_s: float
    answers: dict[MemberId, tuple[bool, int]] = field(default_factory=dict)


def nobody_reports(processes: Collection[Process], fragment: int, head: Version) -> bool:
    """Whether no live member's last report claims to hold the head, and one could go on from an older version."""
    behind = False
    for process in processes:
        report = process.report(fragment)
        if report is None or report.n >= head.n or report.holds_next:
            return False
        behind = behind or report.n >= 0
    return behind


def all_promise(question: Question, processes: Collection[Process]) -> bool:
    """Whether every live member promised not to have nor to fetch it, and one holds an older version."""
    answers = [question.answers.get(process.id) for process in processes]
    if not answers or any(a is None or not a[0] for a in answers):
        return False
    return any(a is not None and a[1] >= 0 for a in answers)


class Revocations:
    """At most one open question per fragment."""

    def __init__(self) -> None:
        """No questions."""
        self.open: dict[int, Question] = {}
        self.since: dict[int, float] = {}
        self.counter = 0

    def answer(self, member: MemberId, body: msg.RevokeAnswer) -> None:
        """A member answered; a stale nonce is ignored, a "yes" ends the question."""
        question = self.open.get(body.fragment)
        if question is None or question.nonce != body.nonce:
            return
        if not body.lacks:
            del self.open[body.fragment]
        else:
            question.answers[member] = (True, body.n)

    def release_barred(self, member: MemberId, fragment: int, report: FragmentReport | None, tell: Tell) -> None:
        """A member bound by a void question is released."""
        question = self.open.get(fragment)
        if report is not None and report.barred is not None and (question is None or question.nonce != report.barred):
            tell(member, msg.RevokeCancel(fragment=fragment, nonce=report.barred))

    def step(
        self, fragment: int, head: Version, processes: Collection[Process], now: float, tell: Tell, *, all_live: bool
    ) -> RevokeRecord | None:
        """Raise, repeat, void or decide the question about `head`; returns the record when it is decided."""
        question = self.open.get(fragment)
        if question is not None and question.version != head:
            del self.open[fragment]
            for process in processes:
                tell(process.id, msg.RevokeCancel(fragment=fragment, nonce=question.nonce))
            question = None
        if question is None:
            if head.n == 0 or not all_live or not nobody_reports(processes, fragment, head):
                self.since.pop(fragment, None)
                return None
            if now - self.since.setdefault(fragment, now) < ASK_AFTER_S:
                return None
            self.counter += 1
            question = self.open[fragment] = Question(version=head, nonce=self.counter, asked_s=now - ASK_AGAIN_S)
        if all_live and all_promise(question, processes):
            del self.open[fragment]
            self.since[fragment] = now - ASK_AFTER_S  # the version before may be held by nobody either: ask at once
            return RevokeRecord(fragment=fragment, n=head.n, chain=head.chain)
        if now - question.asked_s >= ASK_AGAIN_S:
            question.asked_s = now
            for process in processes:
                tell(process.id, msg.RevokeQuery(fragment=fragment, version=head, nonce=question.nonce))
        return None
