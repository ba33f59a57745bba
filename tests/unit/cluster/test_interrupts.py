"""Ctrl-C while something is started that must not be left half-way."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from orchestrator.watch import interrupts_afterwards


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_takes_effect_at_the_end(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_afterwards():
        os.kill(os.getpid(), number)
        done.append("the start went on")
    assert done == ["the start went on"]
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_second_takes_effect_at_once() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_afterwards():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            done.append(1)
    assert len(done) == 1


def test_without_one_nothing_happens_and_errors_come_through() -> None:
    with interrupts_afterwards():
        pass
    with pytest.raises(ValueError, match="no start"), interrupts_afterwards():
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("no start")


def test_other_threads_catch_nothing() -> None:
    before, found = signal.getsignal(signal.SIGINT), []

    def run() -> None:
        with interrupts_afterwards():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]
