"""Snapshots beside training: the training thread copies the anchor, another one makes the copy durable and sends it.

One at a time. What is asked for while that name is still being written is not begun again; the controller asks until it
hears that a snapshot is complete.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from workers import messages as msg
from workers.context import IslandSpec
from workers.messages import SNAPSHOT_FAILED
from workers.replica import Replica
from workers.saved import SnapshotError
from workers.snapshot import SnapshotPlace, Staged, seal_snapshot, stage
from workers.snapshot_store import SnapshotStore, open_store

log = logging.getLogger("atoll.island")


class SnapshotWriter:
    """Writes the snapshots of one island."""

    def __init__(
        self,
        folder: Path,
        *,
        say: Callable[[msg.MemberBody], None],
        keep: int,
        store: SnapshotStore | None = None,
        threaded: bool,
    ) -> None:
        """`folder`: where they are kept, or wait until they are in `store`, a folder of this island alone then.

        `say`: to the controller, from any thread.

        Without threads `order` returns when it is written.
        """
        self.folder, self.say, self.keep, self.store = folder, say, keep, store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="snapshots") if threaded else None
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[None]] = {}

    def order(self, name: str, replica: Replica) -> None:
        """Write the present anchor as `name`; a numbered one is named by what is in it. On the training thread."""
        with self._lock:
            if name in self._under_way:
                return
        try:
            staged = stage(replica, self.folder)
        except OSError as error:
            self._failed(name, error)
            return
        if self._pool is None:
            self._write(name, staged)
            return
        with self._lock:
            future = self._under_way[name] = self._pool.submit(self._write, name, staged)
        future.add_done_callback(lambda _: self._ended(name))

    def finish(self, timeout_s: float) -> bool:
        """Wait for what is under way; whether all of it is done."""
        with self._lock:
            futures = list(self._under_way.values())
        return not wait(futures, timeout=timeout_s).not_done

    def close(self) -> None:
        """Begin nothing more."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _ended(self, name: str) -> None:
        with self._lock:
            self._under_way.pop(name, None)

    def _failed(self, name: str, error: Exception) -> None:
        log.warning("snapshot %s could not be written: %s", name, error)
        self.say(msg.FaultSeen(fault=SNAPSHOT_FAILED, detail=f"{name}: {error}"))

    def _write(self, name: str, staged: Staged) -> None:
        """Make it durable, and send it away; a failure is told, and training goes on."""
        named = None if name.startswith("v") else name  # by what is in it
        try:
            written = seal_snapshot(self.folder, named, staged, keep=self.keep if self.store is None else 1)
            if self.store is not None:
                self.store.publish(self.folder / written, keep=self.keep)
                shutil.rmtree(self.folder / written, ignore_errors=True)
        except (OSError, SnapshotError) as error:
            self._failed(name, error)
        else:
            self.say(msg.Saved(name=written, versions=staged.versions, local=False))
        finally:
            shutil.rmtree(staged.folder, ignore_errors=True)


def snapshot_place(spec: IslandSpec) -> SnapshotPlace:
    """Where the snapshots of a run are, as an island's settings say; raises SnapshotError."""
    store = open_store(spec.snapshots, spec.run_id) if spec.snapshots is not None else None
    return SnapshotPlace(folder=spec.run_dir / "snapshots", store=store)


def build_writer(spec: IslandSpec, say: Callable[[msg.MemberBody], None], *, threaded: bool) -> SnapshotWriter:
    """The writer of one island."""
    place = snapshot_place(spec)
    outbox = place.outbox(spec.name)
    return SnapshotWriter(outbox, say=say, keep=spec.keep_anchors, store=place.store, threaded=threaded)
