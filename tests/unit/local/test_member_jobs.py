"""What a member does beside training: nobody writes to what is served, and what is known ahead is what comes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from strategies.config import CodecConfig, StrategyConfig
from strategies.fragments import TensorSpec, plan_fragments
from strategies.outer import Nesterov
from strategies.registry import build_strategy
from workers import member_events as ev
from workers import messages as msg
from workers.ahead import Base, DigestsAhead
from workers.config import TrainConfig
from workers.digest import digest
from workers.jobs import Jobs, MemberStore, Payloads, content_key, piece_key
from workers.record_log import RecordLog
from workers.records import MemberId, RosterEntry, Term
from workers.replica import Encoded, Replica, as_bytes
from workers.transport.base import Blob, PeerUnreachable
from workers.transport.loopback import LoopbackNetwork, LoopbackTransport

N, CHUNK = 20_000, 8192
ME = MemberId(name="island-0", incarnation=1)
EXCHANGE = msg.ExchangeId(term=Term(lineage=1, number=1, controller="c"), serial=1)


def replica_of(codec: str) -> Replica:
    strategy = build_strategy(
        StrategyConfig(inner_steps=1), CodecConfig(name=codec), lr_at=lambda progress: 1e-3, train=TrainConfig()
    )  # type: ignore[arg-type]
    specs = plan_fragments([TensorSpec(name="p", shape=(N,))], num_fragments=1, pattern="strided", chunk_values=CHUNK)
    values = torch.from_numpy(np.random.default_rng(3).normal(size=N).astype(np.float32))
    replica = Replica(specs=specs, strategy=strategy, tensors={"p": values}, total_samples=100)
    replica.make_genesis("genesis")
    values.mul_(0.99)
    return replica


def jobs_of(replica: Replica, store: MemberStore, *, threaded: bool = True) -> Jobs:
    transport = LoopbackTransport(LoopbackNetwork(), "island-0", store)
    return Jobs(
        replica=replica, store=store, transport=transport, log=RecordLog, lock=threading.RLock(), timeout_s=1.0,
        threaded=threaded,
    )  # fmt: skip


def offered(replica: Replica, store: MemberStore) -> tuple[Encoded, msg.Assign]:
    """The member's own contribution is in the store, and it alone is in the exchange."""
    encoded = replica.encode(0)
    offer = msg.Offer(
        fragment=0, base=msg.Version(n=0, chain="genesis"), seq=1, born=0, since=0, upto=1, ranges=((0, 1),),
        num_steps=1, weight=1, chunk_digests=encoded.digests, sumsq=encoded.sumsq, num_bytes=encoded.num_bytes,
    )  # fmt: skip
    entry = RosterEntry(
        member=ME.name, incarnation=1, seq=1, since=0, upto=1, ranges=((0, 1),), num_steps=1, coefficient=1.0
    )
    for chunk, payload in enumerate(encoded.payloads):
        store.put(piece_key(0, entry.offer, chunk), as_bytes(payload), digest_hex=encoded.digests[chunk])
    num_chunks = len(encoded.payloads)
    assign = msg.Assign(
        fragment=0, exchange=EXCHANGE, attempt=1, base=offer.base, base_samples=0, roster=(entry,), roster_digest="r",
        owners=(ME,) * num_chunks, owner_addresses=(), offers=((ME, "", offer),),
    )  # fmt: skip
    return encoded, assign


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4", "fp4", "e3m0", "sign", "topk"])
def test_what_is_served_is_not_written_to(codec: str) -> None:
    """Pieces and results are read where they lie; a reader elsewhere checks their digests."""
    replica, store = replica_of(codec), MemberStore()
    jobs = jobs_of(replica, store)
    encoded, assign = offered(replica, store)
    reduced = jobs.reduce(ev.Reduce(assign=assign, chunks=tuple(range(len(encoded.payloads)))))
    assert isinstance(reduced, ev.ChunksReduced)
    digests = tuple(digest_hex for _, digest_hex in reduced.chunks)
    computed = jobs.compute_next(ev.ComputeNext(assign=assign, chunk_digests=digests))
    assert isinstance(computed, ev.NextComputed)
    payloads = jobs.payloads(0, digests)
    assert payloads is not None
    replica.apply(0, payloads, n=1, chain="one", base_samples=0, sealed=computed.digest, included=True)
    for key in store.keys():
        blob = store.find(key)
        assert blob is not None and digest(blob.data) == blob.digest, key


class InParts:
    """Tells of each blob before the fetch returns, as a stream does, and may fail after some of them."""

    def __init__(self, source: MemberStore, *, fail_after: int | None = None) -> None:
        self.source, self.fail_after = source, fail_after

    def fetch(self, address: str, keys: Sequence[str], **how: Any) -> list[Blob]:
        blobs = []
        for number, key in enumerate(keys):
            if number == self.fail_after:
                raise PeerUnreachable(peer=address, cause="it is gone")
            found = self.source.find(key)
            assert found is not None
            blobs.append(Blob(key=key, data=np.frombuffer(found.data, np.uint8).copy(), digest=found.digest))
            how["on_blob"](blobs[-1])
        return blobs


def test_a_knock_is_answered_by_whoever_serves() -> None:
    network = LoopbackNetwork()
    here, there = (LoopbackTransport(network, name, MemberStore()) for name in ("island-0", "island-1"))
    jobs = jobs_of(replica_of("fp32"), MemberStore())
    jobs.transport = here
    here.start()
    knock = ev.Knock(member=MemberId(name="island-1", incarnation=1), address=there.address)
    assert jobs.do(knock) == ev.Knocked(member=knock.member, reached=False)
    there.start()
    assert jobs.do(knock) == ev.Knocked(member=knock.member, reached=True)
    for transport in (here, there):
        transport.stop()


@pytest.mark.parametrize("fail_after", [None, 2])
def test_pieces_are_told_of_as_they_come(fail_after: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In groups, so that their reduction begins before the last one is here; each chunk exactly once."""
    replica, theirs, mine = replica_of("fp32"), MemberStore(), MemberStore()
    encoded, assign = offered(replica, theirs)
    monkeypatch.setattr("workers.jobs.PIECES_AT_ONCE_BYTES", 2 * encoded.payloads[0].numel())
    told: list[ev.Event] = []
    jobs = jobs_of(replica, mine)
    jobs.transport, jobs.post = InParts(theirs, fail_after=fail_after), told.append  # type: ignore[assignment]
    chunks = tuple(range(len(encoded.payloads)))
    assert len(chunks) == 3
    by, _, offer = assign.offers[0]
    last = jobs.fetch_pieces(ev.FetchPieces(fragment=0, offer_by=by, address="a", offer=offer, chunks=chunks))
    (first,) = told
    assert isinstance(first, ev.PiecesFetched) and first.chunks == (0, 1)
    assert isinstance(last, ev.PiecesFailed if fail_after else ev.PiecesFetched) and last.chunks == (2,)
    assert all(mine.find(piece_key(0, first.offer, chunk)) is not None for chunk in first.chunks)


def test_what_a_fetch_that_failed_did_not_tell_of_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what comes when it is over: a stream that is abandoned may still bring a blob."""
    replica, theirs, mine = replica_of("fp32"), MemberStore(), MemberStore()
    _, assign = offered(replica, theirs)
    jobs, told = jobs_of(replica, mine), list[ev.Event]()
    late: list[Callable[[], None]] = []
    source = InParts(theirs, fail_after=1)

    class Late(InParts):
        def fetch(self, address: str, keys: Sequence[str], **how: Any) -> list[Blob]:
            found = theirs.find(keys[2])
            assert found is not None
            blob = Blob(key=keys[2], data=np.frombuffer(found.data, np.uint8).copy(), digest=found.digest)
            late.append(lambda: how["on_blob"](blob))
            return source.fetch(address, keys, **how)

    jobs.transport, jobs.post = Late(theirs), told.append  # type: ignore[assignment]
    by, _, offer = assign.offers[0]
    event = jobs.fetch_pieces(ev.FetchPieces(fragment=0, offer_by=by, address="a", offer=offer, chunks=(0, 1, 2)))
    assert isinstance(event, ev.PiecesFailed) and event.chunks == (0, 1, 2) and not told
    late[0]()
    assert not mine.keys("piece") and not told


def test_a_piece_with_other_content_than_announced_is_refused() -> None:
    replica, theirs, mine = replica_of("fp32"), MemberStore(), MemberStore()
    _, assign = offered(replica, theirs)
    by, _, offer = assign.offers[0]
    key = piece_key(0, assign.roster[0].offer, 1)
    theirs.put(key, b"something else")
    jobs = jobs_of(replica, mine)
    jobs.transport = InParts(theirs)  # type: ignore[assignment]
    event = jobs.fetch_pieces(ev.FetchPieces(fragment=0, offer_by=by, address="a", offer=offer, chunks=(0, 1, 2)))
    assert isinstance(event, ev.PieceRejected) and "chunk 1" in event.why
    assert mine.find(key) is None


def test_results_are_stepped_as_they_come_and_malformed_ones_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    replica, theirs, mine = replica_of("fp32"), MemberStore(), MemberStore()
    encoded, assign = offered(replica, theirs)
    chunks = tuple(range(len(encoded.payloads)))
    reduced = jobs_of(replica, theirs).reduce(ev.Reduce(assign=assign, chunks=chunks))
    assert isinstance(reduced, ev.ChunksReduced)
    jobs = jobs_of(replica, mine)
    jobs.transport = InParts(theirs)  # type: ignore[assignment]
    fetch = ev.FetchResults(
        fragment=0, n=1, address="a", roster_digest="r", chunks=chunks, digests=(), assign=assign
    )  # fmt: skip
    fetched = jobs.do(fetch)
    assert isinstance(fetched, ev.ResultsFetched) and fetched.chunks == reduced.chunks
    with monkeypatch.context() as patch:
        patch.setattr(Replica, "next_chunk_digests", lambda *_, **__: pytest.fail("all of them are known"))
        computed = jobs.do(ev.ComputeNext(assign=assign, chunk_digests=tuple(d for _, d in fetched.chunks)))
    again = jobs.do(ev.ComputeNext(assign=assign, chunk_digests=tuple(d for _, d in fetched.chunks)))
    assert isinstance(computed, ev.NextComputed) and computed == again
    theirs.put("result/0/r/1", b"no payload at all")
    mine.discard("result")
    failed = jobs.do(fetch)
    assert isinstance(failed, ev.ResultsFailed) and "chunk 1 is malformed" in failed.why
    assert not mine.keys("result")


def test_a_payload_keeps_its_memory_after_it_was_dropped_from_the_store() -> None:
    class Owner(np.ndarray):  # type: ignore[type-arg]
        pass

    store, memory = MemberStore(), np.arange(100, dtype=np.uint8).view(Owner)
    gone = weakref.ref(memory)
    digest_hex = store.put(content_key(0, "x"), memory)
    data = store.get(content_key(0, "x"))
    assert data is not None
    payload = Payloads([data])[0][10:20]
    store.discard("content")
    del memory, data
    gc.collect()
    assert gone() is not None and payload.tolist() == list(range(10, 20)) and digest_hex
    del payload
    gc.collect()
    assert gone() is None
    assert Payloads([memoryview(b"")])[0].numel() == 0


@pytest.mark.parametrize("threaded", [True, False])
def test_own_chunks_are_stepped_ahead_and_the_digest_is_the_same(
    threaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica, store = replica_of("fp32"), MemberStore()
    jobs = jobs_of(replica, store, threaded=threaded)
    encoded, assign = offered(replica, store)
    last = len(encoded.payloads) - 1
    reduced = [jobs.reduce(ev.Reduce(assign=assign, chunks=chunks)) for chunks in (tuple(range(last)), (last,))]
    digests = tuple(d for event in reduced if isinstance(event, ev.ChunksReduced) for _, d in event.chunks)
    stepped: list[int] = []
    real = Replica.next_chunk_digests

    def counted(self: Replica, fragment: int, chunk: int, *rest: object, **options: object) -> list[str]:
        stepped.append(chunk)
        return real(self, fragment, chunk, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Replica, "next_chunk_digests", counted)
    found = [jobs.compute_next(ev.ComputeNext(assign=assign, chunk_digests=digests)) for _ in range(2)]
    assert all(isinstance(event, ev.NextComputed) for event in found)
    assert len({event.digest for event in found if isinstance(event, ev.NextComputed)}) == 1
    everything = list(range(last + 1))
    assert stepped == (everything if threaded else 2 * everything), "what was known is used once, then looked at anew"


def test_what_is_known_ahead_belongs_to_one_anchor_one_outer_step_and_one_result() -> None:
    outer = Nesterov(lr=0.7, momentum=0.9)
    base, ahead = Base(chain="a", outer=outer, base_samples=5), DigestsAhead()
    ahead.put(0, base, 0, "r0", ["x", "y"])
    ahead.put(0, base, 1, "r1", ["z"])
    ahead.put(1, base, 1, "r1", ["of another fragment"])
    assert ahead.take(0, base, ["r0", "another result"]) == {0: ("x", "y")}
    assert ahead.take(0, base, ["r0", "r1"]) == {}, "it is used once"
    for other in (
        Base(chain="b", outer=outer, base_samples=5),
        Base(chain="a", outer=Nesterov(lr=0.5, momentum=0.9), base_samples=5),
        Base(chain="a", outer=outer, base_samples=6),
    ):
        ahead.put(0, base, 0, "r0", ["x"])
        assert ahead.take(0, other, ["r0"]) == {}
        ahead.put(0, base, 0, "r0", ["x"])
        ahead.put(0, other, 1, "r1", ["y"])
        assert ahead.take(0, other, ["r0", "r1"]) == {1: ("y",)}
