"""How much memory this machine has for processes (no torch)."""

from __future__ import annotations

import os
from pathlib import Path

LIMIT = Path("/sys/fs/cgroup/memory.max")


def machine_bytes() -> int:
    """Memory of this machine, or what its container may use of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = LIMIT.read_text().strip() if LIMIT.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def resident_bytes() -> int:
    """Memory that this process has now."""
    return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])
