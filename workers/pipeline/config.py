"""Settings of pipelines (no torch here: the controller and the command line read them)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from strategies.config import Section


class PipelineConfig(Section):
    """`[pipeline]`: the model is cut into stages; without `stages` every island holds all of it."""

    stages: int | None = Field(None, ge=1, le=1024, description="Stages that the layers are cut into; unset: islands.")
    peers: int = Field(2, ge=1, le=1024, description="Stage peers for each stage, on average: processes of the run.")
    trainers: int = Field(1, ge=1, le=256, description="Processes that send microbatches through the stages.")
    split: Literal["params", "time"] = Field(
        "params", description="Stages of equal parameters, or of equal time (each layer is measured before the start)."
    )
    microbatches: int = Field(8, ge=1, le=65536, description="Microbatches of one step, of all trainers together.")
    microbatch_size: int = Field(4, ge=1, le=65536, description="Samples in one microbatch.")
    in_flight: int = Field(
        6, ge=1, le=65536, description="Microbatches of one trainer that have begun and are not counted everywhere yet."
    )
    boundary: Literal["fp32", "bf16", "int8", "int4"] = Field(
        "int8", description="Encoding of activations and their gradients between stages."
    )
    buddies: bool = Field(
        True, description="A peer of another stage keeps a copy of each stage's state, and counts among the copies."
    )
    delayed: bool = Field(
        False,
        description="A step is made with the parameters before the last update, which goes on meanwhile (ddp alone).",
    )
    min_peers: int = Field(1, ge=1, le=1024, description="Peers that a move must leave in a stage.")
    rebalance_s: float = Field(30.0, ge=0, description="Seconds between looks at the stages' loads; 0: never.")
    hysteresis: float = Field(
        1.25, ge=1, le=100, description="A move must make the slowest stage quicker by this factor."
    )
    forward_timeout_s: float = Field(30.0, gt=0, description="Longest wait for a forward before it goes elsewhere.")
    backward_timeout_s: float = Field(75.0, gt=0, description="Longest wait for a backward before it is withdrawn.")
    peer_memory_bytes: int | None = Field(
        None, ge=1, description="Memory that a stage may take of a peer; unset: the machine's, shared by its peers."
    )
    trainer_memory_bytes: int | None = Field(
        None, ge=1, description="Memory for boundary tensors of a trainer; unset: a quarter of the machine's."
    )
    trainer_timeout_s: float = Field(
        20.0, gt=0, le=86400, description="Silence after which a trainer is taken to hang, and replaced."
    )
    pace_s: float = Field(
        0.0, ge=0, le=3600, description="Seconds that a forward takes at least (a backward 2.5 times as many)."
    )
    pace_of: dict[str, float] = Field(
        default_factory=dict, description="The same of single peers: slow machines on a quick one, by name (peer-0)."
    )

    @property
    def samples_per_step(self) -> int:
        """Samples of one step."""
        return self.microbatches * self.microbatch_size

    @property
    def num_peers(self) -> int:
        """Stage peers of the run; raises AssertionError where there are no stages."""
        assert self.stages is not None, "a run without [pipeline] stages has islands"
        return self.stages * self.peers

    @property
    def num_processes(self) -> int:
        """Peers and trainers."""
        return self.num_peers + self.trainers

    def pace_for(self, peer: str) -> float:
        """Seconds that a forward of this peer takes at least."""
        return self.pace_of.get(peer, self.pace_s)
