"""`make bench-lab`: what the lab's links do and cost, and runs on its clusters (needs root, about 30 minutes).

    python -m benchmarks.lab                                     # all that is not measured yet
    python -m benchmarks.lab --only unshaped loss                # cases whose names begin so
    python -m benchmarks.lab --fresh                             # all anew
    python -m benchmarks.lab --repeats 1 --seconds 2 --keep FILE # a smoke run

Resumable: each case is written when it is done, and is not measured again while its row is there. The processor is
shared with whatever else runs: the load average stands in each row. Exit code 1 if a promise is not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import lab_links, lab_runs
from benchmarks.common import RESULTS, environment
from orchestrator.waiting import waiting

Row = dict[str, Any]


def cases() -> Iterator[tuple[str, Callable[[lab_links.Options], Row]]]:
    """Name -> measurement."""
    yield from lab_links.cases()
    yield "run cut off for 60 s", lambda options: lab_runs.cut(60.0, "cubic")
    yield "overlap", lambda options: lab_runs.overlap(options.repeats)
    for topology in ("two-regions", "slow-pair"):
        for congestion in lab_links.CONGESTION:
            yield (
                f"exchange {topology} {congestion}",
                lambda options, t=topology, c=congestion: lab_runs.exchange(t, c),
            )


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=lab_links.Options().repeats)
    parser.add_argument("--seconds", type=float, default=lab_links.Options().seconds, help="one measurement of TCP")
    parser.add_argument("--only", nargs="+", default=[""], metavar="BEGINNING", help="of the names of cases")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--keep", type=Path, default=RESULTS / "lab.json", metavar="FILE")
    arguments = parser.parse_args()
    options = lab_links.Options(repeats=arguments.repeats, seconds=arguments.seconds)
    rows: dict[str, Row] = {}
    if arguments.keep.exists() and not arguments.fresh:
        kept = json.loads(arguments.keep.read_text(encoding="utf-8"))["rows"]
        rows = {name: row | lab_runs.judged(row) if name.startswith("exchange") else row for name, row in kept.items()}
    missing = [case for case in cases() if case[0] not in rows and case[0].startswith(tuple(arguments.only))]
    with waiting("cases", len(missing)) as show:
        for done, (name, measure) in enumerate(missing):
            show(done)
            here = environment()
            taken = {"load_1min": round(os.getloadavg()[0], 1), "commit": here["commit"], "date": here["date"]}
            rows[name] = measure(options) | taken
            print(f"{name}: " + "  ".join(f"{key} {_short(value)}" for key, value in rows[name].items()), flush=True)
            _write(arguments.keep, {"environment": environment(), "kernel": os.uname().release, "rows": rows})
    broken = [name for name, row in rows.items() if not row.get("ok", True)]
    if broken:
        print(f"not as promised: {', '.join(broken)}", file=sys.stderr)
    return int(bool(broken))


def _write(path: Path, result: Row) -> None:
    """A reader, and the next run, see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def _short(value: object) -> str:
    if isinstance(value, list):
        median, low, high = value
        return f"{median:g} ({low:g} to {high:g})"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
