"""Runs the user's `notify.command` for every alarm, on a thread of its own: nothing in the run waits for it."""

from __future__ import annotations

import json
import logging
import queue
import shlex
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from orchestrator.alarms import Alarm, Alarms, NotifyConfig

if TYPE_CHECKING:
    from orchestrator.host import Host

MAX_WAITING = 64
log = logging.getLogger("atoll.controller")


class Notifier:
    """Takes alarms at any time; tells them one after the other. Where too many wait, further ones are dropped."""

    def __init__(self, config: NotifyConfig, about: Mapping[str, str]) -> None:
        """`about`: run and run_dir, for every event. Nothing runs before `start`."""
        self._config, self._about = config, dict(about)
        self._queue: queue.Queue[Alarm | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="notify", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def tell(self, alarm: Alarm) -> None:
        """Never waits."""
        try:
            self._queue.put_nowait(alarm)
        except queue.Full:
            log.warning("%d notifications wait: %s is not told", MAX_WAITING, alarm)

    def close(self, timeout_s: float) -> None:
        """Tell what waits, as long as that takes no more than `timeout_s`."""
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout=timeout_s)

    def _run(self) -> None:
        while (alarm := self._queue.get()) is not None:
            self._call(alarm)

    def _call(self, alarm: Alarm) -> None:
        assert self._config.command is not None, "a notifier without a command"
        event = {"schema_version": 1, **asdict(alarm), **self._about, "at": datetime.now(UTC).isoformat()}
        try:
            done = subprocess.run(
                shlex.split(self._config.command),
                input=json.dumps(event) + "\n",
                capture_output=True,
                text=True,
                timeout=self._config.timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            log.warning(
                "notify.command took more than notify.timeout_s = %g for %s", self._config.timeout_s, alarm.kind
            )
        except (OSError, ValueError) as error:
            log.warning("notify.command cannot be run: %s", error)
        else:
            if done.returncode:
                log.warning("notify.command ended with %d: %s", done.returncode, done.stderr.strip()[-500:])


@contextmanager
def notifying(host: Host, config: NotifyConfig, *, run_id: str, num_islands: int) -> Iterator[None]:
    """Run `notify.command`, where there is one, for what happens to the host's run while the block runs.

    At its end what waits is told, as long as that takes no more than `notify.timeout_s`. `num_islands`: see `Alarms`.
    """
    if config.command is None:
        yield
        return
    notifier = Notifier(config, {"run": run_id, "run_dir": str(host.run_dir.path)})
    host.alarms, host.tell = Alarms(config, num_islands=num_islands), notifier.tell
    notifier.start()
    try:
        yield
    finally:
        notifier.close(config.timeout_s)
