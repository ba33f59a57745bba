"""Labs need root and TAP devices; where they are missing, these tests are skipped, and the number is printed."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from faults.lab.namespaces import why_no_lab
from faults.lab.state import LabStates

LABS = Path("/run/atoll-lab-tests")
HERE = Path(__file__).resolve().parent
WHY_NOT = why_no_lab()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.lab)
            if WHY_NOT is not None:
                item.add_marker(pytest.mark.skip(reason=f"no lab here: {WHY_NOT}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for report in terminalreporter.stats.get("skipped", []) if "/lab/" in report.nodeid]
    skipped = [report.nodeid for report in reports if report.nodeid.startswith("tests/lab/")]
    reason = f": {WHY_NOT}" if WHY_NOT else ""
    terminalreporter.write_line(f"{len(skipped)} tests of the lab skipped{reason}")


@pytest.fixture(scope="session")
def labs() -> Iterator[Path]:
    """The folder of the labs of all test sessions; what a session that was killed has left is removed first."""
    LABS.mkdir(mode=0o700, exist_ok=True)
    for root in LABS.iterdir():
        states = LabStates(root)
        with states.lock():
            states.sweep()
    yield LABS
    with suppress(OSError):  # another session has labs there
        LABS.rmdir()


@pytest.fixture
def lab_root(labs: Path) -> Iterator[Path]:
    """A place for the state of labs that no other lab on this machine uses; empty again afterwards."""
    root = labs / secrets.token_hex(4)
    yield root
    states = LabStates(root)
    left = {name: states.read(name) for name in states.names()}
    with states.lock():
        for name, record in left.items():
            states.remove(name, record)
    assert not left
    assert not root.exists()
