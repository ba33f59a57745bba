"""The base of a member's machine: who it is, what it was told, and how it speaks."""

from __future__ import annotations

from collections.abc import Sequence

from workers import member_events as ev
from workers import messages as msg
from workers import ranges
from workers.apart import Apart
from workers.copies import Copy
from workers.fragment_state import FragmentState
from workers.pace import Pace
from workers.ranges import Range
from workers.record_log import RecordLog
from workers.records import MemberId, Term
from workers.shares import StepTimes


class MemberCore:
    """Identity, leases, journal copy and state of one process."""

    def __init__(self, *, run_id: str, name: str, nonce: str, info: msg.ProcessInfo, num_chunks: Sequence[int]) -> None:
        """`nonce`: unique to this process; `num_chunks`: chunks of each fragment."""
        self.run_id, self.name, self.info = run_id, name, info
        self.first_nonce, self.lives = nonce, 0
        self.nonce = nonce
        self.incarnation: int | None = None
        self.term: Term | None = None
        self.log = RecordLog()
        self.num_chunks = tuple(num_chunks)
        self.fragments = [FragmentState() for _ in num_chunks]
        self.leases: list[Range] = []
        self.consumed = 0
        self.steps = 0
        self.step_times = StepTimes()
        self.tail = False
        self.leaving = self.dismissed = False
        self.told: dict[type, tuple[tuple[int, int], int]] = {}
        self.told_peers: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
        self._peers: dict[str, tuple[str, tuple[int, ...]]] | None = None
        self.apart = Apart()
        self.reset_wanted = ""
        self.building = False
        self.built: msg.GenesisMade | None = None
        self.dropped_to: int | None = None
        self.drop_asked = ""
        self.stop_asked_s = float("-inf")
        self.still = False  # it has saved its state for a stop, and brings about no version that the state lacks
        self.may_rewrite = False  # a new lineage may replace rows that only the lost journal had
        self.waiting = ""
        self.pace = Pace()
        self.bytes_sent = 0
        self.copy: Copy | None = None  # of this member's local state, for a buddy to fetch
        self.kept: tuple[Copy, ...] = ()
        self.stale = 0
        self.out: list[ev.Command] = []
        self.now = 0.0
        self.join_s = float("-inf")

    def envelope(self, *bodies: msg.MemberBody) -> msg.Envelope:
        """Bodies in an envelope of this process."""
        return msg.Envelope(
            run_id=self.run_id,
            term=self.term,
            name=self.name,
            incarnation=self.incarnation,
            nonce=self.nonce,
            bodies=bodies,
        )

    @property
    def id(self) -> MemberId:
        """Name and incarnation; only after `Welcome`."""
        assert self.incarnation is not None, "not a member yet"
        return MemberId(name=self.name, incarnation=self.incarnation)

    @property
    def peers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Address of each member by name, with the version that it has of each fragment; made when it is asked for."""
        if self._peers is None:
            self._peers = {name: (address, held) for name, address, held in self.told_peers}
        return self._peers

    def hear_of_peers(self, peers: tuple[tuple[str, str, tuple[int, ...]], ...]) -> None:
        """Who is here, as the controller tells it."""
        self.told_peers, self._peers = peers, None

    def num_leased(self) -> int:
        """Samples leased to this incarnation."""
        return ranges.count(self.leases)

    # ------------------------------------------------------------ speaking

    def _post(self, body: msg.MemberBody) -> None:
        self.out.append(ev.Post(body=body))

    def _hello(self) -> None:
        if self.incarnation is None:
            return
        reports = []
        for fragment, state in enumerate(self.fragments):
            record = self.log.next(fragment, state.chain) if state.n >= 0 else None
            reports.append(
                msg.FragmentReport(
                    n=state.n, chain=state.chain,
                    barred=state.barred[1] if state.barred else None, watermark=state.watermark,
                    holds_next=record is not None and set(record.chunk_digests) <= state.content,
                    exchange=state.assign.exchange if state.assign else None,
                    attempt=state.assign.attempt if state.assign else 0, spread=state.spread is not None,
                )
            )  # fmt: skip
        self._post(
            msg.Hello(
                info=self.info, journal_len=len(self.log), num_leased=self.num_leased(), consumed=self.consumed,
                steps=self.steps, bytes_sent=self.bytes_sent, fragments=tuple(reports), waiting=self.waiting,
                doing=self.pace.doing, doing_s=max(self.now - self.pace.since_s, 0.0),
                step_s=self.pace.usual_step_s(),
                median_step_s=self.step_times.median_s, copy=self.copy, kept=self.kept,
            )
        )  # fmt: skip

    def _want_reset(self, why: str) -> None:
        if self.dismissed:  # it would begin a new incarnation, and is not wanted any more
            return
        self.reset_wanted, self.dropped_to, self.drop_asked = why, None, ""
        for state in self.fragments:
            state.assign, state.spread, state.have, state.announced = None, None, None, {}
        self.out.append(ev.Wake())

    def _lose_state(self, fragment: int, fault: str, detail: str) -> None:
        self._post(msg.FaultSeen(fault=fault, detail=detail))
        self.fragments[fragment].n, self.fragments[fragment].chain = -1, ""
        self._want_reset(f"{fault}: {detail}")
