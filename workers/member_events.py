"""What goes into a member's machine and what comes out of it: frozen values, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from workers.messages import Assign, Batch, Evaluate, ExchangeId, Inherit, Keeping, MemberBody, Offer, Save, Stop
from workers.records import CommitRecord, MemberId, OfferId

# ---------------------------------------------------------------- events


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivered:
    """A batch arrived from the controller."""

    batch: Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenesisBuilt:
    """Version 0 was made here."""

    digests: tuple[str, ...]
    num_params: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PiecesFetched:
    """Chunks of an offer are in the store."""

    fragment: int
    offer: OfferId
    chunks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PiecesFailed:
    """Chunks of an offer could not be had."""

    fragment: int
    offer: OfferId
    chunks: tuple[int, ...]
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Knocked:
    """Whether a member answered a knock."""

    member: MemberId
    reached: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceRejected:
    """A piece is not finite, malformed, or not what its offer announced."""

    fragment: int
    offer: OfferId
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunksReduced:
    """Own chunks were reduced under a roster and published."""

    fragment: int
    roster_digest: str
    chunks: tuple[tuple[int, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunksMeasured:
    """Distances between the contributions to own chunks: `(chunk, squared distances)` each."""

    fragment: int
    roster_digest: str
    chunks: tuple[tuple[int, tuple[float, ...]], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultsFetched:
    """Result chunks are in the store: `(chunk, digest)` each."""

    fragment: int
    chunks: tuple[tuple[int, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultsFailed:
    """Result chunks could not be had from one address."""

    fragment: int
    chunks: tuple[int, ...]
    address: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NextComputed:
    """Digest of the next anchor under an exchange's result."""

    fragment: int
    exchange: ExchangeId
    attempt: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorVerified:
    """The present anchor was hashed against its sealed digest."""

    fragment: int
    intact: bool
    exchange: ExchangeId | None
    attempt: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StateStaged:
    """A whole state of a fragment was fetched and verified; it waits for the training thread."""

    fragment: int
    n: int
    chain: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StateFailed:
    """No donor could give a state, or no snapshot (`from_disk`). `mismatch`: what donors gave was not as sealed."""

    fragment: int
    why: str
    from_disk: bool = False
    mismatch: bool = False


Event = (
    Delivered | Tick | GenesisBuilt | PiecesFetched | PiecesFailed | Knocked | PieceRejected | ChunksReduced
    | ChunksMeasured | ResultsFetched | ResultsFailed | NextComputed | AnchorVerified | StateStaged | StateFailed
)  # fmt: skip

# ---------------------------------------------------------------- commands


@dataclass(frozen=True, kw_only=True, slots=True)
class Post:
    """Send a body to the controller."""

    body: MemberBody


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildGenesis:
    """Make version 0 from the seed or the given weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchPieces:
    """Pull chunks of an offer from its contributor."""

    fragment: int
    offer_by: MemberId
    address: str
    offer: Offer
    chunks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Knock:
    """See whether a member answers again (`workers/apart.py`)."""

    member: MemberId
    address: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduce:
    """Reduce own chunks under the assignment's roster, encode once, publish; or measure them, where it says so."""

    assign: Assign
    chunks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchResults:
    """Pull result chunks: by name while they are being made (`digests` empty), else by content.

    `n`: the version that they make. Who waits by name for one that is committed meanwhile need not wait any longer.
    `assign`: of an exchange that is open, so that the next version can be computed as they come.
    """

    fragment: int
    n: int
    address: str
    roster_digest: str
    chunks: tuple[int, ...]
    digests: tuple[str, ...]
    assign: Assign | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeNext:
    """Compute the digest of the next anchor without applying it."""

    assign: Assign
    chunk_digests: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyAnchor:
    """Hash the anchor of version `chain` against its sealed digest, unless a newer one has taken its place."""

    fragment: int
    chain: str
    digest: str
    exchange: ExchangeId | None
    attempt: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchState:
    """Fetch the newest state of a fragment from several donors at once."""

    fragment: int
    donors: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadState:
    """Load the state of a fragment from the newest snapshot on disk."""

    fragment: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Forget:
    """Free pieces, payloads and results that nobody can ask for any more."""

    fragment: int
    prefixes: tuple[str, ...]
    digests: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wake:
    """Something changed that the training thread may be waiting for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """The controller asks for an evaluation, a save or a stop."""

    body: Evaluate | Save | Stop


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """The controller says who keeps whose local state (`workers/buddy.py`)."""

    body: Keeping | Inherit


@dataclass(frozen=True, kw_only=True, slots=True)
class Apply:
    """For the training thread: apply a commit whose result is complete."""

    record: CommitRecord
    included: bool


Command = (
    Post | BuildGenesis | FetchPieces | Knock | Reduce | FetchResults | ComputeNext | VerifyAnchor | FetchState
    | LoadState | Forget | Wake | Order | Copies
)  # fmt: skip
