"""Why a job of Ray's job server came to no run: for whoever asks a cluster about a run that never began.

Ray keeps what became of jobs in its own tables, so that it can be read whether or not its job server still runs; a
driver that was refused has said why in the last lines that it printed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

# As in `ray.dashboard.modules.job.common.JobInfoStorageClient`.
KEY, SPACE = "_ray_internal_job_info_", "job"
FAILED = "FAILED"
STOPPED_BY_USER = 3  # the exit code of a run that can be resumed; for Ray any code but 0 is a failure
ERROR, PLACE, TRY = "error: ", "  place: ", "  try:   "
LONGEST = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedJob:
    """The newest job of a cluster, which has failed.

    Attributes:
        exit_code: of its driver; None where it was never started, or died of a signal that Ray does not tell.
        ended: when, by the clock of the machine that it ran on.
        why: what it said last.
        remedy: what that would have one try; empty where it said nothing of the kind.
    """

    job: str
    exit_code: int | None
    ended: str
    why: str
    remedy: str

    def sentence(self) -> str:
        """For people."""
        code = "" if self.exit_code is None else f" with exit code {self.exit_code}"
        return f"the newest job there, {self.job}, failed at {self.ended}{code}: {self.why}"


def newest_failure(jobs: Mapping[str, Mapping[str, Any]]) -> FailedJob | None:
    """Of Ray's rows by job: the newest one if it has failed; None if it goes on, succeeded, or was stopped by somebody.

    An older failure is nobody's answer any more.
    """
    begun = {job: row for job, row in jobs.items() if row.get("start_time")}
    if not begun:
        return None
    job, row = max(begun.items(), key=lambda item: int(item[1]["start_time"]))
    code = row.get("driver_exit_code")
    if row.get("status") != FAILED or code == STOPPED_BY_USER:
        return None
    ended_s = int(row.get("end_time") or row["start_time"]) / 1000
    why, remedy = last_words(str(row.get("message") or ""))
    ended = datetime.fromtimestamp(ended_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return FailedJob(job=job, exit_code=code, ended=ended, why=why, remedy=remedy)


def last_words(message: str) -> tuple[str, str]:
    """The last error that Atoll printed in a text, and its remedy; of another program its last line."""
    lines = [line.rstrip() for line in message.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith(ERROR)]
    if not starts:
        return (lines[-1] if lines else "it said nothing")[:LONGEST], ""
    said = lines[starts[-1] :]
    after = [number for number, line in enumerate(said) if line.startswith((PLACE, TRY))]
    why = " ".join(line.strip() for line in said[: after[0] if after else 1]).removeprefix(ERROR)
    remedy = next((line.removeprefix(TRY) for line in said if line.startswith(TRY)), "")
    return why[:LONGEST], remedy[:LONGEST]


def read_jobs() -> dict[str, dict[str, Any]]:
    """Ray's row of each job that was submitted to the cluster which this process is connected to."""
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list

    rows: dict[str, dict[str, Any]] = {}
    for key in _internal_kv_list(KEY, namespace=SPACE):
        if (value := _internal_kv_get(key, namespace=SPACE)) is not None:
            rows[key.decode().removeprefix(KEY)] = json.loads(value)
    return rows


def look_for_failure() -> FailedJob | None:
    """See `newest_failure`; of the cluster that this process is connected to."""
    return newest_failure(read_jobs())
