"""Settings of the run and of the exchange (no torch, no Ray)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from strategies.config import LIVE, Section
from strategies.robust import Rule


class RunSection(Section):
    """`[run]`: how many islands, and how the run is kept."""

    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        description="Name used in the run directory; without it, the name of the file.",
    )
    islands: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field(
        "auto",
        description="Islands; auto = one per visible GPU, else one per core; on a cluster run.elastic = true.",
    )
    elastic: bool = Field(
        False,
        description="On a cluster: an island in each place, also of machines that join later; it begins with "
        "run.islands.",
    )
    address: str | None = Field(None, min_length=1, description="Ray cluster to use; none = start a local one.")
    start_timeout_s: float = Field(
        120.0, gt=0, description="How long to wait for all islands before starting with those that are there."
    )
    snapshot_every_s: float = Field(60.0, gt=0, description="Seconds between durable snapshots of the anchor.")
    keep_anchors: int = Field(
        8, ge=1, le=10_000, description="Numbered snapshots that are kept; `atoll rollback` goes back to one of them."
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="Islands only on machines with these labels (atoll join --label); for a cluster.",
    )
    snapshots: str | None = Field(
        None,
        min_length=1,
        description="Where snapshots are kept: a URI that pyarrow.fs knows (s3, gs, file, ...), below which each run "
        "has a folder; none = the run directory.",
    )
    replace: bool = Field(True, description="Replace an island whose process died.")
    fault_plan: str | None = Field(
        None, min_length=1, description="TOML file of faults to cause in this run ([[fault]] tables); none = no faults."
    )
    max_refusals: int = Field(
        3, ge=1, description="Updates of one island in a row that are not finite, after which it is given up."
    )
    load: Literal["equal", "by_speed"] = Field(
        "equal",
        description="Local steps of an island in a round: all the same, or fewer on slower ones, so that all arrive "
        "together.",
    )
    max_restarts: int = Field(
        20,
        ge=0,
        description="Ends of one kind (exceptions; deaths; hangs) of one island within run.restart_window_s, after "
        "which it is given up. Machines that are taken away do not count.",
    )
    restart_window_s: float = Field(3600.0, gt=0, description="Seconds in which run.max_restarts counts.")
    max_early_deaths: int = Field(
        5, ge=1, description="Ends of one island in a row before its first step, after which it is given up."
    )
    standby: int = Field(
        0,
        ge=0,
        le=64,
        description="Processes that wait, with torch imported, the model built and the anchor at hand, to take a dead "
        "island's place.",
    )
    redundancy: Literal["none", "buddy"] = Field(
        "none",
        description="What only one island has (moments of its inner optimizer, residuals): lost with its process, or "
        "kept in the memory of a buddy on another node, for whoever takes its place.",
    )


PROFILES: Mapping[str, Mapping[str, float]] = {
    "lan": {"heartbeat_s": 0.5, "suspect_s": 2.5, "limbo_s": 120.0},
    "wan": {"heartbeat_s": 1.0, "suspect_s": 9.0, "limbo_s": 300.0},
}
"""Times by which silence is judged. A profile fills in what is not set otherwise."""


class ExchangeConfig(Section):
    """`[exchange]`: how a synchronisation is agreed on."""

    profile: Literal["lan", "wan"] = Field(
        "lan",
        description="Times by which silence is judged where they are not set: heartbeat_s, suspect_s, limbo_s. wan: a "
        "member is suspect within 10 s instead of 3 s; on a cluster started with `atoll up --wan`.",
    )

    quorum: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of the live members that must have offered (more than this share, or all).",
        json_schema_extra=LIVE,
    )
    min_members: int | None = Field(
        None,
        ge=1,
        description="Members that are enough for a commit, in the place of the share; with fewer there is none.",
        json_schema_extra=LIVE,
    )
    grace_s: float = Field(
        2.0, ge=0, description="Seconds to wait for the others after the quorum-th offer.", json_schema_extra=LIVE
    )
    progress_timeout_s: float = Field(
        10.0, gt=0, description="Seconds without progress after which an owner loses its parts."
    )
    copies: int = Field(2, ge=1, description="Live members that must hold a result before it is committed.")
    staleness_limit: int = Field(16, ge=1, description="Versions after which late work is dropped.")
    bound_rounds: float = Field(
        4.0, ge=1, description="Rounds a member may train on without a commit (the bound, in H steps)."
    )
    wait_s: float = Field(10.0, ge=0, description="Seconds a member waits for an open exchange before it trains on.")
    heartbeat_s: float = Field(0.5, gt=0, description="Seconds between heartbeats.")
    suspect_s: float = Field(
        2.5,
        gt=0,
        description="Shortest silence after which a member is suspect (reversible). Longer, up to three times as long, "
        "where its heartbeats were that irregular before.",
    )
    limbo_s: float = Field(120.0, gt=0, description="Silence after which a suspect member is fenced (final).")
    chunk_values: int | None = Field(None, ge=32, description="Values in one chunk; default from the model's size.")
    link_share: float = Field(
        0.5, gt=0, le=1, description="Share of the link that background transfers (a joiner's state) may use."
    )
    link_bytes_per_s: float | None = Field(
        None, gt=0, description="Bytes a second that the link of an island carries; unset = measured by exchanges."
    )
    connections: int = Field(2, ge=1, le=64, description="Transport connections per peer.")
    timeout_s: float = Field(30.0, gt=0, description="Longest time of one transport call.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """What is not set is as the profile says."""
        if isinstance(values, dict) and isinstance(profile := values.get("profile", "lan"), str):
            return {**PROFILES.get(profile, {}), **values}
        return values


class RobustConfig(Section):
    """`[robust]`: what is done about members that send wrong updates; nothing, unless it is asked for."""

    rule: Rule = Field(
        "mean",
        description="What becomes of the contributions: mean, their weighted sum; clip, no longer than their median; "
        "then the coordinate median, trimmed mean, multi-Krum, CenteredClip, or nnm: nearest-neighbour mixing and the "
        "trimmed mean.",
    )
    num_wrong: int = Field(1, ge=0, le=2048, description="Wrong contributions that trimmed, krum and nnm are to bear.")
    bucket: int = Field(1, ge=1, le=64, description="Contributions that are averaged at random before the rule.")
    history: bool = Field(
        False,
        description="centered_clip: begin from the mean of earlier results, which the outer momentum keeps, and not "
        "from the coordinate median: nobody moves it in this exchange, and it costs no sorting.",
    )
    clip_times: float = Field(
        1.0,
        ge=1,
        le=1000,
        description="Before any rule but mean a contribution is shortened to so many times the median length. Above 1 "
        "members whose data makes them longer count in full, and so does an attacker of that length.",
    )
    refuse_times: float = Field(
        4.0, gt=1, le=1000, description="A contribution that is longer than so many times the median is refused."
    )
    verify: bool = Field(
        False, description="Two members reduce each part; where they differ, a third says which of them is wrong."
    )

    @property
    def watches(self) -> bool:
        """Whether members whose contributions are refused again and again are banned."""
        return self.rule != "mean" or self.verify


class MetricsConfig(Section):
    """`[metrics]`: what leaves the controller for monitoring; all of it is off unless it is asked for."""

    port: int | None = Field(
        None, ge=0, le=65535, description="Serve /metrics for Prometheus at this port of the controller; 0 = any."
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen at: this machine alone, by default.")
    ray: bool = Field(False, description="Record everything with ray.util.metrics as well, for a Ray that collects.")
    tensorboard: bool = Field(False, description="Write TensorBoard's event files into the run directory.")
    tracker: Literal["wandb", "trackio"] | None = Field(None, description="Log to a tracker with W&B's interface.")
    project: str = Field("atoll", min_length=1, max_length=128, description="The tracker's project.")
