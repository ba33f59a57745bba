"""What an island's process imports before it has heard of its run: each module there is time at every start."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import orchestrator.island_actor
print(*sorted(name for name in sys.modules if name.partition(".")[0] in ("orchestrator", "torch", "numba")))
"""


def test_an_island_imports_nothing_of_the_controller() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=50, check=True)
    imported, heavy = set(done.stdout.split()), {"orchestrator.host", "orchestrator.coordinator", "torch", "numba"}
    assert "orchestrator.island_actor" in imported
    assert imported & heavy == set()
