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


class Unbanned(Asked):
    """`atoll unban`."""

    member: str = Field(description="Name of the member.")
    standing: str = Field(description="What it is now: probation.")


class RolledBackTo(Asked):
    """`atoll rollback`."""

    versions: list[int] = Field(description="Version of each fragment that the run goes on from.")
    samples_taken_back: int = Field(description="Samples that had been committed since, and are trained on again.")


class Stopped(Answer):
    """`atoll stop`."""

    run: str
    over: bool = Field(description="False with --no-wait, or where it did not stop in time.")
    reason: str | None = Field(
        description="How it ended: stopped, done or failed; null: its controller was gone before it said."
    )


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
    waiting: dict[str, int] | None = Field(
        None, description="Member to samples of its own pack: it is not here, and nobody else may have them."
    )
    deviations: list[dict[str, Any]] | None = Field(None, description="Every exception, with its ranges of samples.")
    findings: list[dict[str, Any]] = Field(description="What contradicts the rules, with row and place.")
    num_findings: int
    summary: list[dict[str, Any]] = Field(description="Each figure of summary.json beside the recomputed one.")


class ClusterUp(Answer):
    """`atoll up`: the cluster is ready."""

    name: str = Field(description="Of this supervisor, for `atoll leave --cluster`.")
    address: str = Field(description="Of Ray.")
    door: str = Field(description="HOST:PORT where machines join.")
    node: str = Field(description="Ray's name of this machine.")
    workers: int = Field(description="Islands that this machine may hold.")
    pid: int = Field(description="Of the supervisor.")
    join: str = Field(description="The join string: keep it secret.")


class ConfigAnswer(Answer):
    """`atoll config show RUN --origin`; without --origin only what is in `config`."""

    config: dict[str, Any] = Field(description="All settings by section; their schema is `atoll config schema`.")
    origins: dict[str, str] = Field(description="Key to where its value came from.")


class Injected(Answer):
    """`atoll chaos`."""

    injected: list[str] = Field(description="The faults that were caused, as they were given.")


class WhyLine(Answer):
    """One row of the journal that explains something."""

    seq: int = Field(description="Number of the row.")
    at_s: float | None = Field(description="Run time in seconds, where it is known.")
    text: str


class WhyLines(RootModel[list[WhyLine]]):
    """`atoll why`, in order."""


class SimulatedOne(BaseModel):
    """`atoll simulate --seed`; what was counted on the way (commits, fences, ...) are further integers."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, int] = Field(init=False)

    seed: int
    ok: bool = Field(description="Whether every invariant held.")
    invariant: int | None = Field(description="Number of the one that did not; 0 or null if all did.")
    problem: str | None = Field(description="What was found; empty or null if nothing was.")
    events: int
    faults: int


class Simulated(Answer):
    """`atoll simulate`: many seeds."""

    seeds: int = Field(description="How many were run.")
    events: int
    faults: int
    violations: int = Field(description="Seeds in which an invariant did not hold; each is printed on standard error.")
    seconds: float = Field(description="Of wall time.")
    events_per_cpu_s: float
    counts: dict[str, int] = Field(description="What happened how often.")


class LabUp(Answer):
    """`atoll lab up`."""

    lab: str
    nodes: dict[str, str] = Field(description="Host to its address.")
    cluster: str | None = Field(description="Address of Ray; null with --links-only.")


class LabLink(Answer):
    """One direction of a link: its shape, and what it has carried and dropped."""

    name: str
    rate_mbit: float | None
    delay_ms: float
    jitter_ms: float
    loss: float
    queue_ms: float
    num_bytes: int = Field(description="Of IP packets.")
    num_packets: int
    dropped_queue: int
    dropped_loss: int
    dropped_cut: int


class LabAnswer(Answer):
    """`atoll lab status`."""

    lab: str
    links: list[LabLink]
    cut: list[tuple[str, str]] = Field(description="Pairs (from, to) between which nothing passes.")
    num_on_the_way: int = Field(description="Frames on their way.")
    num_frames: int = Field(description="Frames that were handed over after a delay.")
    num_late: int = Field(description="Those of them that came more than a millisecond late.")
    worst_late_ms: float
    num_unroutable: int
    num_refused: int
    overruns: dict[str, int] = Field(description="Host to frames that the switch did not take in time.")
    scheduling: str = Field(description="realtime or normal.")
    cpu_s: float = Field(description="CPU time of the switch.")


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


class Written(Answer):
    """`atoll report`: what was written."""

    path: str


class Exported(Answer):
    """`atoll export`."""

    run_dir: str
    out: str = Field(description="The folder, which transformers loads.")
    files: list[str] = Field(description="Names of the files in it.")


class Sampled(Answer):
    """`atoll sample`."""

    prompt: str
    text: str = Field(description="The prompt, and how the model went on.")


class SplitOfPack(Answer):
    """Training or validation part of a pack."""

    num_tokens: int
    num_samples: int


class Packed(Answer):
    """`atoll data pack`, `atoll data verify`."""

    pack: str = Field(description="The folder.")
    digest: str = Field(description="Of all that is in it: two packs with the same one are the same.")
    took_the_place_of: str | None = Field(None, description="Digest of another pack that was in this folder.")
    seq_len: int = Field(description="Tokens of one training sample.")
    vocab_size: int
    num_documents: int
    splits: dict[str, SplitOfPack] = Field(description="train and val.")
    notes: list[str] = Field(default=[], description="What was left out, and why.")


class ClusterJoined(Answer):
    """`atoll join`."""

    name: str = Field(description="Of this machine's part in the cluster: `atoll leave --cluster NAME`.")
    address: str = Field(description="Of Ray.")
    door: str
    node: str = Field(description="Ray's id of this machine's node.")
    workers: int = Field(description="Islands that this machine has room for.")
    pid: int = Field(description="Of the supervisor.")


class Left(Answer):
    """`atoll leave`: one name for each, when all of them have left."""

    left: list[str] = Field(description="Names of what left: parts of clusters, or the member.")


class Preset(Answer):
    """One preset."""

    path: str
    purpose: str


class Presets(RootModel[dict[str, Preset]]):
    """`atoll config presets`: by name."""


class Valid(Answer):
    """`atoll config validate`, of what is valid; what is not is an error with exit code 2."""

    source: str
    name: str = Field(description="run.name")


class DashboardLink(Answer):
    """`atoll dashboard`: one line, when it can be opened; with `--background` it goes on."""

    run: str
    link: str = Field(description="Opens the page for whoever has it.")
