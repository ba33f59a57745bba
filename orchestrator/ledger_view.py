"""`atoll ledger`: the ledger of a run directory, compared with its summary and shown to people or programs."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.ledger import Deviation, Finding, Ledger, recompute
from orchestrator.segments import JournalError, read_run, segment_paths
from orchestrator.waiting import waiting
from workers.records import Row, TermRecord

NUM_SHOWN = 20
UNKNOWN_LENGTH = "the length of a sample is not known: no seq_len in summary.json, and the pack is not there"
EXIT_OK, EXIT_NO_RUN, EXIT_WRONG = 0, 2, 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One figure of summary.json against the journal. `agrees` None: could not be compared, `note` says why."""

    field: str
    stated: Any
    recomputed: Any
    agrees: bool | None
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Everything that `atoll ledger` says. `ledger` is None when the journal cannot be read to its end."""

    run_dir: Path
    ledger: Ledger | None
    seq_len: int | None
    findings: tuple[Finding, ...]
    num_findings: int
    comparisons: tuple[Comparison, ...]
    note: str

    @property
    def ok(self) -> bool:
        """Whether the journal is sound and agrees with the summary."""
        return self.num_findings == 0 and all(c.agrees is not False for c in self.comparisons)


def show(run_dir: Path, *, as_json: bool) -> int:
    """Print the verdict on a run directory; returns the exit code."""
    if not run_dir.is_dir() or not segment_paths(run_dir):
        print(f"{run_dir} is no run directory: it has no journal.jsonl; `atoll runs` lists the runs", file=sys.stderr)
        return EXIT_NO_RUN
    with waiting("reading the journal"):
        verdict = judge(run_dir)
    if as_json:
        print(json.dumps(to_json(verdict), indent=2))
    else:
        _print(verdict)
    return EXIT_OK if verdict.ok else EXIT_WRONG


def judge(run_dir: Path) -> Verdict:
    """Read the journal and the summary of `run_dir` and compare them. Raises OSError."""
    summary, broken = _read_summary(run_dir / "summary.json")
    seq_len = _seq_len(run_dir, summary)
    try:
        history = read_run(run_dir)
    except JournalError as error:
        place = f"{error.path.name}:{error.line}" if error.path is not None and error.line else ""
        finding = Finding(seq=error.seq if error.seq is not None else 0, place=place, rule="chain", text=error.reason)
        return Verdict(
            run_dir=run_dir, ledger=None, seq_len=seq_len, findings=(finding,), num_findings=1, comparisons=(),
            note=f"the journal cannot be followed beyond this row; {error.remedy}",
        )  # fmt: skip
    ledger = recompute(history.rows, place=history.place)
    comparisons = broken if summary is None else compare(ledger, history.rows, summary, seq_len)
    note = "" if summary is not None or broken else "there is no summary.json yet: the run has not ended"
    return Verdict(
        run_dir=run_dir, ledger=ledger, seq_len=seq_len, findings=ledger.findings, num_findings=ledger.num_findings,
        comparisons=tuple(comparisons), note=note,
    )  # fmt: skip


def _compare_field(summary: Mapping[str, Any], field: str, value: object, note: str) -> Comparison:
    """A figure that is missing is one that disagrees: nothing that was written can be taken out unnoticed."""
    if field not in summary:
        return Comparison(field=field, stated=None, recomputed=value, agrees=False, note="missing in summary.json")
    agrees = None if note else summary[field] == value
    return Comparison(field=field, stated=summary[field], recomputed=value, agrees=agrees, note=note)


def compare(
    ledger: Ledger, rows: Sequence[Row], summary: Mapping[str, Any], seq_len: int | None
) -> tuple[Comparison, ...]:
    """What summary.json says against what the journal gives; rows of a later controller are left out of it."""
    out: list[Comparison] = []
    num_rows = summary.get("journal_rows")
    if not isinstance(num_rows, int) or not isinstance(summary.get("journal_hash"), str):
        note = "journal_rows or journal_hash is missing in summary.json: rows may have been cut off the journal's end"
        out.append(Comparison(field="journal", stated=None, recomputed=f"{len(rows)} rows", agrees=False, note=note))
    else:
        out.append(_compare_end(rows, num_rows, summary.get("journal_hash")))
        if num_rows < len(rows):
            ledger = recompute(rows[:num_rows])
    tokens = ledger.tokens(seq_len) if seq_len is not None else {}
    recomputed = {
        "tokens_committed": tokens.get("committed"),
        "tokens_reissued": tokens.get("reissued"),
        "tokens_lost": tokens.get("lost"),
        "exchanges_committed": ledger.exchanges_committed,
    }
    if tokens.get("dropped") or "tokens_dropped" in summary:  # older versions did not write it
        recomputed["tokens_dropped"] = tokens.get("dropped")
    stated = {
        "params": ledger.num_params,
        "anchor_digest": anchor_digest(ledger),
        "initial_val_loss": ledger.initial_val_loss,
        "final_val_loss": ledger.final_val_loss,
    }
    for field, value in recomputed.items():
        note = "" if value is not None else UNKNOWN_LENGTH
        out.append(_compare_field(summary, field, value, note))
    out += [_compare_field(summary, field, value, "") for field, value in stated.items()]
    return tuple(out)


def anchor_digest(ledger: Ledger) -> str | None:
    """Digest of the whole anchor at the heads; None before there is one."""
    from workers.digest import combine

    digests = ledger.digests
    return None if not digests else digests[0] if len(digests) == 1 else combine(list(digests))


def _compare_end(rows: Sequence[Row], num_rows: int, stated_hash: Any) -> Comparison:
    """The journal's length and last hash: all that shows that rows were cut off its end."""
    stated = f"{num_rows} rows, {stated_hash}"
    end = min(num_rows, len(rows))
    actual = f"{end} rows, {rows[end - 1].hash if end else None}"
    agrees, note = True, ""
    if num_rows > len(rows):
        agrees, note = False, f"row {len(rows)} and what followed it are missing"
    elif stated_hash is not None and end and rows[end - 1].hash != stated_hash:
        agrees, note = False, f"row {end - 1} is another one than the last row of the summary"
    elif num_rows < len(rows) and not isinstance(rows[num_rows].record, TermRecord):
        agrees, note = False, f"row {num_rows} was added behind the end and begins no term"
    elif num_rows < len(rows):
        note = f"{len(rows) - num_rows} rows of a later controller are not compared"
    return Comparison(field="journal", stated=stated, recomputed=actual, agrees=agrees, note=note)


def _read_summary(path: Path) -> tuple[Mapping[str, Any] | None, tuple[Comparison, ...]]:
    """The summary, or None and, if there is one that cannot be read, the comparison that says so."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None, ()
    except ValueError as error:
        value, why = None, str(error)
    else:
        why = "it is not a JSON object"
    if isinstance(value, dict):
        return value, ()
    return None, (Comparison(field="summary.json", stated=None, recomputed=None, agrees=False, note=why),)


def _seq_len(run_dir: Path, summary: Mapping[str, Any] | None) -> int | None:
    """Tokens in a sample: by the summary, else by the pack that the configuration names, else by its `data.seq_len`."""
    stated = (summary or {}).get("seq_len")
    if isinstance(stated, int):
        return stated
    try:
        data = tomllib.loads((run_dir / "config.toml").read_text(encoding="utf-8")).get("data")
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(data, dict):
        return None
    if data.get("path"):
        return _pack_seq_len(Path(str(data["path"])))
    length = data.get("seq_len")
    return length if isinstance(length, int) else None


def _pack_seq_len(path: Path) -> int | None:
    from workers.data.index import load_index

    try:
        return load_index(path).seq_len
    except (OSError, ValueError):
        return None  # moved or gone: the sums in samples can be checked all the same


# ---------------------------------------------------------------- for programs


def to_json(verdict: Verdict) -> dict[str, Any]:
    """The verdict as one JSON object; numbers of samples unless the name says tokens."""
    ledger = verdict.ledger
    out: dict[str, Any] = {"run_dir": str(verdict.run_dir), "ok": verdict.ok, "note": verdict.note}
    if ledger is not None:
        out |= {
            "journal": {"rows": ledger.num_rows, "hash": ledger.last_hash},
            "num_fragments": ledger.num_fragments,
            "heads": list(ledger.heads),
            "exchanges_committed": ledger.exchanges_committed,
            "exchanges_revoked": ledger.num_revoked,
            "exchanges_rolled_back": ledger.num_rolled_back,
            "seq_len": verdict.seq_len,
            "samples": ledger.samples(),
            "tokens": ledger.tokens(verdict.seq_len) if verdict.seq_len is not None else None,
            "partial_by_fragments": {str(k): sum(b - a for a, b in part) for k, part in ledger.partial},
            "waiting": dict(ledger.waiting),
            "deviations": [asdict(deviation) for deviation in ledger.deviations],
        }
    out["findings"] = [asdict(finding) for finding in verdict.findings]
    out["num_findings"] = verdict.num_findings
    out["summary"] = [asdict(comparison) for comparison in verdict.comparisons]
    return out


# ---------------------------------------------------------------- for people


def _print(verdict: Verdict) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False, soft_wrap=True)
    if verdict.ledger is not None:
        _print_ledger(console, verdict.ledger, verdict.seq_len)
    for comparison in verdict.comparisons:
        word = {True: "agrees", False: "DIFFERS", None: "not compared"}[comparison.agrees]
        told = f"{comparison.field}: summary {comparison.stated}, journal {comparison.recomputed}"
        console.print(f"{word}: {told}" + (f"; {comparison.note}" if comparison.note else ""))
    for finding in verdict.findings[:NUM_SHOWN]:
        console.print(f"WRONG: {finding}")
    if verdict.num_findings > NUM_SHOWN:
        console.print(f"... and {verdict.num_findings - NUM_SHOWN} more; --json lists them")
    if verdict.note:
        console.print(verdict.note)
    console.print("every sample has one fate, and the sums agree" if verdict.ok else "the journal is not sound")


def _print_ledger(console: Any, ledger: Ledger, seq_len: int | None) -> None:
    from rich.table import Table
    from rich.text import Text

    fragments = "1 fragment" if ledger.num_fragments == 1 else f"{ledger.num_fragments} fragments"
    table = Table(title=f"{ledger.num_rows:,} rows, {fragments}, heads {list(ledger.heads)}")
    for name in ("fate", "samples", "tokens"):
        table.add_column(name, justify="left" if name == "fate" else "right")
    for fate, num in ledger.samples().items():
        table.add_row(fate.replace("_", " "), f"{num:,}", f"{num * seq_len:,}" if seq_len is not None else "")
    console.print(table)
    for name, num in ledger.waiting:
        console.print(f"{num:,} samples wait for {name}, which is not here: nobody else may have its own pack")
    if not ledger.deviations:
        return
    table = Table(title="exceptions", title_justify="left")
    for name in ("row", "what", "member", "samples", "detail"):
        table.add_column(name, justify="right" if name in ("row", "samples") else "left")
    for deviation in ledger.deviations[:NUM_SHOWN]:
        cells = (str(deviation.seq), deviation.kind, deviation.member, _spans(deviation), deviation.detail)
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    if len(ledger.deviations) > NUM_SHOWN:
        console.print(f"... and {len(ledger.deviations) - NUM_SHOWN} more exceptions; --json lists them")


def _spans(deviation: Deviation) -> str:
    """`120 in 0:100 400:420`, cut after three ranges."""
    num = sum(stop - start for start, stop in deviation.ranges)
    told = " ".join(f"{start}:{stop}" for start, stop in deviation.ranges[:3])
    return f"{num:,} in {told}" + (" ..." if len(deviation.ranges) > 3 else "")
