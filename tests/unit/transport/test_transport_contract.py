"""What holds for every transport, tested on the loopback and on Flight alike."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.unit.transport.support import TOKEN, WrappedStore, flip_one_bit, random_bytes, store_with, wait_for
from workers.digest import digest
from workers.store import BlobSource, BlobStore, content_key
from workers.transport.base import (
    Blob,
    BlobCorrupt,
    BlobMissing,
    BlobTooLarge,
    Cancelled,
    CancelToken,
    PeerUnreachable,
    Transport,
    TransportTimeout,
)
from workers.transport.flight import FlightTransport
from workers.transport.loopback import LoopbackNetwork, LoopbackTransport

Build = Callable[[BlobSource], Transport]


@pytest.fixture(params=["loopback", "flight"])
def build(request: pytest.FixtureRequest) -> Iterator[Build]:
    """A way to make started transports that are stopped after the test."""
    network, built = LoopbackNetwork(), list[Transport]()

    def build_one(store: BlobSource) -> Transport:
        transport: Transport = (
            LoopbackTransport(network, f"m{len(built)}", store)
            if request.param == "loopback"
            else FlightTransport(store, host="127.0.0.1", token=TOKEN)
        )
        transport.start()
        built.append(transport)
        return transport

    yield build_one
    for transport in built:
        transport.stop()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("atoll-")]


def test_blobs_come_in_the_order_of_their_keys(build: Build) -> None:
    # Empty, one byte, odd, just around a batch, and large enough to be cut over all streams.
    sizes = {"a": 0, "b": 1, "c": 4097, "d": (1 << 20) - 1, "e": (1 << 20) + 1, "f": (5 << 20) + 3, "g": 0}
    blobs = {key: random_bytes(size, seed=size) for key, size in sizes.items()}
    server, client = build(store_with(**blobs)), build(BlobStore())
    order = ["f", "a", "c", "g", "e", "b", "d"]
    total = sum(sizes.values())
    fetched = client.fetch(server.address, order, timeout_s=20, max_bytes=total)
    assert [blob.key for blob in fetched] == order
    for blob in fetched:
        assert blob.data.dtype == np.uint8 and blob.data.ndim == 1 and blob.data.flags.writeable
        assert np.array_equal(blob.data, blobs[blob.key]) and blob.digest == digest(blobs[blob.key])
    assert server.bytes_sent == client.bytes_received == total
    assert server.bytes_received == client.bytes_sent == 0


def test_blobs_are_told_of_as_they_come(build: Build) -> None:
    """Also those that came before the fetch failed."""
    store = store_with(a=random_bytes(3 << 20), b=random_bytes(10))
    server, client = build(store), build(BlobStore())
    told: list[Blob] = []
    first_is_here = threading.Event()

    def on_blob(blob: Blob) -> None:
        told.append(blob)
        first_is_here.set()

    def put_when_told() -> None:
        assert first_is_here.wait(20)
        store.put("c", random_bytes(0))

    waits = isinstance(server, FlightTransport)  # the other one answers when it has everything
    if not waits:
        first_is_here.set()
    helper = threading.Thread(target=put_when_told)
    helper.start()
    fetched = client.fetch(
        server.address, ["a", "b", "c"], timeout_s=20, wait_s=20, max_bytes=4 << 20, on_blob=on_blob
    )  # fmt: skip
    helper.join()
    assert sorted(blob.key for blob in told) == ["a", "b", "c"]
    assert {blob.key: blob.digest for blob in told} == {blob.key: blob.digest for blob in fetched}
    told.clear()
    with pytest.raises(BlobMissing):
        client.fetch(server.address, ["a", "none"], timeout_s=20, max_bytes=4 << 20, on_blob=on_blob)
    assert [blob.key for blob in told] in (["a"], [])


def test_receiver_owns_its_memory(build: Build) -> None:
    original = random_bytes(1000)
    server, client = build(store_with(a=original)), build(BlobStore())
    first, second = (client.fetch(server.address, ["a"], timeout_s=5, max_bytes=1000)[0].data for _ in range(2))
    first[:] = 0
    assert np.array_equal(second, original) and original.any()


def test_alias_is_served(build: Build) -> None:
    store = BlobStore()
    alias = content_key(store.put("result/1", b"abc", content_key=content_key(digest(b"abc"))))
    blob = build(BlobStore()).fetch(build(store).address, [alias], timeout_s=5, max_bytes=3)[0]
    assert blob.data.tobytes() == b"abc" and alias == content_key(blob.digest)


def test_no_keys_no_blobs(build: Build) -> None:
    assert build(BlobStore()).fetch(build(BlobStore()).address, [], timeout_s=1, max_bytes=0) == []


def test_missing_keys_are_named_and_nothing_is_lost(build: Build) -> None:
    server, client = build(store_with(a=b"1234")), build(BlobStore())
    with pytest.raises(BlobMissing, match=r"'b'.*2 of 3 keys") as caught:
        client.fetch(server.address, ["a", "b", "c"], timeout_s=5, max_bytes=100)
    assert caught.value.keys == ("b", "c") and caught.value.peer == server.address
    assert client.fetch(server.address, ["a"], timeout_s=5, max_bytes=100)[0].data.tobytes() == b"1234"


def test_waits_for_keys_that_are_still_being_made(build: Build) -> None:
    store = BlobStore()
    watched = WrappedStore(store)
    server, client = build(watched), build(BlobStore())
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.fetch, server.address, ["a", "b"], timeout_s=20, wait_s=20, max_bytes=4 << 20)
        wait_for(watched.waiting.is_set, "the fetch to wait")
        store.put("b", b"B")
        store.put("a", b"A" * (2 << 20))
        assert [blob.data.nbytes for blob in future.result(20)] == [2 << 20, 1]


def test_gives_up_when_the_wait_is_over(build: Build) -> None:
    with pytest.raises(BlobMissing):
        build(BlobStore()).fetch(build(BlobStore()).address, ["a"], timeout_s=10, wait_s=0.05, max_bytes=1)


def test_gives_up_when_what_it_waits_for_is_of_no_use_any_more(build: Build) -> None:
    """A newcomer waited 30 s for a result that was committed and whose name was forgotten; all waited for it."""
    began, asked = time.monotonic(), []
    with pytest.raises(BlobMissing) as caught:
        build(BlobStore()).fetch(
            build(BlobStore()).address,
            ["a"],
            timeout_s=40,
            wait_s=30,
            give_up=lambda: not asked.append(time.monotonic()),  # type: ignore[func-returns-value]
            max_bytes=1,
        )
    assert caught.value.keys == ("a",) and len(asked) == 1
    assert time.monotonic() - began < 10


def test_gives_up_when_the_time_is_over(build: Build) -> None:
    started = time.monotonic()
    with pytest.raises(TransportTimeout):
        build(BlobStore()).fetch(build(BlobStore()).address, ["a"], timeout_s=0.1, wait_s=10, max_bytes=1)
    assert time.monotonic() - started < 2


def test_more_than_max_bytes_is_refused(build: Build) -> None:
    server, client = build(store_with(a=b"1234", b=b"5678")), build(BlobStore())
    assert len(client.fetch(server.address, ["a", "b"], timeout_s=5, max_bytes=8)) == 2
    with pytest.raises(BlobTooLarge, match="max_bytes=7"):
        client.fetch(server.address, ["a", "b"], timeout_s=5, max_bytes=7)


def test_corrupt_bytes_are_refused_and_another_holder_serves(build: Build) -> None:
    data = random_bytes(3 << 20)
    honest = store_with(a=data)
    corrupt, healthy, client = build(WrappedStore(honest, flip_one_bit)), build(honest), build(BlobStore())
    with pytest.raises(BlobCorrupt, match=r"'a'.*digest"):
        client.fetch(corrupt.address, ["a"], timeout_s=5, max_bytes=4 << 20)
    assert np.array_equal(client.fetch(healthy.address, ["a"], timeout_s=5, max_bytes=4 << 20)[0].data, data)


def test_buffer_changed_after_it_was_put_is_noticed(build: Build) -> None:
    data = random_bytes(1000)
    server, client = build(store_with(a=data)), build(BlobStore())
    data[0] ^= 1
    with pytest.raises(BlobCorrupt):
        client.fetch(server.address, ["a"], timeout_s=5, max_bytes=1000)


def test_cancel_from_another_thread_ends_a_waiting_fetch(build: Build) -> None:
    watched, token = WrappedStore(BlobStore()), CancelToken()
    server, client = build(watched), build(BlobStore())
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            client.fetch, server.address, ["a"], timeout_s=30, wait_s=30, max_bytes=4 << 20, cancel=token
        )
        wait_for(watched.waiting.is_set, "the fetch to wait")
        started = time.monotonic()
        token.cancel("excluded")
        with pytest.raises(Cancelled, match="excluded"):
            future.result(10)
    assert time.monotonic() - started < 1
    wait_for(lambda: not any(t.name == "atoll-fetch" for t in threading.enumerate()), "the streams to be given up")
    with pytest.raises(Cancelled, match="excluded"):
        client.fetch(server.address, ["a"], timeout_s=5, max_bytes=1, cancel=token)


def test_stopped_peer_is_unreachable_to_whoever_waits_and_comes_later(build: Build) -> None:
    watched = WrappedStore(BlobStore())
    server, client = build(watched), build(BlobStore())
    address = server.address
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.fetch, address, ["a"], timeout_s=30, wait_s=30, max_bytes=1)
        wait_for(watched.waiting.is_set, "the fetch to wait")
        server.stop()
        assert watched.interrupted.is_set(), "stop does not wait for the waiting reader's next look"
        with pytest.raises(PeerUnreachable):
            future.result(10)
    with pytest.raises(PeerUnreachable):
        client.fetch(address, ["a"], timeout_s=5, max_bytes=1)


def test_own_stop_cancels_own_fetches(build: Build) -> None:
    watched = WrappedStore(BlobStore())
    server, client = build(watched), build(BlobStore())
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.fetch, server.address, ["a"], timeout_s=30, wait_s=30, max_bytes=1)
        wait_for(watched.waiting.is_set, "the fetch to wait")
        client.stop()
        with pytest.raises(Cancelled, match="stopped"):
            future.result(10)
    client.stop()
    with pytest.raises(Cancelled, match="not running"):
        client.fetch(server.address, ["a"], timeout_s=5, max_bytes=1)


def test_can_start_again_after_stop(build: Build) -> None:
    server, client = build(store_with(a=b"1")), build(BlobStore())
    server.stop()
    server.start()
    assert len(client.fetch(server.address, ["a"], timeout_s=5, max_bytes=1)) == 1


def test_readers_that_wait_do_not_starve_others(build: Build) -> None:
    store = store_with(ready=b"now")
    server, client = build(store), build(BlobStore())
    token = CancelToken()
    with ThreadPoolExecutor(40) as pool:
        waiting = [
            pool.submit(client.fetch, server.address, [f"late/{n}"], timeout_s=30, wait_s=30, max_bytes=1, cancel=token)
            for n in range(40)
        ]
        assert len(client.fetch(server.address, ["ready"], timeout_s=5, max_bytes=3)) == 1
        for n in range(40):
            store.put(f"late/{n}", bytes([n]))
        assert [future.result(10)[0].data[0] for future in waiting] == list(range(40))


def test_eight_threads_get_what_was_put(build: Build) -> None:
    blobs = {f"piece/{n}": random_bytes(1 + 37_003 * (n % 9), seed=n) for n in range(48)}
    blobs["large"] = random_bytes(3 << 20)
    server, client = build(store_with(**blobs)), build(BlobStore())

    def fetch_share(start: int) -> None:
        keys = list(blobs)[start::4] + ["large"] * (start % 4 != 0)
        for blob in client.fetch(server.address, keys, timeout_s=30, max_bytes=32 << 20):
            assert np.array_equal(blob.data, blobs[blob.key]), blob.key

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(fetch_share, n % 4) for n in range(24)]:
            future.result(30)


@pytest.mark.parametrize(
    ("keys", "change", "words"),
    [
        (["a", "a"], {}, "differ"),
        ([""], {}, "printable"),
        (["a\n"], {}, "printable"),
        (["x" * 300], {}, "300 characters"),
        ([str(n) for n in range(5000)], {}, "5000 keys"),
        (["a"], {"timeout_s": 0}, "timeout_s=0"),
        (["a"], {"wait_s": -1}, "wait_s=-1"),
        (["a"], {"max_bytes": -1}, "max_bytes=-1"),
    ],
)
def test_arguments_that_cannot_work_are_refused(
    build: Build, keys: list[str], change: dict[str, float], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        build(BlobStore()).fetch("nowhere", keys, **({"timeout_s": 1, "max_bytes": 1} | change))


def test_loopback_names_are_unique() -> None:
    network = LoopbackNetwork()
    LoopbackTransport(network, "a", BlobStore()).start()
    with pytest.raises(ValueError, match="taken"):
        LoopbackTransport(network, "a", BlobStore()).start()


def test_token_calls_back_once_and_late_hooks_at_once() -> None:
    token, calls = CancelToken(), list[str]()
    unhook = token.on_cancel(lambda: calls.append("unhooked"))
    token.on_cancel(lambda: calls.append("hooked"))
    unhook()
    token.cancel("first")
    token.cancel("second")
    token.on_cancel(lambda: calls.append("late"))
    assert calls == ["hooked", "late"] and token.reason == "first"
