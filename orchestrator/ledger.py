"""The ledger: recomputes from the journal alone that each sample of the committed history was counted once.

It shares nothing with the controller's state machine (`orchestrator/run_state.py`) but the records: what one gets
wrong the other notices. The rules, which both follow (invariants 2, 4 and 5 of the protocol):

Words. Samples are global positions 0, 1, 2, ... A *lease* gives some to an incarnation, which consumes its leases in
order; "position k" of an incarnation is its k-th sample in that order. `W[f]` is the position up to which fragment f
has committed its work, P the number of fragments. All fates are by coverage of samples, per fragment.

Rows. Row 0 is a Term; numbers and hashes continue; terms rise by (lineage, number). One Genesis, before any commit.
Join: incarnation = last one of the member + 1 (the first is 1), the last one fenced, nonce never used. Fence: once,
of a living one. Settle: once, of a fenced one. Each Evaluation and Snapshot names one version per fragment that was
committed at some time. Serials of a fragment's commits rise within a term.

Lease. To a living incarnation that joined in the present lineage; `index` = samples it was leased before; each range
is either free or begins where the samples issued so far end. So nobody is leased what another still holds.

Commit of fragment f. n = head + 1, prev_chain = chain of the head (`GENESIS_CHAIN` at n = 0); chain and
roster_digest are those of the content; base_samples is at most the samples that were ever committed in all
fragments. Roster: not empty, ascending by (member, incarnation), 0 < coefficients, their sum at most 1. Each entry: a
known incarnation, not settled; since = W[f] < upto <= leased; ranges = its leases from since to upto; none of them
committed in f already. Then W[f] = upto. A fenced one may be named once more per fragment, by the exchange whose
roster was fixed before the fence; never after the term in which it was fenced, and never in a later lineage.

Settle. Positions below min W are full, from min W to max W partial (final, never free), above max W free again. If
the Fence says `refused`, returned samples become tainted, and those that are tainted already are dropped instead.

Drop(upto), of a living incarnation, max W <= upto <= leased: from min W to max W partial, from max W to upto dropped,
all final; then W[f] = upto for all f, without those counting as committed.

Abandon, of a member with samples of its own which does not live: all of them that are free or were never leased are
dropped.

Revoke of the head of f: the roster's samples lose fragment f, the head goes back. An incarnation that is not settled
gets W[f] = since, except for positions below its last Drop, which stay final. Of settled incarnations and of positions
below a Drop: what is left in no fragment goes back to free (settled) or is dropped (below a Drop), the rest is partial.

Fates. full: in all P fragments, partial(k): in k of them and final, dropped, free, in progress: leased above min W of
an incarnation that is not settled. They are disjoint, and together they are all samples issued.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.intervals import IntervalSet, coverage
from orchestrator.ledger_model import Deviation, Finding
from orchestrator.ledger_replay import Replay
from workers.ranges import Range, count
from workers.records import GENESIS_HASH, Row

__all__ = ["Deviation", "Finding", "Ledger", "ledger_command", "recompute"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """What a journal adds up to. Interval sets of samples are sorted and merged.

    Attributes:
        num_rows, last_hash: length and last hash of the journal.
        committed: per fragment, the samples in a commit of the present history.
        partial: `(k, samples)` for each k with any: committed in k of the fragments and final.
        heads: version number of each fragment's head.
        num_revoked: commits that were taken back; num_rolled_back: by a rollback.
        num_reissued: samples that were leased again, counted each time.
        num_lost: samples that were trained on for nothing (of a process that died: as far as the controller knew).
        digests: of each fragment's newest version; empty before the genesis. num_params: by the genesis.
        initial_val_loss: of the first evaluation.
        final_val_loss: of the last evaluation, if there was more than one.
        waiting: `(member, samples)`: of its own, which nobody else may have; it does not live.
        deviations: every exception to "leased once, committed once", in order of the rows.
        findings: violations of the rules; empty for a sound journal. num_findings: the true number, if too many.
    """

    num_rows: int
    last_hash: str
    num_fragments: int
    committed: tuple[tuple[Range, ...], ...]
    issued: tuple[Range, ...]
    full: tuple[Range, ...]
    partial: tuple[tuple[int, tuple[Range, ...]], ...]
    dropped: tuple[Range, ...]
    free: tuple[Range, ...]
    in_progress: tuple[Range, ...]
    heads: tuple[int, ...]
    num_revoked: int
    num_rolled_back: int
    num_reissued: int
    num_lost: int
    digests: tuple[str, ...]
    num_params: int
    initial_val_loss: float | None
    final_val_loss: float | None
    waiting: tuple[tuple[str, int], ...]
    deviations: tuple[Deviation, ...]
    findings: tuple[Finding, ...]
    num_findings: int

    @property
    def ok(self) -> bool:
        """Whether no rule is violated."""
        return self.num_findings == 0

    @property
    def exchanges_committed(self) -> int:
        """Commits of the present history (revoked ones are not in it)."""
        return sum(self.heads)

    def samples(self) -> dict[str, int]:
        """Number of samples by fate; `issued` is the sum of the five that follow it."""
        return {
            "issued": count(self.issued),
            "full": count(self.full),
            "partial": sum(count(part) for _, part in self.partial),
            "dropped": count(self.dropped),
            "free": count(self.free),
            "in_progress": count(self.in_progress),
            "reissued": self.num_reissued,
            "lost": self.num_lost,
        }

    def tokens(self, seq_len: int) -> dict[str, int]:
        """`samples()` in tokens of samples of `seq_len`; `committed` (= full) and `reissued` are the summary's."""
        tokens = {fate: num * seq_len for fate, num in self.samples().items()}
        return {"committed": tokens["full"], **tokens}


def recompute(rows: Sequence[Row], *, place: Callable[[int], str] | None = None) -> Ledger:
    """The ledger of a journal's rows; never raises for what they say. `place`: file and line of a row number."""
    replay = Replay(place)
    for row in rows:
        replay.apply(row)
    stretches = coverage(replay.committed)
    in_progress = replay.in_progress()
    full = IntervalSet((start, stop) for start, stop, k in stretches if k == replay.num_fragments)
    partial: dict[int, IntervalSet] = {}
    for start, stop, k in stretches:
        if k < replay.num_fragments:
            partial.setdefault(k, IntervalSet()).add(in_progress.missing([(start, stop)]))
    partial = {k: partial[k] for k in sorted(partial) if partial[k].num}
    fates = {
        "full": full,
        **{f"partial({k})": part for k, part in partial.items()},
        "dropped": replay.dropped,
        "free": replay.free,
        "in progress": in_progress,
    }
    _check_sums(replay, fates)
    return Ledger(
        num_rows=len(rows),
        last_hash=rows[-1].hash if rows else GENESIS_HASH,
        num_fragments=replay.num_fragments,
        committed=tuple(tuple(samples) for samples in replay.committed),
        issued=tuple(replay.issued),
        full=tuple(full),
        partial=tuple((k, tuple(part)) for k, part in partial.items()),
        dropped=tuple(replay.dropped),
        free=tuple(replay.free),
        in_progress=tuple(in_progress),
        heads=tuple(head.n for head in replay.heads),
        num_revoked=replay.num_revoked,
        num_rolled_back=replay.num_rolled_back,
        num_reissued=replay.num_reissued,
        num_lost=replay.num_lost,
        digests=tuple(head.digest for head in replay.heads),
        num_params=replay.num_params,
        initial_val_loss=replay.val_losses[0] if replay.val_losses else None,
        final_val_loss=replay.val_losses[-1] if len(replay.val_losses) > 1 else None,
        waiting=replay.own.waiting(replay.free, replay.live_names()),
        deviations=tuple(sorted([*replay.deviations, *_name_partial(replay, partial)], key=lambda d: d.seq)),
        findings=tuple(replay.findings),
        num_findings=replay.num_findings,
    )


def _check_sums(replay: Replay, fates: dict[str, IntervalSet]) -> None:
    """Every sample issued has exactly one fate (invariant 5); and two ways of counting the full ones agree."""
    seen = IntervalSet()
    for fate, samples in fates.items():
        for start, stop in seen.common(samples):
            replay.fail("sums", f"samples {start}:{stop} are {fate} and have another fate besides")
        for start, stop in replay.issued.missing(samples):
            replay.fail("sums", f"samples {start}:{stop} are {fate} but were never leased")
        seen.add(samples)
    for start, stop in seen.missing(replay.issued):
        replay.fail("sums", f"samples {start}:{stop} were leased and have no fate")
    if replay.num_full != fates["full"].num:
        replay.fail("sums", f"{fates['full'].num} samples are in all fragments, by watermarks {replay.num_full} are")


def _name_partial(replay: Replay, partial: dict[int, IntervalSet]) -> list[Deviation]:
    """Whose samples are partial in the end, since which row."""
    named = IntervalSet()
    out: list[Deviation] = []
    for seq, member, ranges in replay.maybe_partial:
        new = named.missing(ranges)
        for k, part in partial.items():
            found = part.common(new)
            if found:
                detail = f"{k} of {replay.num_fragments} fragments"
                out.append(Deviation(seq=seq, kind="partial", member=member, ranges=tuple(found), detail=detail))
        named.add(new)
    return out


def ledger_command(run_dir: Path, as_json: bool) -> int:
    """Print the ledger of a run directory, as a table or as JSON; the exit code of `atoll ledger`.

    0: the journal follows the rules and agrees with summary.json (if there is one); 5: it does not, and the first row
    that does not follow is named; 2: the directory holds no journal.
    """
    from orchestrator.ledger_view import show

    return show(run_dir, as_json=as_json)
