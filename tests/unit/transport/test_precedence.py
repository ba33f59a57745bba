"""Pieces before results: who gives way to whom on a connection, and for how long at most."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.unit.transport.support import TOKEN, random_bytes, store_with, wait_for
from workers.store import BlobStore
from workers.transport.base import Blob
from workers.transport.flight import FlightTransport
from workers.transport.precedence import PATIENCE_S, Precedence
from workers.transport.wire import Ticket, decode_ticket, encode_ticket

WAIT_S = 10.0
BLOB_BYTES = 1 << 20


class GivingWay:
    """A stream that gives way, in a thread of its own."""

    def __init__(self, precedence: Precedence, connection: str, stop: Callable[[], bool] = lambda: False) -> None:
        self.over = threading.Event()
        self.began = threading.Event()
        self._give_way = lambda: precedence.give_way(connection, stop=stop)
        threading.Thread(target=self._run, daemon=True).start()
        assert self.began.wait(WAIT_S)

    def _run(self) -> None:
        self.began.set()
        self._give_way()
        self.over.set()


def test_who_meets_nobody_urgent_goes_on() -> None:
    precedence = Precedence()
    precedence.give_way("a", stop=lambda: False)
    with precedence.urgent("b"):
        precedence.give_way("a", stop=lambda: False)


def test_others_of_a_connection_wait_until_the_last_urgent_stream_has_ended() -> None:
    precedence = Precedence(clock=lambda: 0.0)
    with precedence.urgent("a"):
        with precedence.urgent("a"):
            other = GivingWay(precedence, "a")
            assert not other.over.wait(0.05)
        assert not other.over.wait(0.05), "one of two has ended"
    assert other.over.wait(WAIT_S)
    assert not precedence._urgent, "nothing is kept of connections that are gone"


def test_a_stream_that_does_not_move_is_not_waited_for() -> None:
    now = [0.0]
    precedence = Precedence(clock=lambda: now[0])
    with precedence.urgent("a") as moves:
        now[0] = PATIENCE_S
        precedence.give_way("a", stop=lambda: False)
        moves()
        other = GivingWay(precedence, "a")
        assert not other.over.wait(0.05), "it moves again"
    assert other.over.wait(WAIT_S)


def test_an_urgent_stream_that_fails_leaves_nobody_waiting() -> None:
    precedence = Precedence(clock=lambda: 0.0)
    with pytest.raises(OSError), precedence.urgent("a"):
        raise OSError
    precedence.give_way("a", stop=lambda: False)


def test_a_server_that_ends_holds_nobody() -> None:
    precedence, ends = Precedence(clock=lambda: 0.0), threading.Event()
    with precedence.urgent("a"):
        other = GivingWay(precedence, "a", stop=ends.is_set)
        ends.set()
        precedence.interrupt()
        assert other.over.wait(WAIT_S)


def test_ticket_says_whether_it_is_urgent() -> None:
    for urgent in (True, False):
        ticket = Ticket(keys=("a",), stream=0, num_streams=1, wait_s=0.0, urgent=urgent)
        assert decode_ticket(encode_ticket(ticket)) == ticket


class Pair:
    """A member that serves many blobs, and one that reads over one connection."""

    def __init__(self, num_blobs: int) -> None:
        self.store: BlobStore = store_with(**{f"piece{i}": random_bytes(BLOB_BYTES, i) for i in range(num_blobs)})
        self.server = FlightTransport(self.store, host="127.0.0.1", token=TOKEN, num_connections=1)
        self.reader = FlightTransport(BlobStore(), host="127.0.0.1", token=TOKEN, num_connections=1)

    def __enter__(self) -> Pair:
        self.server.start()
        self.reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.stop()
        self.server.stop()

    def fetch_result(self, come: threading.Event) -> list[Blob]:
        """Wait for a result that is being made."""
        return self.reader.fetch(
            self.server.address, ["result"], timeout_s=WAIT_S, wait_s=WAIT_S, max_bytes=BLOB_BYTES,
            on_blob=lambda blob: come.set(),
        )  # fmt: skip

    def fetch_pieces(self, num_blobs: int, *, urgent: bool, on_blob: Callable[[Blob], None]) -> list[Blob]:
        """All pieces."""
        return self.reader.fetch(
            self.server.address, [f"piece{i}" for i in range(num_blobs)], timeout_s=WAIT_S,
            max_bytes=num_blobs * BLOB_BYTES, urgent=urgent, on_blob=on_blob,
        )  # fmt: skip


@pytest.mark.parametrize("urgent", [True, False])
def test_a_result_comes_after_the_pieces_that_are_on_their_way(urgent: bool) -> None:
    """The result is there as soon as the first piece has come; 15 more pieces are not sent yet."""
    num_blobs, come, seen = 16, threading.Event(), []
    with Pair(num_blobs) as pair, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(pair.fetch_result, come)
        wait_for(lambda: bool(pair.store._waiters), "the reader of the result")

        def arrived(blob: Blob) -> None:
            if not seen:
                pair.store.put("result", random_bytes(1000, 99))
                came_early.append(come.wait(PATIENCE_S / 4 if urgent else WAIT_S))
            seen.append(blob.key)

        came_early: list[bool] = []
        pair.fetch_pieces(num_blobs, urgent=urgent, on_blob=arrived)
        [result] = waiting.result(WAIT_S)
    assert result.key == "result" and len(seen) == num_blobs
    assert came_early == [not urgent]


def test_a_reader_that_does_not_read_its_pieces_gets_its_results_all_the_same() -> None:
    num_blobs, come, got = 16, threading.Event(), []
    with Pair(num_blobs) as pair, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(pair.fetch_result, come)
        wait_for(lambda: bool(pair.store._waiters), "the reader of the result")

        def arrived(blob: Blob) -> None:
            if not got:
                pair.store.put("result", random_bytes(1000, 99))
                got.append(come.wait(WAIT_S))

        pair.fetch_pieces(num_blobs, urgent=True, on_blob=arrived)
        waiting.result(WAIT_S)
    assert got == [True], "after its patience the server goes on"
