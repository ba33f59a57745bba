"""`make check`: the tests of the lab run on this machine, or it is said how many do not and why.

Where there is TAP, skipping them is an error: then only root or iproute2 is missing.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import pytest

from faults.lab.namespaces import why_no_lab
from faults.lab.tap import DEVICE

HERE = Path(__file__).resolve().parent


class Collected:
    """The tests that pytest finds."""

    def __init__(self) -> None:
        """None yet."""
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Keep them."""
        self.items = list(session.items)


def main() -> int:
    """Count, say, judge."""
    collected, said = Collected(), io.StringIO()
    with contextlib.redirect_stdout(said):
        code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", str(HERE)], plugins=[collected])
    if code != pytest.ExitCode.OK:
        print(said.getvalue())
        return 1
    skipped = sum(item.get_closest_marker("skip") is not None for item in collected.items)
    why = why_no_lab()
    print(f"{skipped} of {len(collected.items)} tests of the lab would be skipped" + (f": {why}" if why else ""))
    if skipped and DEVICE.exists():
        print("error: there is TAP on this machine, so they must run; try: root (sudo) and iproute2", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
