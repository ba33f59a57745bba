"""Settings of the run and of the exchange (no torch, no Ray)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from strategies.config import LIVE, Section


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
    replace: bool = Field(True, description="Replace an island whose process died.")
    max_refusals: int = Field(
        3, ge=1, description="Updates of one island in a row that are not finite, after which it is given up."
    )
    max_restarts: int = Field(20, ge=0, description="Crashes of one island after which it is given up.")


class ExchangeConfig(Section):
    """`[exchange]`: how a synchronisation is agreed on."""

    quorum: float = Field(
        0.5, gt=0, le=1, description="Share of the live members that must have offered (more than this share, or all)."
    )
    min_members: int = Field(
        1, ge=1, description="Smallest number of live members that may commit.", json_schema_extra=LIVE
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
    suspect_s: float = Field(3.0, gt=0, description="Silence after which a member is suspect (reversible).")
    limbo_s: float = Field(120.0, gt=0, description="Silence after which a suspect member is fenced (final).")
    chunk_values: int | None = Field(None, ge=32, description="Values in one chunk; default from the model's size.")
    connections: int = Field(2, ge=1, le=64, description="Transport connections per peer.")
    timeout_s: float = Field(30.0, gt=0, description="Longest time of one transport call.")
