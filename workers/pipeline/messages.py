"""What the controller of a pipeline, its stage peers and its trainers tell each other (frozen values, no torch).

A *round* counts how often a step was begun anew (a trainer or the controller died): whatever names an older round is
stale. An *attempt* counts the reductions of a step; answers to an older one are stale.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Chunk = tuple[str, int]
"""Unit of reduction and number of the chunk in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerPlace:
    """A peer that serves a stage: who it is, the process that it is, and where its tensors are fetched."""

    peer: str
    process: str
    nonce: str
    stage: int
    address: str
    announcement: int


# ---------------------------------------------------------------- controller to trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenStep:
    """These microbatches are yours. A higher round of the same step: begin it anew.

    `life` grows where steps are taken back: the controller came back, and what peers had made on their own is void.
    `serial` orders what one life opens where a step may be taken back without its death. `behind`: how many updates
    the parameters that the step is made with lack: 1 where updates are delayed.
    """

    step: int
    round_: int
    microbatches: tuple[int, ...]
    num_microbatches: int
    first_sample: int
    peers: tuple[PeerPlace, ...]
    life: int = 0
    serial: int = 0
    behind: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Peers:
    """Who serves now."""

    peers: tuple[PeerPlace, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerFenced:
    """Nothing that this peer counted in the step will be in its commit."""

    peer: str
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCommitted:
    """The step is committed in every stage."""

    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate:
    """Send the fixed validation samples forward through the stages, which hold `version`."""

    version: int
    number: int
    life: int
    peers: tuple[PeerPlace, ...]


ToTrainer = OpenStep | Peers | PeerFenced | StepCommitted | Evaluate

# ---------------------------------------------------------------- trainer to controller


@dataclass(frozen=True, kw_only=True, slots=True)
class FenceWanted:
    """A peer does not answer, and what it did is not known."""

    peer: str
    step: int
    round_: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StageReady:
    """All of a trainer's microbatches are counted in a stage, each at the peer that is named.

    `loss`: their part of the batch's loss, in the last stage; `throughputs`: microbatches a second of each peer.
    """

    step: int
    round_: int
    stage: int
    counted: tuple[tuple[int, str], ...]
    loss: float | None = None
    throughputs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class GaveUp:
    """Peer after peer raises an error for what this trainer sends: nothing that is sent elsewhere will help."""

    step: int
    round_: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """A trainer lives. `progress` grows with each answer, refusal and timeout; `owes`: not all is counted."""

    progress: int
    owes: bool
    queues: tuple[tuple[str, int], ...] = ()
    """Calls at each peer that it has not answered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """Mean loss over the validation samples, nats per token."""

    version: int
    number: int
    loss: float


FromTrainer = FenceWanted | StageReady | GaveUp | Heartbeat | Evaluated

# ---------------------------------------------------------------- controller to peer, with the answers


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """How long does a boundary tensor take from these trainers' addresses to you?"""

    addresses: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """Seconds, the mean over those that answered."""

    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TakeStage:
    """Hold the state of a stage at `version`, and with `serve_as` serve it under that name.

    `sources`: where to pull it from; none: build it (version 0). `tied_from`: the holder of the tied matrix's values.
    `step`: the step under way, where peers make steps of their own between two versions.
    """

    stage: int
    version: int
    sources: tuple[str, ...] = ()
    tied_from: str | None = None
    serve_as: str | None = None
    from_folder: str | None = None
    step: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Holds:
    """The state is here."""

    stage: int
    version: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Collect:
    """What has this peer counted in the step? Its gradients are to be had from now on."""

    step: int
    round_: int
    peer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Offered:
    """The microbatches that this peer has counted."""

    microbatches: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalStep:
    """A step is counted in every stage: make your own step with what you counted, which the journal says is this."""

    step: int
    peer: str
    counted: tuple[int, ...]
    lr: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OfferWork:
    """How far have your own steps taken you from `version`? That can be fetched from now on. Answer: `Offered`.

    `step`: so many steps are in it. `fragments`: of the stage, those that are asked for.
    """

    version: int
    round_: int
    peer: str
    step: int
    fragments: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one peer contributes to a unit: pieces that are fetched at its address.

    `numbers` order the sum: microbatches, or a single 0 for a peer's whole sum; equal ones go by the peers' names.
    """

    peer: str
    address: str
    numbers: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduce:
    """Add these chunks of a unit: the groups one after the other (a tied matrix has two), each in order of numbers."""

    step: int
    round_: int
    attempt: int
    unit: str
    chunks: tuple[int, ...]
    groups: tuple[tuple[Part, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduced:
    """The sums of squares of the reduced chunks, which can be fetched now."""

    sums: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Fetch the reduced chunks of a stage and compute the next state, without moving to it.

    `next_version`: None for the next step. A unit without owners stays as it is: nobody moved it, or it is not asked
    for. Where peers make steps of their own: no call of step `applies_at` runs before it is applied; `outer_rounds`
    says how many outer steps each unit has made.
    """

    step: int
    round_: int
    stage: int
    owners: tuple[tuple[str, int, int, str], ...]  # unit, chunk, attempt of its reduction, address
    scale: float
    lr: float
    next_version: int | None = None
    applies_at: int | None = None
    outer_rounds: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Have:
    """The digest of the next state."""

    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Apply:
    """The step is on the record: move to the next state, `version`, which has this digest.

    `included`: the fragments of which what the peer offered is in it (of peers that make steps of their own); what is
    in none is carried on.
    """

    step: int
    stage: int
    digest: str
    version: int
    included: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """Whether it did; False: it does not have that state."""

    done: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class FenceStep:
    """What this peer has counted in a round of a step is void."""

    peer: str
    step: int
    round_: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DropStage:
    """The state of a stage is not needed here any more."""

    stage: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveStage:
    """Write the state of a stage into a folder."""

    stage: int
    version: int
    folder: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ping:
    """Do you live, and do calls come to an end? Answered beside whatever else is done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alive:
    """`progress`: calls of trainers that have ended so far; `owes`: some are under way."""

    progress: int
    owes: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """Nothing to say but that it was done."""


ToPeer = (
    Probe
    | TakeStage
    | Collect
    | LocalStep
    | OfferWork
    | Reduce
    | Spread
    | Apply
    | FenceStep
    | DropStage
    | SaveStage
    | Ping
)  # fmt: skip
FromPeer = Probed | Holds | Offered | Reduced | Have | Applied | Alive | Done
