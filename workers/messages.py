"""Control messages between members and the controller: small frozen values, never a tensor.

A member sends an `Envelope` of bodies, the controller a `Batch`. Every envelope names the run, the term the sender
obeys, the member with its incarnation and the nonce of its process; whatever is not current is dropped and counted by
the receiver and answered with what the sender lacks. All bodies are idempotent: they may be lost, doubled or late.
The numbered steps of an exchange that each body belongs to are in `docs/protocol.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from strategies.robust import Recipe
from workers.apart import Reached
from workers.copies import Copy
from workers.pair_messages import PairHear, PairRosters, PairTell
from workers.ranges import Range
from workers.records import MemberId, OfferId, RosterEntry, Row, Term, canonical, chain_hash


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """Version of a fragment: number and chain id (hash of everything committed to reach it)."""

    n: int
    chain: str


class ExchangeId(NamedTuple):
    """Names one exchange for ever: a term is one controller life, so serials never collide. Compared all the time."""

    term: Term
    serial: int

    @property
    def rank(self) -> tuple[int, int, int]:
        """Order of exchanges."""
        return (*self.term.rank, self.serial)

    def __str__(self) -> str:
        """`0.1-17`."""
        return f"{self.term}-{self.serial}"


def results_digest(chunk_digests: tuple[str, ...]) -> str:
    """One name for all result chunks of a fragment, in chunk order."""
    return chain_hash("results", canonical({"chunks": chunk_digests}))


# ---------------------------------------------------------------- member -> controller


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessInfo:
    """What a member's process is: transport address, node and region, tokens and samples of one inner step."""

    address: str
    node: str
    weight: int
    batch_size: int
    region: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Join:
    """A process asks to be a member. A nonce that lives in the journal (a resumed process) keeps its incarnation.

    `ready`: it holds a state of every fragment, from an earlier incarnation.
    """

    info: ProcessInfo
    ready: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class GenesisMade:
    """The maker holds version 0; one digest and one number of chunks per fragment."""

    digests: tuple[str, ...]
    num_params: int
    num_chunks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FragmentReport:
    """What a member holds of one fragment (`n = -1`: nothing yet), and the attempt that it knows of."""

    n: int
    chain: str
    holds_next: bool
    barred: int | None
    watermark: int
    exchange: ExchangeId | None = None
    attempt: int = 0
    spread: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """Heartbeat with progress; also the request for whatever the member lacks.

    `doing`: what its training thread does, for `doing_s` seconds by now; `step_s`: its usual step, 0 = not known yet
    (`workers/pace.py`).
    `median_step_s`: what shares by speed are made of, pacing and loading included; 0 until it is measured.
    `copy`: a copy of its local state that a buddy may fetch; `kept`: copies of others that it keeps.
    """

    info: ProcessInfo
    journal_len: int
    num_leased: int
    consumed: int
    steps: int
    bytes_sent: int
    fragments: tuple[FragmentReport, ...]
    waiting: str = ""
    doing: str = ""
    doing_s: float = 0.0
    step_s: float = 0.0
    median_step_s: float = 0.0
    copy: Copy | None = None
    kept: tuple[Copy, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """A contribution to the transition of a fragment from `base` to the next version (protocol 1.4)."""

    fragment: int
    base: Version
    seq: int
    born: int
    since: int
    upto: int
    ranges: tuple[Range, ...]
    num_steps: int
    weight: int
    chunk_digests: tuple[str, ...]
    sumsq: tuple[float, ...]
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Missing:
    """An owner could not get pieces of an offer."""

    fragment: int
    exchange: ExchangeId
    attempt: int
    offer: OfferId
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """An owner found a piece that must not count (not finite, not what was announced)."""

    fragment: int
    exchange: ExchangeId
    attempt: int
    offer: OfferId
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduced:
    """An owner reduced chunks: `(chunk, digest)` each."""

    fragment: int
    exchange: ExchangeId
    attempt: int
    roster_digest: str
    chunks: tuple[tuple[int, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """An owner measured chunks: `(chunk, squared distances)` each, in the order of `measure_pieces`."""

    fragment: int
    exchange: ExchangeId
    attempt: int
    roster_digest: str
    chunks: tuple[tuple[int, tuple[float, ...]], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Have:
    """A member holds every result chunk and computed the digest of the next anchor, without applying it."""

    fragment: int
    exchange: ExchangeId
    attempt: int
    results: str
    next_digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RevokeAnswer:
    """Answer to `RevokeQuery`; `lacks` is a promise not to fetch or apply that version meanwhile."""

    fragment: int
    nonce: int
    lacks: bool
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """Validation loss of the anchor, nats per token; None: this loop has nothing to evaluate with."""

    versions: tuple[int, ...]
    samples: int
    val_loss: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DropRequest:
    """The member made an update that must not count (not finite), up to a consumption count: its life is to end."""

    upto: int
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A snapshot or the local state is complete on disk."""

    name: str
    versions: tuple[int, ...]
    local: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """Rows for metrics.jsonl, each with its time, and the time of sending, all on the member's own clock."""

    sent_s: float
    rows: tuple[tuple[float, dict[str, object]], ...]


SNAPSHOT_FAILED, LOCAL_FAILED = "snapshot_failed", "local_state_failed"
"""A `FaultSeen`: a member could not write the snapshot, or its local state at a stop, that it was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultSeen:
    """A member noticed a fault (corrupt anchor, diverged state, unreachable peer)."""

    fault: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Inherited:
    """The inner optimizer goes on as `member` had it after `steps` steps (`workers/copies.py`)."""

    member: MemberId
    steps: int


MemberBody = (
    Join | GenesisMade | Hello | Offer | Missing | Reached | Refused | Reduced | Measured | Have | RevokeAnswer
    | Evaluated | DropRequest | Saved | Observed | FaultSeen | Inherited | PairTell
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Envelope:
    """Bodies from one member process to the controller."""

    run_id: str
    term: Term | None
    name: str
    incarnation: int | None
    nonce: str
    bodies: tuple[MemberBody, ...]


# ---------------------------------------------------------------- controller -> member


@dataclass(frozen=True, kw_only=True, slots=True)
class Welcome:
    """The process is now `incarnation` of its member."""

    incarnation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejoin:
    """This nonce was admitted and fenced before: take a new one and join again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fenced:
    """The incarnation is fenced: back to the anchor, join with a new nonce."""

    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MakeGenesis:
    """Build version 0 from the seed or the given weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseGrant:
    """Samples to train on, in consumption order; `index` = samples granted before."""

    index: int
    ranges: tuple[Range, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Peers:
    """Transport addresses and the versions that peers are known to hold: `(member, address, (n of each fragment))`."""

    peers: tuple[tuple[str, str, tuple[int, ...]], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Keeping:
    """Who keeps your local state (empty = nobody), digest of what it has; what you fetch, and whose copies you keep."""

    buddy: str
    held: str
    wards: tuple[Copy, ...]
    keep: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inherit:
    """Local states of those who had your place before: `(copy, address of its holder)`."""

    sources: tuple[tuple[Copy, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Announce:
    """An offer was accepted: its owners may pull its pieces at once. `owners[chunk]` is provisional."""

    offer_by: MemberId
    address: str
    offer: Offer
    owners: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Assign:
    """Roster, coefficients and owners of one attempt. `owners[chunk]` names a member incarnation.

    `recipe`: what is made of the pieces where that is not their sum; `checkers[chunk]`: who works on it as well, to be
    compared. `roster_digest` names the work: roster and recipe.
    """

    fragment: int
    exchange: ExchangeId
    attempt: int
    base: Version
    base_samples: int
    roster: tuple[RosterEntry, ...]
    roster_digest: str
    owners: tuple[MemberId, ...]
    owner_addresses: tuple[tuple[str, str], ...]
    offers: tuple[tuple[MemberId, str, Offer], ...]
    recipe: Recipe | None = None
    checkers: tuple[tuple[MemberId, ...], ...] = ()

    def works_on(self, member: MemberId, chunk: int) -> bool:
        """Whether a member owns a chunk, or checks who does."""
        return self.owners[chunk] == member or (bool(self.checkers) and member in self.checkers[chunk])

    @property
    def measures(self) -> bool:
        """Whether distances are measured, and nothing is added up yet."""
        return self.recipe is not None and self.recipe.finish == "measure"


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """All parts are reduced: the digest of every result chunk."""

    fragment: int
    exchange: ExchangeId
    attempt: int
    chunk_digests: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verify:
    """Hash your present anchor against the sealed digest: next anchors differ, then report `Have` again; or, without an
    exchange, what somebody fetched was not as sealed.
    """

    fragment: int
    exchange: ExchangeId | None
    attempt: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Discarded:
    """The exchange ended without a commit; offers stay pending and are sent again."""

    fragment: int
    exchange: ExchangeId
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RevokeQuery:
    """Does anybody hold this version?"""

    fragment: int
    version: Version
    nonce: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RevokeCancel:
    """The question is void; promises given for it are released."""

    fragment: int
    nonce: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Restore:
    """No living member holds a state: load the newest snapshot on disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate:
    """Evaluate the anchor once every fragment has reached `versions`."""

    versions: tuple[int, ...]
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Save:
    """Write a snapshot of the anchor (`local = False`) or the whole local state (`local = True`)."""

    name: str
    local: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Tail:
    """No further samples will be leased for now: offer what you have when the leases are used up."""

    active: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Leave:
    """Finish the step, offer what there is, take no more samples; go on with everything else until the process ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """Stop training. `save` = finish the step and save the local state first."""

    save: bool


ControllerBody = (
    Welcome | Rejoin | Fenced | MakeGenesis | LeaseGrant | Peers | Keeping | Inherit | Announce | Assign | Spread
    | Verify | Discarded | RevokeQuery | RevokeCancel | Restore | Evaluate | Save | Tail | Leave | Stop
    | PairHear | PairRosters
)  # fmt: skip


class Batch(NamedTuple):
    """Bodies from the controller to one member process, with the journal rows it lacks (`rows_from` onwards).

    `number` counts the batches of one controller life: where a body tells a present state (peers, tail), a batch that
    was overtaken by a later one is not believed. (A named tuple, like `MemberId`: the controller makes several for each
    member and exchange, and making one takes a quarter of the time.)
    """

    run_id: str
    term: Term
    name: str
    incarnation: int | None
    nonce: str
    rows_from: int
    rows: tuple[Row, ...]
    bodies: tuple[ControllerBody, ...]
    number: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class News:
    """What the controller tells a standby: rows of the journal from `rows_from` on, and who holds which versions."""

    rows_from: int
    rows: tuple[Row, ...]
    peers: tuple[tuple[str, str, tuple[int, ...]], ...]
