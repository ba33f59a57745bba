"""From a clone to the first line with a loss: the first start, which installs, and the starts after it.

    python -m benchmarks.first_loss [--starts 3] [--pip-args "--index-url ..."] [--with-cache] [--parts]

Clones this repository's HEAD into a temporary folder and runs `make demo` there until its first line with a loss, then
interrupts it. The first start makes a virtual environment of its own and downloads everything (pip's cache is off
unless `--with-cache`); the aims are 180 s for it and 20 s for the later ones. `--parts` keeps the moment of every line,
which shows where the time goes. Takes three to five minutes.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, keep, spread

FIRST_S, LATER_S = 180.0, 20.0
LOSS = "validation loss"
LIMIT_S, END_S = 1800.0, 60.0


def start(clone: Path, pip_args: str, *, cache: bool) -> tuple[float, list[tuple[float, str]]]:
    """Seconds from `make demo` to its first line with a loss, and every line until then with its moment."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= {} if cache else {"PIP_NO_CACHE_DIR": "1"}
    command = ["make", "demo", f"PYTHON={sys._base_executable}", f"PIP_ARGS={pip_args}"]  # type: ignore[attr-defined]
    began_s = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines: list[tuple[float, str]] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((round(time.monotonic() - began_s, 2), line.rstrip()))
            if LOSS in line:
                return lines[-1][0], lines
            if time.monotonic() - began_s > LIMIT_S:
                break
        raise SystemExit("make demo showed no loss:\n" + "\n".join(text for _, text in lines))
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Ctrl-C, as on a terminal: the run saves itself and ends all it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.communicate(timeout=END_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> int:
    """Clone, start, start again; 1 if an aim was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3, help="later starts")
    parser.add_argument("--pip-args", default="")
    parser.add_argument("--with-cache", action="store_true")
    parser.add_argument("--parts", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="atoll-first-") as folder:
        clone = Path(folder) / "atoll"
        began_s = time.monotonic()
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone)], check=True)
        clone_s = time.monotonic() - began_s
        first_s, said = start(clone, arguments.pip_args, cache=arguments.with_cache)
        print(f"first start: {first_s:.1f} s", flush=True)
        installed_s = next(at_s for at_s, text in said if text.startswith("starting in"))
        later = []
        for _ in range(arguments.starts):
            later_s, said = start(clone, arguments.pip_args, cache=arguments.with_cache)
            later.append(later_s)
            print(f"later start: {later_s:.1f} s", flush=True)
    result: dict[str, Any] = {
        "clone_s": round(clone_s, 2),
        "first_start_s": first_s,
        "of_it_installing_s": installed_s,
        "later_start_s": spread(later),
        "pip_cache": arguments.with_cache,
        "aims_s": {"first": FIRST_S, "later": LATER_S},
        "met": clone_s + first_s < FIRST_S and max(later) < LATER_S,
    }
    keep("first_loss", result | ({"last_start": said} if arguments.parts else {}))
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
