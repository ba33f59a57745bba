"""What `Chaos` does to what passes it: contexts over a loopback transport, with real threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from faults.chaos import Chaos
from faults.links import Line
from faults.plan import parse_fault
from workers.context import IslandContext
from workers.jobs import MemberStore
from workers.messages import Batch, Envelope, Peers
from workers.records import Term
from workers.transport.errors import PeerUnreachable
from workers.transport.loopback import LoopbackNetwork, LoopbackTransport

NAMES = ("island-0", "island-1", "island-2")
WAIT_S = 10.0
TERM = Term(lineage=0, number=1, controller="c")


class Island:
    """A member as far as its context goes: what it posts and hears, and what it can fetch."""

    def __init__(self, name: str, network: LoopbackNetwork) -> None:
        self.posted: list[Envelope] = []
        self.heard: list[Batch] = []
        self.steps = 0
        store = MemberStore()
        store.put("piece/0", b"bytes")
        transport = LoopbackTransport(network, name, store)
        transport.start()
        context = IslandContext(
            spec=cast(Any, SimpleNamespace(name=name, run_dir=Path())),
            nonce=name,
            node="here",
            store=store,
            transport=transport,
            post=self.posted.append,
            clock=time.monotonic,
            on_step=self._stepped,
        )
        self.chaos = Chaos(context)
        self.context = self.chaos.context
        assert self.context.deliver is None
        self.context.deliver = self.heard.append
        peers = tuple((f"{other}.1", f"loopback://{other}", (0,)) for other in NAMES)
        self.hear(Peers(peers=peers))

    def _stepped(self) -> None:
        self.steps += 1

    def hear(self, *bodies: Any) -> None:
        assert self.context.deliver is not None
        self.context.deliver(
            Batch(run_id="r", term=TERM, name="x", incarnation=1, nonce="n", rows_from=0, rows=(), bodies=bodies)
        )

    def say(self) -> None:
        self.context.post(Envelope(run_id="r", term=TERM, name="x", incarnation=1, nonce="n", bodies=()))

    def apply(self, text: str) -> None:
        self.chaos.apply(parse_fault(text, NAMES))

    def fetch(self, other: str, timeout_s: float = WAIT_S) -> bytes:
        (blob,) = self.context.transport.fetch(f"loopback://{other}", ["piece/0"], timeout_s=timeout_s, max_bytes=100)
        return bytes(blob.data)

    def step(self) -> None:
        assert self.context.on_step is not None
        self.context.on_step()


@pytest.fixture
def islands() -> Iterator[dict[str, Island]]:
    network = LoopbackNetwork()
    made = {name: Island(name, network) for name in NAMES}
    yield made
    for island in made.values():
        island.apply(f"heal:{island.chaos.name}")
        island.context.transport.stop()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited for {what}"
        time.sleep(0.002)


def test_without_a_fault_everything_passes_at_once(islands: dict[str, Island]) -> None:
    one = islands["island-0"]
    one.say()
    one.step()
    assert (len(one.posted), len(one.heard), one.steps) == (1, 1, 1)
    assert one.fetch("island-1") == b"bytes"


def test_a_member_that_is_cut_off_says_and_hears_nothing_until_it_is_healed(islands: dict[str, Island]) -> None:
    one = islands["island-0"]
    one.apply("cut:island-0")
    for _ in range(3):
        one.say()
        one.hear()
    assert (one.posted, len(one.heard)) == ([], 1)
    with pytest.raises(PeerUnreachable, match="cut on purpose"):
        one.fetch("island-1", timeout_s=0.05)
    one.apply("heal:island-0")
    assert one.fetch("island-1") == b"bytes"
    until(lambda: (len(one.posted), len(one.heard)) == (3, 4), "what was said meanwhile")


def test_the_others_cannot_reach_it_either(islands: dict[str, Island], pool: ThreadPoolExecutor) -> None:
    one, two = islands["island-0"], islands["island-1"]
    for island in islands.values():
        island.apply("cut:island-2")
    with pytest.raises(PeerUnreachable):
        one.fetch("island-2", timeout_s=0.05)
    assert one.fetch("island-1") == b"bytes"
    one.say()
    assert len(one.posted) == 1
    waiting = pool.submit(two.fetch, "island-2")
    two.apply("heal:island-2")
    assert waiting.result(WAIT_S) == b"bytes"


def test_a_pair_that_is_cut_reaches_everybody_else(islands: dict[str, Island]) -> None:
    one, two = islands["island-0"], islands["island-1"]
    for island in (one, two):
        island.apply("cut:island-0+island-1,for=60s")
        island.say()
    assert len(one.posted) == len(two.posted) == 1
    for island, other in ((one, "island-1"), (two, "island-0")):
        with pytest.raises(PeerUnreachable):
            island.fetch(other, timeout_s=0.05)
        assert island.fetch("island-2") == b"bytes"
    one.apply("heal:island-0+island-1")
    assert one.fetch("island-1") == b"bytes"


def test_what_was_under_way_when_the_link_was_cut_does_not_arrive(islands: dict[str, Island]) -> None:
    one = islands["island-0"]
    fetch = one.chaos._inner.transport.fetch

    def cut_meanwhile(*arguments: Any, **how: Any) -> Any:
        found = fetch(*arguments, **how)
        one.apply("cut:island-0")
        return found

    one.chaos._inner.transport.fetch = cut_meanwhile  # type: ignore[method-assign]
    with pytest.raises(PeerUnreachable):
        one.fetch("island-1", timeout_s=0.05)


def test_a_fault_with_a_length_ends_by_itself_and_an_older_end_does_not_end_a_newer_one(
    islands: dict[str, Island],
) -> None:
    one = islands["island-0"]
    one.apply("cut:island-0,for=50ms")
    one.apply("cut:island-0,for=60s")
    one.say()
    threading.Event().wait(0.15)  # the first one's end has come and must not heal the second
    assert one.posted == []
    one.apply("heal:island-0")
    one.apply("cut:island-0,for=50ms")
    until(lambda: len(one.posted) == 1, "the cut to end")
    assert one.fetch("island-1") == b"bytes"


def test_a_hang_stops_the_training_thread_alone(islands: dict[str, Island], pool: ThreadPoolExecutor) -> None:
    one = islands["island-0"]
    one.apply("hang:island-0,for=200ms")
    began_s = time.monotonic()
    step = pool.submit(one.step)
    one.say()
    assert one.posted and not step.done()
    step.result(WAIT_S)
    assert time.monotonic() - began_s >= 0.19
    assert one.steps == 1


def test_slow_steps_take_so_many_times_longer(islands: dict[str, Island]) -> None:
    one = islands["island-0"]
    for _ in range(4):
        time.sleep(0.02)
        one.step()
    one.apply("slow:island-0,factor=5")
    began_s = time.monotonic()
    one.step()
    assert time.monotonic() - began_s >= 4 * 0.02 * 0.9


def test_a_delay_keeps_the_order(islands: dict[str, Island]) -> None:
    one = islands["island-0"]
    one.apply("delay:island-0,by=100ms,for=60s")
    began_s = time.monotonic()
    for number in range(5):
        one.context.post(Envelope(run_id=str(number), term=TERM, name="x", incarnation=1, nonce="n", bodies=()))
    assert one.posted == []
    until(lambda: len(one.posted) == 5, "what is late")
    assert time.monotonic() - began_s >= 0.1
    assert [envelope.run_id for envelope in one.posted] == list("01234")
    assert one.fetch("island-1") == b"bytes"


def test_a_clock_that_jumps_is_the_islands_clock(islands: dict[str, Island]) -> None:
    one = islands["island-0"]
    before = one.context.clock()
    one.apply("clock_jump:island-0,by=3600s")
    assert one.context.clock() - before >= 3600.0


def test_a_parameter_is_lost_at_the_end_of_a_step(islands: dict[str, Island]) -> None:
    one = islands["island-0"]
    weights = torch.ones(3)
    replica = SimpleNamespace(tensors={"w": weights}, lock=threading.Lock())
    cast(Any, one.context.store).replica = replica
    one.apply("nan:island-0")
    assert torch.isfinite(weights).all()
    one.step()
    one.step()
    assert torch.isnan(weights).tolist() == [True, False, False]


def test_messages_that_wait_are_not_overtaken() -> None:
    got: list[int] = []
    slow = threading.Event()

    def send(number: int) -> None:
        if number == 0:
            slow.wait(WAIT_S)
        got.append(number)

    line: Line[int] = Line(send, name="test")
    line.set(cut=True, delay_s=0.0)
    line.put(0)
    line.set(cut=False, delay_s=0.0)
    for number in range(1, 100):
        line.put(number)
    slow.set()
    until(lambda: len(got) == 100, "all messages")
    assert got == list(range(100))


def test_it_stands_around_what_a_test_has_put_there(tmp_path: Path) -> None:
    """Kills at points of an exchange and faults work together: each message passes both, in both directions."""
    from faults.inject import Injection

    posted: list[Envelope] = []
    heard: list[Batch] = []
    steps: list[int] = []
    store = MemberStore()
    inner = IslandContext(
        spec=cast(Any, SimpleNamespace(name="island-0", run_dir=tmp_path)),
        nonce="n",
        node="here",
        store=store,
        transport=LoopbackTransport(LoopbackNetwork(), "island-0", store),
        post=posted.append,
        clock=time.monotonic,
        on_step=lambda: steps.append(1),
    )
    chaos = Chaos(Injection()(inner))
    chaos.context.deliver = heard.append
    envelope = Envelope(run_id="r", term=TERM, name="x", incarnation=1, nonce="n", bodies=())
    chaos.context.post(envelope)
    assert chaos.context.deliver is not None and chaos.context.on_step is not None
    chaos.context.deliver(
        Batch(run_id="r", term=TERM, name="x", incarnation=1, nonce="n", rows_from=0, rows=(), bodies=())
    )
    chaos.context.on_step()
    assert (posted, len(heard), steps) == ([envelope], 1, [1])
    chaos.context.ended = "done"
    assert chaos.context.ended == "done"


def test_an_attack_lasts_as_long_as_it_was_asked_for(islands: dict[str, Island]) -> None:
    island = islands["island-1"]
    replica = SimpleNamespace(tamper=None, distort=None)
    cast(Any, island.context.store).replica = replica
    island.apply("sign_flip:island-1,for=100ms")
    assert replica.tamper is not None and replica.distort is None
    until(lambda: replica.tamper is None, "the attack to end")
    island.apply("lying_owner:island-1")
    assert replica.distort is not None
    assert torch.equal(replica.distort(torch.ones(2)), torch.full((2,), -10.0))
    island.apply("scale:island-1")
    assert replica.tamper is not None and replica.distort is None, "one attack at a time"


def test_healing_a_member_ends_whatever_began_there_without_an_end(islands: dict[str, Island]) -> None:
    island, other = islands["island-1"], islands["island-2"]
    replica = SimpleNamespace(tamper=None, distort=None)
    cast(Any, island.context.store).replica = replica
    cast(Any, other.context.store).replica = other_replica = SimpleNamespace(tamper=None, distort=None)
    other.apply("scale:island-2")
    for fault in ("lying_owner", "hang", "slow", "delay"):
        island.apply(f"{fault}:island-1")
    assert replica.distort is not None
    other.apply("heal:island-1")  # a cut has two ends: others hear of it too
    island.apply("heal:island-1+island-2")  # the link between two, and nothing else
    assert replica.distort is not None and other_replica.tamper is not None
    island.apply("heal:island-1")
    assert replica.tamper is None and replica.distort is None
    island.step()
    island.say()
    assert (island.steps, len(island.posted)) == (1, 1), "it hangs, or what it says is late"
    assert other_replica.tamper is not None, "nobody else is healed"
    other.apply("heal:island-2")
    assert other_replica.tamper is None
