"""What commands print with `--json`, as models: their schemas are in docs/reference/json.md."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from orchestrator.alarms import Kind
from workers.records import Scalar


class Answer(BaseModel):
    """Base of all of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Asked(Answer):
    """`atoll pause`, `atoll resume`: the run was asked, and it is in its journal."""

    run: str = Field(description="Name of the run.")
    paused: bool = Field(description="Whether it is paused now.")
    journalled: bool = Field(description="False while the journal's disk is full: it holds as soon as there is space.")


class SaveAsked(Asked):
    """`atoll save`."""

    snapshot: str | None = Field(description="Name of the snapshot that is being written; null: one is already.")


class SettingsSet(Asked):
    """`atoll set`."""

    since: list[int] = Field(description="Version of each fragment from which the values hold.")
    set: dict[str, Scalar] = Field(description="Values by key, as the journal has them.")


class RolledBackTo(Asked):
    """`atoll rollback`."""

    versions: list[int] = Field(description="Version of each fragment that the run goes on from.")
    samples_taken_back: int = Field(description="Samples that had been committed since, and are trained on again.")


class Stopped(Answer):
    """`atoll stop`."""

    run: str
    over: bool = Field(description="False with --no-wait, or where it did not stop in time.")
    reason: str | None = Field(description="How it ended: stopped, done or failed.")


class LogTail(Answer):
    """`atoll logs`."""

    name: str = Field(description="The log: controller, or a member and its incarnation.")
    files: list[str] = Field(description="All logs of the run by these names.")
    size_bytes: int
    text: str = Field(description="Its end, whole lines.")


class StackDump(Answer):
    """`atoll stack`."""

    run: str
    member: str
    text: str = Field(description="What py-spy said.")
    file: str = Field(description="Where it is kept, on the controller's machine.")


class Submitted(Answer):
    """`atoll submit`."""

    job: str = Field(description="Id of Ray's job.")
    address: str = Field(description="Of the job server.")
    run_dir: str = Field(description="Directory of the run, on the machines of the cluster.")


class Bundled(Answer):
    """`atoll bundle`."""

    bundle: str = Field(description="The archive.")
    files: list[str]
    size_bytes: int


class RunHere(Answer):
    """One run directory."""

    run_dir: str
    state: str = Field(description="running, interrupted, done, stopped or failed.")


class RunsHere(RootModel[list[RunHere]]):
    """`atoll runs`: the directories here, oldest first."""


class RunThere(Answer):
    """One run that has a controller in a cluster."""

    run: str
    run_dir: str | None
    state: str = Field(description="running, paused, or how it ended.")
    progress: float | None = Field(description="Committed share of train.tokens, 0 to 1.")
    members: list[str]


class RunsThere(RootModel[list[RunThere]]):
    """`atoll runs --at CLUSTER`."""


class Check(Answer):
    """One check of `atoll doctor`."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


class Checks(RootModel[list[Check]]):
    """`atoll doctor`."""


class LedgerAnswer(BaseModel):
    """`atoll ledger`; numbers of samples unless the name says tokens. Without a readable journal only the last four."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_dir: str
    ok: bool = Field(description="Whether every sample has one fate and the summary agrees.")
    note: str
    journal: dict[str, Any] | None = Field(None, description="rows, and the hash of the last one.")
    num_fragments: int | None = None
    heads: list[int] | None = Field(None, description="Newest version of each fragment.")
    exchanges_committed: int | None = None
    exchanges_revoked: int | None = None
    exchanges_rolled_back: int | None = None
    seq_len: int | None = Field(None, description="Tokens of one sample, where it is known.")
    samples: dict[str, int] | None = Field(None, description="Fate to number.")
    tokens: dict[str, int] | None = None
    partial_by_fragments: dict[str, int] | None = None
    deviations: list[dict[str, Any]] | None = Field(None, description="Every exception, with its ranges of samples.")
    findings: list[dict[str, Any]] = Field(description="What contradicts the rules, with row and place.")
    num_findings: int
    summary: list[dict[str, Any]] = Field(description="Each figure of summary.json beside the recomputed one.")


class NotifyEvent(Answer):
    """What `notify.command` gets on its standard input."""

    schema_version: Literal[1] = 1
    kind: Kind
    t_s: float = Field(description="Run time in seconds.")
    detail: str
    member: str = Field(description="Empty where it concerns the whole run.")
    run: str
    run_dir: str
    at: str = Field(description="Date and time on the controller's machine, ISO 8601, UTC.")
