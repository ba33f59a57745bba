"""What a member knows of one fragment: versions, pieces, the open exchange, its pending offer. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from workers import messages as msg
from workers.messages import Assign, Offer, Version
from workers.records import OfferId

KEEP_RESULTS = 1
"""For how many versions back a member serves the result. Who is further behind fetches the whole state.

More would save a slow member bytes now and then, and cost every member a payload of memory for each.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """An offer whose fate is open. `published`: its payload is in this process; that of a stopped one is gone."""

    offer: Offer
    id: OfferId
    published: bool = True


@dataclass(kw_only=True, slots=True)
class FragmentState:
    """What a member knows of one fragment."""

    n: int = -1
    chain: str = ""
    watermark: int = 0
    seq: int = 0
    late: bool = True
    pending: Pending | None = None
    posted_s: float = 0.0
    announced: dict[OfferId, msg.Announce] = field(default_factory=dict)
    pieces: set[tuple[OfferId, int]] = field(default_factory=set)
    fetching: set[tuple[OfferId, int]] = field(default_factory=set)
    assign: Assign | None = None
    reducing: set[int] = field(default_factory=set)
    reduced: dict[int, str] = field(default_factory=dict)
    measured: dict[int, tuple[float, ...]] = field(default_factory=dict)
    results: dict[int, str] = field(default_factory=dict)
    fetching_results: set[int] = field(default_factory=set)
    spread: msg.Spread | None = None
    computing: tuple[msg.ExchangeId, int] | None = None
    have: msg.Have | None = None
    have_s: float = 0.0
    content: set[str] = field(default_factory=set)
    recent: dict[int, tuple[str, ...]] = field(default_factory=dict)
    barred: tuple[Version, int] | None = None
    catching_up: bool = False
    tries: int = 0
    fetching_state: bool = False
    staged: Version | None = None

    @property
    def version(self) -> Version:
        """Version held."""
        return Version(n=self.n, chain=self.chain)
