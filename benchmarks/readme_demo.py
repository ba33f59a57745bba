"""Records the excerpt of `atoll demo` in README.md from a real run.

    python -m benchmarks.readme_demo [--log FILE]

Runs the demo (75 seconds on two idle cores), or takes what one has printed, and puts the lines that tell the story into
README.md: the start, the death and who takes the place, the end, the table. The sentence above them is yours to check.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import ROOT

README = ROOT / "README.md"
BLOCK = re.compile(r"From a run on two cores[^\n]*\n(?:[^\n]+\n)*\n```text\n(?P<said>.*?)```\n", re.S)
LOSS = "validation loss"
MORE = "..."


def excerpt(lines: Sequence[str]) -> list[str]:
    """The lines worth showing, in order, with `...` for those between."""
    gone = _first(lines, "is gone")
    table, end = _first(lines, "Run demo-"), _first(lines, "run directory:") + 1
    losses = [place for place, line in enumerate(lines[:table]) if LOSS in line]
    back = _first(lines, "takes its place")
    before = max(place for place in losses if place < gone)
    after = min(place for place in losses if place > back)
    shown = [*range(losses[2] + 1), *range(before, after + 1), losses[-1]]
    out: list[str] = []
    for place, earlier in zip(shown, [-1, *shown], strict=False):
        out += [MORE] * (place > earlier + 1) + [lines[place].rstrip()]
    return [*out, MORE, *(line.rstrip() for line in lines[table:end])]


def _first(lines: Sequence[str], text: str) -> int:
    return next(place for place, line in enumerate(lines) if text in line)


def main() -> int:
    """Run or read, and write README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, help="output of `atoll demo`")
    arguments = parser.parse_args()
    if arguments.log is not None:
        said = arguments.log.read_text(encoding="utf-8")
    else:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "orchestrator.cli.main", "demo"]
            done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
            said = done.stdout
    text = README.read_text(encoding="utf-8")
    found = BLOCK.search(text)
    if found is None:
        raise SystemExit(f"{README} has no excerpt of the demo")
    block = "\n".join(excerpt(said.splitlines())) + "\n"
    README.write_text(text[: found.start("said")] + block + text[found.end("said") :], encoding="utf-8")
    print(block)
    return 0


if __name__ == "__main__":
    sys.exit(main())
