"""Can this run go on? What `--resume` checks before any process starts."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.run_state import RunState
from orchestrator.rundir import RunDir
from orchestrator.segments import read_run
from workers.saved import check_local, check_snapshot, newest


def check_resumable(run_dir: RunDir) -> None:
    """Raise ValueError for a run that cannot go on: it is done, or what it would go on from is damaged or missing.

    Every saved local state is checked whole. A snapshot is needed, and checked, only where there is none.
    """
    if not run_dir.journal.exists():
        return  # stopped before its controller began: it starts now
    state = RunState()
    for row in read_run(run_dir.path).rows:
        state.apply(row.record)
    if state.stopped is not None and state.stopped.reason == "done":
        message = f"the run in {run_dir.path} is done: there is nothing to go on with"
        raise UserError(message, remedy=f"atoll report {run_dir.path}, or a new run with more train.tokens")
    if not _has_local_states(run_dir.snapshots / "local") and state.heads:
        _check_snapshots(run_dir, state)


def _has_local_states(folder: Path) -> bool:
    """Whether islands have saved their states. Raises LocalStateError for a damaged one."""
    found = [check_local(path) for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    return any(found)


def _check_snapshots(run_dir: RunDir, state: RunState) -> None:
    path = newest(run_dir.snapshots)
    if path is None:
        message = f"the run in {run_dir.path} ended before its first snapshot: nothing is left of its model"
        raise UserError(message, place=str(run_dir.snapshots), remedy="start it again with another --run-dir")
    sealed = check_snapshot(path)
    for fragment, (n, digest) in enumerate(sealed):
        if state.digests[fragment].get(n) != digest:
            message = f"the snapshot {path} is not what the journal sealed as version {n} of fragment {fragment}"
            raise UserError(message, remedy="remove its folder: the run then goes on from the snapshot before it")
