"""What members of a pair say to each other: as bytes, and from store to store over both transports."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from workers.pair import KEPT_OUTCOMES, Abort, Commit, Commitment, Offer, PairId, Peer, Ready
from workers.pair_mail import MAX_WHY_CHARS, BadPairMessage, Heard, PairMail, decode_message, encode_message
from workers.records import MemberId
from workers.store import BlobStore
from workers.transport.base import Blob, PeerUnreachable, Transport, TransportError, Unauthorized
from workers.transport.flight import FlightTransport
from workers.transport.loopback import LoopbackNetwork, LoopbackTransport

pytestmark = pytest.mark.timeout(60)

A, B, C = (MemberId(name=f"island-{i}", incarnation=1) for i in range(3))
PAIR = PairId(round_=7, members=(A, B))
BEFORE = Commitment(pair=PairId(round_=6, members=(C, A)), spans=((0, 4), (1, 3)))
SAID: tuple[Peer, ...] = (
    Offer(pair=PAIR, sender=A, since=3, upto=9, digest="d" * 32, rests_on=(BEFORE,)),
    Ready(pair=PAIR, sender=A),
    Commit(pair=PAIR, sender=A),
    Abort(pair=PAIR, sender=A, why="b.1 did not come in time"),
)
WAIT_S = 20.0


@pytest.mark.parametrize("message", SAID, ids=lambda message: type(message).__name__)
def test_a_message_is_what_it_was(message: Peer) -> None:
    raw = encode_message(message)
    assert decode_message(raw, pair=PAIR, sender=A) == message
    for other in (raw[:-1], raw.replace(b"island-0", b"island-9"), raw.replace(b'"round": 7', b'"round": 8')):
        with pytest.raises(BadPairMessage):
            decode_message(other, pair=PAIR, sender=A)
    with pytest.raises(BadPairMessage, match=r"of another member than island-1\.1"):
        decode_message(raw, pair=PAIR, sender=B)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "report"}, {"kind": ["offer"]}, {"kind": None}, {"since": -1}, {"since": 10}, {"since": 1.5},
        {"upto": True}, {"digest": 3}, {"more": 1}, {"members": "all"}, {"sender": None}, {"rests_on": None},
        {"rests_on": [6]}, {"rests_on": [[6, []]]}, {"rests_on": [[True, [["a", 1, 0, 4]]]]},
        {"rests_on": [[6, [["a", 1, 4, 0]]]]}, {"rests_on": [[6, [["a", 1.0, 0, 4]]]]}, {"rests_on": [[6, ["a"]]]},
    ],
)  # fmt: skip
def test_what_no_member_says_is_refused(change: dict[str, object]) -> None:
    fields = json.loads(encode_message(SAID[0])) | change
    with pytest.raises(BadPairMessage):
        decode_message(json.dumps(fields).encode(), pair=PAIR, sender=A)
    for raw in (b"", b"[]", b"7", b"[" * 100_000, b"\xff"):
        with pytest.raises(BadPairMessage):
            decode_message(raw, pair=PAIR, sender=A)


def test_a_reason_has_an_end() -> None:
    said = decode_message(encode_message(Abort(pair=PAIR, sender=A, why="x" * 9999)), pair=PAIR, sender=A)
    assert isinstance(said, Abort) and said.why == "x" * MAX_WHY_CHARS


# ---------------------------------------------------------------- over a transport


class Faulty:
    """A transport whose first fetches fail."""

    def __init__(self, inner: Transport, failures: int = 0) -> None:
        self.inner, self.failures, self.errors = inner, failures, list[TransportError]()
        self.keys: list[str] = []
        self.failed = threading.Event()

    def fetch(self, address: str, keys: Sequence[str], **how: Any) -> list[Blob]:
        self.keys += keys
        try:
            if self.failures:
                self.failures -= 1
                raise PeerUnreachable(peer=address, cause="cut on purpose")
            return self.inner.fetch(address, keys, **how)
        except TransportError as error:
            self.errors.append(error)
            self.failed.set()
            raise


class Member:
    """One side of a pair: store, transport, mail, and what it heard."""

    def __init__(self, me: MemberId, transport: Callable[[BlobStore], Transport], pool: ThreadPoolExecutor) -> None:
        self.me, self.store = me, BlobStore()
        self.transport = transport(self.store)
        self.faulty = Faulty(self.transport)
        self.jobs: queue.SimpleQueue[Heard | None] = queue.SimpleQueue()

        def do(job: Callable[[], Heard | None]) -> None:
            pool.submit(lambda: self.jobs.put(job()))

        self.mail = PairMail(
            store=self.store, transport=self.faulty, do=do, retry_s=0.05, waits=True  # type: ignore[arg-type]
        )  # fmt: skip

    def hear(self, other: Member, pairs: tuple[PairId, ...] = (PAIR,)) -> Peer | None:
        """The next message of the other one."""
        self.mail.listen(self.me, pairs, lambda member: other.transport.address if member == other.me else None)
        heard = self.jobs.get(timeout=WAIT_S)
        return self.mail.hear(heard) if heard is not None else None


@pytest.fixture(params=["loopback", "flight"])
def pair_of(request: pytest.FixtureRequest) -> Iterator[Callable[..., tuple[Member, Member]]]:
    network = LoopbackNetwork()
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(8))

        def make(*tokens: str) -> tuple[Member, Member]:
            members = []
            for me, token in zip((A, B), tokens or ("token", "token"), strict=True):

                def transport(store: BlobStore, me: MemberId = me, token: str = token) -> Transport:
                    if request.param == "loopback":
                        return LoopbackTransport(network, str(me), store)
                    return FlightTransport(store, host="127.0.0.1", token=token, num_connections=1)

                member = Member(me, transport, pool)
                member.transport.start()
                stack.callback(member.transport.stop)
                stack.callback(member.mail.close)
                members.append(member)
            return members[0], members[1]

        yield make


def test_messages_come_in_their_order_and_once_whenever_they_are_said(pair_of: Callable[..., Any]) -> None:
    a, b = pair_of()
    a.mail.say(B, SAID[0])
    a.mail.say(C, Ready(pair=PAIR, sender=A))  # not for b
    assert b.hear(a) == SAID[0]
    threading.Timer(0.05, lambda: [a.mail.say(B, m) for m in (*SAID[:3], *SAID[1:])]).start()  # some of it again
    assert [b.hear(a) for _ in SAID[1:]] == list(SAID[1:])
    assert len(a.store.keys(f"said/7/{A}/{B}")) == len(SAID), "what is said again does not lie there twice"
    assert not any(str(C) in key for key in b.faulty.keys)


def test_a_fetch_that_failed_is_made_again(pair_of: Callable[..., Any]) -> None:
    a, b = pair_of()
    b.faulty.failures = 2
    a.mail.say(B, SAID[0])
    assert b.hear(a) == SAID[0]
    assert [type(error) for error in b.faulty.errors] == [PeerUnreachable] * 2, "the fault did not fire"


def test_an_exchange_that_is_over_is_not_listened_to(pair_of: Callable[..., Any]) -> None:
    a, b = pair_of()
    b.mail.listen(B, (PAIR,), lambda member: a.transport.address)
    later = PairId(round_=8, members=(B, A))
    a.mail.say(B, Ready(pair=later, sender=A))
    heard = []
    b.mail.listen(B, (later,), lambda member: a.transport.address)
    while len(heard) < 2:  # the one that waited ends without a word
        job = b.jobs.get(timeout=WAIT_S)
        heard.append(b.mail.hear(job) if job is not None else None)
    assert [message for message in heard if message] == [Ready(pair=later, sender=A)]
    assert b.mail.hear(Heard(message=SAID[0], number=0)) is None, "it came too late"


def test_who_says_what_is_no_message_is_not_listened_to(pair_of: Callable[..., Any]) -> None:
    a, b = pair_of()
    a.store.put(f"said/7/{A}/{B}/0", encode_message(Ready(pair=PAIR, sender=B)))  # in the name of somebody else
    assert b.hear(a) is None
    assert b.mail.num_bad == 1
    b.mail.listen(B, (PAIR,), lambda member: a.transport.address)
    assert b.jobs.empty() and len(b.faulty.keys) == 1, "it is not asked again"


def test_who_has_another_token_hears_nothing() -> None:
    with ThreadPoolExecutor(2) as pool:
        members = [
            Member(me, lambda store, t=token: FlightTransport(store, host="127.0.0.1", token=t), pool)  # type: ignore[misc]
            for me, token in ((A, "of this run"), (B, "of another one"))
        ]
        a, b = members
        for member in members:
            member.transport.start()
        try:
            a.mail.say(B, SAID[0])
            b.mail.listen(B, (PAIR,), lambda member: a.transport.address)
            assert b.faulty.failed.wait(WAIT_S)
            assert isinstance(b.faulty.errors[0], Unauthorized) and b.jobs.empty()
        finally:
            for member in members:
                member.mail.close()
                member.transport.stop()


def test_what_was_said_in_old_rounds_is_forgotten() -> None:
    store = BlobStore()
    mail = PairMail(store=store, transport=LoopbackTransport(LoopbackNetwork(), "a", store), do=lambda job: None,
                    retry_s=1.0, waits=True)  # fmt: skip
    for round_ in range(3 * KEPT_OUTCOMES):
        mail.say(B, Ready(pair=PairId(round_=round_, members=(A, B)), sender=A))
    assert store.keys("said") == [f"said/{n}/{A}/{B}/0" for n in range(2 * KEPT_OUTCOMES, 3 * KEPT_OUTCOMES)]
    mail.close()
    assert not store.keys("said")
