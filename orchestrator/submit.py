"""Runs as jobs of a Ray cluster, through Ray's job server; what `ray job submit -- atoll train RUN.toml` does as well.

A job's driver (`atoll train` there) creates the run's detached controller, or attaches to it, and watches it. The run
belongs to the controller: it goes on when the driver is killed.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.client import DoorRuns
from orchestrator.cluster.door_client import JobPlace, job_place
from orchestrator.cluster.join_string import JoinString
from orchestrator.config import load_config
from orchestrator.errors import ClusterUnreachable, UserError
from orchestrator.room import Room, check_room

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# Set by Ray's job server in the environment of a job's driver.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
CONFIG_NAME = "run.toml"
FAILED, STOPPED = 1, 3
NO_AGENT = "No available agent"
AGENT_S, AGENT_POLL_S = 60.0, 1.0


def job_address(environ: Mapping[str, str] = os.environ) -> str | None:
    """The Ray of the job that this process is the driver of; None outside of a job."""
    return environ.get("RAY_ADDRESS") if JOB_VARIABLE in environ else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job that was submitted."""

    id: str
    address: str
    run_dir: str
    client: JobSubmissionClient

    def follow(self) -> Iterator[str]:
        """What the job prints, until it ends."""
        lines = self.client.tail_job_logs(self.id)
        loop = asyncio.new_event_loop()
        try:
            while True:
                try:
                    yield loop.run_until_complete(anext(lines))
                except StopAsyncIteration:
                    return
        finally:
            loop.close()

    def exit_code(self) -> int:
        """That of `atoll train` there; 3 if the job was stopped, 1 if its driver died or never began."""
        details = self.client.get_job_info(self.id)
        if str(details.status.value) == "STOPPED":
            return STOPPED
        code = details.driver_exit_code
        return FAILED if code is None or code < 0 else int(code)


def submit_run(
    run: str,
    *,
    address: str | JoinString | None,
    overrides: Sequence[str] = (),
    working_dir: Path | None = None,
    run_dir: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Job:
    """Check the configuration here, then start the run there.

    Args:
        run: a preset or a TOML file; what is submitted is the resolved configuration.
        address: the door of a cluster of `atoll up`, or `http://HOST:8265` of Ray's job server; None: what
            `RAY_ADDRESS` says.
        run_dir: where the run's directory is made, as seen from the folder in which `atoll up` was started, or from
            this one if an address of Ray was given; default: a new one in `runs` there.
        environment: further variables of the job's driver.

    Raises:
        UserError: something is wrong with the configuration, or that cluster can never hold the run.
        ClusterUnreachable: no job server answers there.
    """
    where = address or os.environ.get("RAY_ADDRESS")
    if where is None:
        raise UserError(
            "which cluster? No --address, and RAY_ADDRESS is not set",
            remedy="--address with what atoll up printed, or http://HOST:8265 of another Ray's job server",
        )
    config = load_config(run, overrides=overrides).config
    if isinstance(where, JoinString):
        check_room(config.with_values({"run.address": where.door}), _room_at(where, config.run.labels))
        there = job_place(where)
        _use_token(where.token)
    else:
        there = JobPlace(address=where, python=sys.executable, folder=str(Path.cwd()))
    client = _client(there.address)
    folder = Path(there.folder)
    directory = folder / run_dir if run_dir is not None else _new_run_dir(folder, config.run.name)
    runtime_env: dict[str, Any] = {
        "env_vars": {"ATOLL_RUN_TOML": config.to_toml(), "ATOLL_RUN_DIR": str(directory), **(environment or {})}
    }
    if working_dir is not None:
        runtime_env["working_dir"] = str(working_dir)
    entrypoint = shlex.join([there.python, "-m", "orchestrator.submit"])
    name = f"atoll-{directory.name}"
    job_id = _submit(client, entrypoint=entrypoint, runtime_env=runtime_env, name=name, run=directory.name)
    return Job(id=job_id, address=there.address, run_dir=str(directory), client=client)


def _room_at(place: JoinString, labels: Mapping[str, str]) -> Room:
    room = dict(DoorRuns(place).ask("room", labels=dict(labels)))
    return Room(**{**room, "known": tuple(room["known"])})


def _use_token(token: str) -> None:
    """What this process asks of a job server from now on, it asks with this token."""
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})
    if "ray" in sys.modules:
        from orchestrator.launch import reread_environment

        reread_environment()


def _client(address: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise ClusterUnreachable(
            f"no job server of Ray answers at {address}: {error}",
            place="--address",
            remedy="the join string of atoll up, or http://HOST:8265 of a Ray started with --include-dashboard=true",
        ) from error


def _submit(client: JobSubmissionClient, *, entrypoint: str, runtime_env: dict[str, Any], name: str, run: str) -> str:
    """A cluster that has just started answers before it can take a job: it is asked again for a while."""
    deadline_s = time.monotonic() + AGENT_S
    while True:
        try:
            job_id = client.submit_job(
                entrypoint=entrypoint, runtime_env=runtime_env, submission_id=name, metadata={"run": run}
            )
        except RuntimeError as error:
            if NO_AGENT not in str(error) or time.monotonic() > deadline_s:
                raise ClusterUnreachable(
                    f"the job server does not take the job: {error}",
                    place="--address",
                    remedy="ray job list shows what it has; the same once more if the cluster has just started",
                ) from error
            time.sleep(AGENT_POLL_S)
        else:
            return str(job_id)


def _new_run_dir(folder: Path, name: str) -> Path:
    from datetime import date
    from secrets import token_hex

    return folder / "runs" / f"{name}-{date.today().isoformat()}-{token_hex(2)}"


def main() -> int:
    """The entry point of a submitted job: `atoll train` with the configuration that was handed over."""
    import tempfile

    from orchestrator.cli.main import main as atoll

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG_NAME
        path.write_text(os.environ.pop("ATOLL_RUN_TOML"), encoding="utf-8")
        return atoll(["train", str(path), "--run-dir", os.environ.pop("ATOLL_RUN_DIR")])


if __name__ == "__main__":
    sys.exit(main())
