"""Copies of an island's local state in a buddy's memory (`run.redundancy = "buddy"`): what they say, and what may be
restored from them. Pure, no tensors.

Anchors and outer states are on every member; the moments of the inner optimizer and the residuals of error feedback
are on one. A copy has both, as they were at a step boundary right after a commit was applied. What of it a successor
may use is decided by the journal alone:

    moments   nothing that is counted depends on them: of any copy whose versions are in the history, and that is not
              too old. Never after a refused update: they may be what made it unfit (H4)
    residual  is owed to the run exactly once (C8): only if the last offer of its maker that was committed is the one
              that left it, and nobody who had the place since had one committed (`residual_fate`)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from workers.record_log import RecordLog
from workers.records import MemberId

COPY_SCHEMA = 1
MAX_MANIFEST_BYTES = 4 << 20
PIECE_BYTES = 1 << 20

Fate = Literal["yes", "no", "wait"]


class CopyError(ValueError):
    """A copy that is not what was announced, or not one that this version reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """Names a copy: whose local state, after which versions of the fragments, and the digest of its manifest."""

    member: MemberId
    versions: tuple[int, ...]
    digest: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptFragment:
    """What a copy says of a fragment: the version that was held, and the last own offer that was committed by then."""

    n: int
    chain: str
    seq: int
    has_residual: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a copy consists of. `pieces`: digests, in order, of what the tensors' file was cut into."""

    run_id: str
    member: MemberId
    steps: int
    fragments: tuple[KeptFragment, ...]
    pieces: tuple[str, ...]
    num_bytes: int

    def encode(self) -> bytes:
        """As bytes, whose digest names the copy."""
        return json.dumps(
            {
                "schema": COPY_SCHEMA,
                "run_id": self.run_id,
                "name": self.member.name,
                "incarnation": self.member.incarnation,
                "steps": self.steps,
                "fragments": [[part.n, part.chain, part.seq, part.has_residual] for part in self.fragments],
                "pieces": self.pieces,
                "num_bytes": self.num_bytes,
            },
            separators=(",", ":"),
        ).encode()


def parse_manifest(data: bytes, *, run_id: str, copy: Copy) -> Manifest:
    """The manifest of `copy`, whose digest was checked. Raises CopyError."""
    try:
        read: dict[str, Any] = json.loads(data)
        if read["schema"] != COPY_SCHEMA:
            raise CopyError(f"the copy of {copy.member} has schema {read['schema']}, this version reads {COPY_SCHEMA}")
        manifest = Manifest(
            run_id=str(read["run_id"]),
            member=MemberId(name=str(read["name"]), incarnation=int(read["incarnation"])),
            steps=int(read["steps"]),
            fragments=tuple(
                KeptFragment(n=int(n), chain=str(chain), seq=int(seq), has_residual=bool(has))
                for n, chain, seq, has in read["fragments"]
            ),
            pieces=tuple(str(piece) for piece in read["pieces"]),
            num_bytes=int(read["num_bytes"]),
        )
    except CopyError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise CopyError(f"the copy of {copy.member} is unreadable: {error}") from error
    if (manifest.run_id, manifest.member, manifest.num_bytes) != (run_id, copy.member, copy.num_bytes):
        whose = f"{manifest.member} in {manifest.run_id}"
        raise CopyError(f"what was given as the copy of {copy.member} is that of {whose}")
    return manifest


def num_pieces(num_bytes: int) -> int:
    """Into how many pieces a file of that size is cut."""
    return -(-num_bytes // PIECE_BYTES)


def manifest_key(digest_hex: str) -> str:
    """Under which key a holder serves a copy's manifest."""
    return f"local/{digest_hex}/manifest"


def piece_key(digest_hex: str, piece: int) -> str:
    """Under which key a holder serves a piece of a copy's tensors."""
    return f"local/{digest_hex}/{piece}"


# ---------------------------------------------------------------- what may be used


def last_seq(log: RecordLog, fragment: int, member: MemberId, upto: int | None = None) -> int:
    """Number of the newest offer of `member` that the history of a fragment has; 0 = none.

    `upto`: no newer version than this one. What a member has applied may be behind the journal.
    """
    for n in range(log.head(fragment) if upto is None else upto, 0, -1):
        record = log.commit(fragment, n)
        found = [entry.offer.seq for entry in record.roster if entry.member_id == member] if record else []
        if found:
            return max(found)
    return 0


def why_unfit(manifest: Manifest, log: RecordLog, *, incarnation: int, staleness_limit: int) -> str:
    """Why the moments of a copy must not be taken over by `incarnation` of its maker's name; empty if they may."""
    maker = manifest.member
    if maker.incarnation >= incarnation:
        return f"it is of {maker}, which is not before incarnation {incarnation}"
    refused = [i for i in range(maker.incarnation, incarnation) if (maker.name, i) in log.refused]
    if refused:
        return f"an update of {maker.name}.{refused[-1]} was refused after it was made"
    for fragment, part in enumerate(manifest.fragments):
        if not log.on_path(fragment, part.chain):
            return f"its version {part.n} of fragment {fragment} is not in the history any more"
        if log.head(fragment) - part.n > staleness_limit:
            return f"it is of version {part.n}, {log.head(fragment) - part.n} versions ago (exchange.staleness_limit)"
    return ""


def residual_fate(manifest: Manifest, fragment: int, log: RecordLog, *, incarnation: int, held: int) -> Fate:
    """Whether `incarnation`, which holds version `held` of a fragment, owes its residual.

    Known once no open exchange can list its maker any more, nor those between the two, who may have inherited it as
    well: if one of them has had an offer committed, the residual may have been in it. Not before the version that left
    it is held: should that one be taken back, whoever holds it begins anew, and so does not send the residual of
    work that is in no anchor.
    """
    maker, part = manifest.member, manifest.fragments[fragment]
    if not part.has_residual:
        return "no"
    lives = [MemberId(name=maker.name, incarnation=i) for i in range(maker.incarnation, incarnation)]
    if held < part.n or any((life.name, life.incarnation) not in log.settled for life in lives):
        return "wait"
    sent_on = last_seq(log, fragment, maker) != part.seq or any(last_seq(log, fragment, life) for life in lives[1:])
    return "no" if sent_on or not log.on_path(fragment, part.chain) else "yes"


def newest_first(copies: Sequence[Copy]) -> list[Copy]:
    """In the order in which they are worth trying."""
    return sorted(copies, key=lambda copy: (copy.member.incarnation, sum(copy.versions)), reverse=True)
