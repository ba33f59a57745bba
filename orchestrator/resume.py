"""Can this run go on, and from what? What `--resume` checks, and says, before any process starts."""

from __future__ import annotations

from orchestrator.errors import UserError
from orchestrator.pipeline.replay import PipelineHistory, is_pipeline, newest_snapshot, replay
from orchestrator.run_state import RunState
from orchestrator.rundir import RunDir
from orchestrator.segments import read_run
from workers.saved import check_local, check_snapshot, newest


def check_resumable(run_dir: RunDir, *, snapshots: str | None = None, elsewhere: bool = False) -> str:
    """What the run goes on from and what it loses, in a line; "" where it goes on without loss, or begins.

    Every saved local state is checked whole. A snapshot is needed, and checked, only where there is none.

    Args:
        snapshots: `run.snapshots`.
        elsewhere: islands may keep states and snapshots on disks that are not looked at from here.

    Raises:
        ValueError: the run cannot go on: it is done, or what it would go on from is damaged or missing.
    """
    if not run_dir.journal.exists():
        left = [path.name for path in (run_dir.snapshots, run_dir.metrics, run_dir.summary) if path.exists()]
        if left:
            message = f"the journal of the run in {run_dir.path} is gone: without it nobody knows what was committed"
            remedy = "put journal.jsonl back from a backup, or begin another run with another --run-dir"
            raise UserError(message, place=f"{run_dir.journal}, beside {', '.join(left)}", remedy=remedy)
        return ""  # stopped before its controller began: it starts now
    records = [row.record for row in read_run(run_dir.path).rows]
    if is_pipeline(records):
        return _check_pipeline(run_dir, replay(records))
    state = RunState()
    for record in records:
        state.apply(record)
    if state.stopped is not None and state.stopped.reason == "done":
        message = f"the run in {run_dir.path} is done: there is nothing to go on with"
        raise UserError(message, remedy=f"atoll report {run_dir.path}, or a new run with more train.tokens")
    saved = _local_states(run_dir)
    if saved:
        return _without_local_state(saved, state)
    return _check_snapshots(run_dir, state, snapshots, elsewhere=elsewhere) if state.heads else ""


def _check_pipeline(run_dir: RunDir, history: PipelineHistory) -> str:
    """The same of a pipeline, which goes on from the newest snapshot of all its stages, or from the beginning."""
    if history.stopped is not None and history.stopped.reason == "done":
        message = f"the run in {run_dir.path} is done: there is nothing to go on with"
        raise UserError(message, remedy="a new run with more train.tokens")
    saved = newest_snapshot(run_dir.snapshots, at_most=history.version)
    version = saved.version if saved is not None else 0
    if version == history.version:
        return ""
    place = f"goes on from {saved.folder}" if saved is not None else "has no snapshot and begins anew"
    return f"{place}: {history.version - version} committed steps after it are made again"


def _local_states(run_dir: RunDir) -> list[str]:
    """Islands that have saved their states. Raises LocalStateError for a damaged one."""
    folder = run_dir.snapshots / "local"
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path.name for path in paths if path.is_dir() and check_local(path)]


def _without_local_state(saved: list[str], state: RunState) -> str:
    afresh = sorted(set(state.current) - set(saved))
    if not afresh:
        return ""
    return f"{', '.join(afresh)} left no saved state here: what was not committed of their work is trained again"


def _check_snapshots(run_dir: RunDir, state: RunState, uri: str | None, *, elsewhere: bool) -> str:
    found = _newest_in_store(uri, run_dir.path.name) if uri is not None else _newest_in_folder(run_dir)
    if found is None:
        if elsewhere and uri is None:
            return f"{run_dir.snapshots} has no snapshot: what islands hold on other machines is looked for there"
        message = f"the run in {run_dir.path} ended before its first snapshot: nothing is left of its model"
        place = str(run_dir.snapshots) if uri is None else f"{uri} (run.snapshots)"
        raise UserError(message, place=place, remedy="start it again with another --run-dir")
    place, sealed = found
    if len(sealed) != len(state.heads):
        message = f"the snapshot {place} has {len(sealed)} fragments, and the run {len(state.heads)}"
        raise UserError(message, remedy="remove its folder: the run then goes on from the snapshot before it")
    for fragment, (n, digest) in enumerate(sealed):
        if state.digests[fragment].get(n) != digest:
            message = f"the snapshot {place} is not what the journal sealed as version {n} of fragment {fragment}"
            raise UserError(message, remedy="remove its folder: the run then goes on from the snapshot before it")
    return _told_loss(place, [n for n, _ in sealed], state)


def _newest_in_folder(run_dir: RunDir) -> tuple[str, list[tuple[int, str]]] | None:
    path = newest(run_dir.snapshots)
    return None if path is None else (str(path), check_snapshot(path))


def _newest_in_store(uri: str, run_id: str) -> tuple[str, list[tuple[int, str]]] | None:
    from workers.snapshot_store import open_store

    store = open_store(uri, run_id)
    for name, manifest in store.complete():
        store.check(name, manifest)
        return f"{store.place}/{name}", list(zip(manifest["versions"], manifest["digests"], strict=True))
    return None


def _told_loss(place: str, versions: list[int], state: RunState) -> str:
    """Which commits are younger than a snapshot, and how many samples were in them."""
    exchanges = sum(head.version.n - n for head, n in zip(state.heads, versions, strict=True))
    if not exchanges:
        return f"goes on from {place}: no commit is lost, what was under way is trained again"
    covered = min(
        history[n].base_samples if n < len(history) else state.samples_committed()
        for history, n in zip(state.history, versions, strict=True)
    )
    return (
        f"goes on from {place}: {exchanges} committed exchange{'s' if exchanges > 1 else ''} after it are lost, and "
        f"{state.samples_committed() - covered} samples are trained again"
    )
