"""A process that sends half of a blob, says so, and then neither ends nor goes on. Run by test_flight_process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.unit.transport.support import HostileServer, batch, header, random_bytes


def main() -> None:
    data = random_bytes(300_000).tobytes()

    def answer(ticket: Any) -> Iterator[Any]:
        yield batch(data[:150_000]), header(data)
        print("half", flush=True)
        sys.stdin.read()  # until the test closes it

    server = HostileServer(answer)
    print(server.address, flush=True)
    server.serve()


if __name__ == "__main__":
    main()
