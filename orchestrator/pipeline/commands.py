"""What happens to a pipeline's controller, and what it wants done (frozen values)."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.events import (
    FaultInjected,
    FaultNoticed,
    LeaveRequested,
    Operated,
    PauseRequested,
    RollbackRequested,
    SaveRequested,
    SettingsRequested,
)
from workers.pipeline.messages import FromPeer, FromTrainer, ToPeer, ToTrainer
from workers.records import Record

# ---------------------------------------------------------------- events


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """A process is there: a trainer, or a peer whose tensors are fetched at `address`.

    Of one that was there when the controller was not: `held` are the versions of the stages that it holds, `has_next`
    the digests of the states that it has computed and not moved to, `serves` the stage that it serves.
    """

    process: str
    nonce: str
    address: str
    node: str
    memory_bytes: int
    held: tuple[tuple[int, int], ...] = ()
    has_next: tuple[tuple[int, str], ...] = ()
    serves: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Died:
    """A process is gone for good; `damaged`: it ended itself, as what it held was not finite any more."""

    process: str
    nonce: str
    why: str
    damaged: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """An order was obeyed."""

    ticket: int
    answer: FromPeer


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """An order was not obeyed, as far as is known."""

    ticket: int
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """A trainer says something."""

    process: str
    nonce: str
    message: FromTrainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebalance:
    """Look at the stages' loads now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """The user wants the run to stop, with a snapshot if `save`."""

    save: bool


Asked = (
    PauseRequested
    | SaveRequested
    | SettingsRequested
    | RollbackRequested
    | FaultInjected
    | FaultNoticed
    | LeaveRequested
    | Operated
)  # fmt: skip
Event = Joined | Died | Answered | Failed | Heard | Tick | Rebalance | Stop | Asked

# ---------------------------------------------------------------- commands


@dataclass(frozen=True, kw_only=True, slots=True)
class Write:
    """Append to the journal and flush, before anything that follows."""

    records: tuple[Record, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """Give a peer's process an order; its answer comes back with the ticket."""

    process: str
    nonce: str
    ticket: int
    order: ToPeer


@dataclass(frozen=True, kw_only=True, slots=True)
class Tell:
    """Tell a trainer's process."""

    process: str
    nonce: str
    message: ToTrainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Start a process of this name."""

    process: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """End a process."""

    process: str
    nonce: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone:
    """For the record of measurements: a step was committed in every stage."""

    step: int
    loss: float
    seconds: float
    attempts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sealed:
    """All stages of a snapshot are written: make its manifest."""

    folder: str
    version: int
    digests: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GoBack:
    """The run goes on from an older snapshot, with new processes and another brain: this one does nothing more."""

    name: str
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """The run is over: done, stopped or failed."""

    reason: str
    detail: str


Command = Write | Order | Tell | Start | End | StepDone | Sealed | GoBack | Finish


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What the controller knows of the cut: no shapes, no torch.

    `chunks`: unit -> number of its chunks; `stages_of`: unit -> the stages that contribute to it, owner first;
    `fragment_of`: unit -> the fragment that it is in, 0 where it is not named;
    `seconds`: of a microbatch in each stage, where they were measured.
    """

    num_stages: int
    chunks: dict[str, int]
    stages_of: dict[str, tuple[int, ...]]
    params: tuple[int, ...]
    stage_bytes: tuple[int, ...]
    is_tied: bool
    seconds: tuple[float, ...] = ()
    fragment_of: dict[str, int] = field(default_factory=dict)

    @property
    def num_params(self) -> int:
        """Of the whole model."""
        return sum(self.params)

    @property
    def work(self) -> tuple[float, ...]:
        """What a microbatch costs in each stage: as measured, else by parameters."""
        return self.seconds or tuple(map(float, self.params))
