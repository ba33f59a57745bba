"""What every test gets: one thread for each library, quiet Ray, and a check that no process outlives its module."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.leaks import LEAK_TIMEOUT_S, MARK, SESSION, our_processes, wait_until_gone

# Before torch and Ray are imported, and inherited by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# A local Ray otherwise leaves a token in the home directory that later clusters ask for.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ[MARK] = SESSION

# The same examples in every run, so that a failure belongs to a change; HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("atoll", deadline=None, derandomize=True, database=None, print_blob=True)
settings.register_profile("explore", deadline=None, database=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "atoll"))


@pytest.fixture(scope="session", autouse=True)
def no_process_left_by_session() -> Iterator[None]:
    """Fail when a process is left at the end of all tests."""
    yield from _complain_about_leaks("the session")


@pytest.fixture(scope="module", autouse=True)
def no_process_left_by_module(request: pytest.FixtureRequest, no_process_left_by_session: None) -> Iterator[None]:
    """Fail when a test module leaves a process behind (unless it is marked `shared_processes`)."""
    if request.node.get_closest_marker("shared_processes"):
        yield
    else:
        yield from _complain_about_leaks(request.node.name)


def _complain_about_leaks(what: str) -> Iterator[None]:
    before = our_processes()
    yield
    leaked = wait_until_gone(before)
    for process in leaked:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            print(f"{process} ended while it was reported", file=sys.stderr)
    lines = [f"  {process.pid}: {process.command[:200]}" for process in sorted(leaked, key=lambda one: one.pid)]
    assert not leaked, f"{what} left {len(leaked)} processes after {LEAK_TIMEOUT_S:g} s:\n" + "\n".join(lines)
