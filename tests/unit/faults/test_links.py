"""Links that are cut or slow on purpose, as stage peers and trainers have them; those of islands: test_chaos_island."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from faults.links import LinkedTransport, Links
from faults.plan import parse_fault
from workers.store import BlobStore
from workers.transport.errors import PeerUnreachable
from workers.transport.loopback import LoopbackNetwork, LoopbackTransport

NAMES = ("peer-0", "peer-1", "trainer-0")
WAIT_S = 10.0


def links_of(name: str, *faults: str) -> Links:
    links = Links(name)
    for fault in faults:
        links.apply(parse_fault(fault, NAMES))
    return links


def test_a_call_waits_until_the_link_is_healed() -> None:
    links, passed = links_of("peer-0", "cut:peer-0"), threading.Event()

    def call() -> None:
        links.hold()
        passed.set()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    assert not passed.wait(0.1)
    links.apply(parse_fault("heal:peer-0", NAMES))
    assert passed.wait(WAIT_S)
    thread.join(WAIT_S)


def test_a_trainer_that_is_cut_from_one_peer_reaches_the_others_and_the_controller() -> None:
    links, sent = links_of("trainer-0", "cut:peer-1+trainer-0,for=60s"), list[str]()
    said = links.line(sent.append, name="out")
    said.put("to the controller")

    async def ask(peer: str) -> None:
        await links.hold_async(peer)
        sent.append(peer)

    async def asks() -> None:
        held = asyncio.get_running_loop().create_task(ask("peer-1"))
        await asyncio.wait_for(ask("peer-0"), WAIT_S)
        assert not held.done()
        links.apply(parse_fault("heal:peer-1+trainer-0", NAMES))
        await asyncio.wait_for(held, WAIT_S)

    asyncio.run(asks())
    assert sent == ["to the controller", "peer-0", "peer-1"]


@pytest.mark.parametrize("fault", ["cut:peer-0", "cut:trainer-0", "cut:peer-0+trainer-0", "cut:peer-1"])
def test_who_cannot_fetch_from_whom(fault: str) -> None:
    network, stores = LoopbackNetwork(), {name: BlobStore() for name in NAMES}
    transports = {name: LoopbackTransport(network, name, store) for name, store in stores.items()}
    links = links_of("trainer-0", fault)
    try:
        for name, transport in transports.items():
            transport.start()
            stores[name].put("blob", b"bytes")
            links.addresses[transport.address] = name
        linked = LinkedTransport(transports["trainer-0"], links)
        assert linked.address == transports["trainer-0"].address

        def fetch(name: str) -> bytes:
            [blob] = linked.fetch(transports[name].address, ("blob",), timeout_s=0.05, max_bytes=100)
            return bytes(blob.data)

        reached = {name for name in ("peer-0", "peer-1") if _succeeds(lambda name=name: fetch(name))}  # type: ignore[misc]
    finally:
        for transport in transports.values():
            transport.stop()
    cut = {"peer-0", "peer-1"} if fault == "cut:trainer-0" else {fault.removeprefix("cut:").partition("+")[0]}
    assert reached == {"peer-0", "peer-1"} - cut


def _succeeds(fetch: Callable[[], bytes]) -> bool:
    try:
        return fetch() == b"bytes"
    except PeerUnreachable as error:
        assert "cut on purpose" in str(error)
        return False


def test_whatever_passes_is_late_by_the_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    links, slept = links_of("peer-0", "delay:peer-0,by=250ms"), list[float]()
    monkeypatch.setattr("faults.links.time.sleep", slept.append)
    links.hold()
    links.late()
    assert slept == [0.25, 0.25]
    links.apply(parse_fault("delay:peer-0,by=1s,for=50ms", NAMES))
    over = threading.Event()
    for _ in range(int(WAIT_S / 0.05)):
        slept.clear()
        links.hold()
        if not slept:
            break
        over.wait(0.05)
    assert slept == [], "the delay outlived its time"
