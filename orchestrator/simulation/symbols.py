"""Tensors as sets of samples: what one member holds, in symbols (the counterpart of `workers/replica.py`).

A displacement is the set of samples whose gradients it sums. The codec sends each sample at once in coarse form
(`hi`); what it rounds away (`lo`, the residual) must be delivered once, later, by error feedback. An anchor is, per
chunk, the `hi` and `lo` that it absorbed. So "counted twice", "half a contribution" and "lost residual" are set
algebra. Sets are integers used as bit sets; digests are short names, equal exactly for equal content.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from workers import member_rules as rules
from workers.ranges import Range
from workers.records import Scalar


class Violation(AssertionError):
    """An invariant does not hold; `number` as in section 2 of the protocol, 0 for the simulator's own."""

    def __init__(self, number: int, story: str) -> None:
        super().__init__(f"invariant {number}: {story}")
        self.number, self.story = number, story


def must(condition: object, number: int, story: str) -> None:
    """Raise `Violation` unless `condition`."""
    if not condition:
        raise Violation(number, story)


def bits_of(spans: Iterable[Range]) -> int:
    """Bit set of sample positions; a position that comes twice is a bug of the caller's."""
    out = 0
    for start, stop in spans:
        out |= ((1 << (stop - start)) - 1) << start
    return out


class BadPiece(ValueError):
    """A contribution that must not count; the second argument is its place in the roster."""


class NonFinite(ValueError):
    """A contribution that is not finite where it was made."""


class StateTorn(RuntimeError):
    """A state that was applied has another digest than its record."""


class Names:
    """Digests: one short name for each content, the same in every run with the same seed."""

    __slots__ = ("_known", "wrong_ones")

    def __init__(self) -> None:
        self._known: dict[Hashable, str] = {}
        self.wrong_ones: set[str] = set()

    def wrong(self, content: Hashable) -> str:
        """A name for a content computed wrongly: never the same twice."""
        name = self.of(("wrong", len(self._known), content))
        self.wrong_ones.add(name)
        return name

    def of(self, content: Hashable) -> str:
        """The name of a content."""
        name = self._known.get(content)
        if name is None:
            name = self._known[content] = f"{len(self._known):08x}"
        return name


@dataclass(frozen=True, slots=True)
class Payload:
    """An encoded chunk: of a contribution or of a result."""

    hi: int
    lo: int
    bad: bool
    digest: str


@dataclass(frozen=True, slots=True)
class StateChunk:
    """One chunk of a served state; `trail` names everything that was ever applied to it."""

    n: int
    chain: str
    hi: int
    lo: int
    trail: str


@dataclass(kw_only=True, slots=True)
class Part:
    """One fragment of a member: anchor per chunk, displacement `d`, residual `e`, and what was offered of them."""

    hi: list[int]
    lo: list[int]
    trail: list[str]
    n: int = -1
    chain: str = ""
    d: int = 0
    e: int = 0
    next_e: int = 0
    sent_d: int = 0
    held: int | None = None
    aside: int | None = None
    bad: int = 0

    def open(self) -> int:
        """The whole displacement, wherever it is."""
        return self.d | (self.aside or 0)


@dataclass(kw_only=True, slots=True)
class Replica:
    """All fragments of one process.

    `feedback`: whether the codec loses something and keeps it as a residual. `sets_aside`: what is under way is no
    part of the live parameters (`d`) any more, but kept beside them.
    """

    names: Names
    num_chunks: tuple[int, ...]
    feedback: bool
    settings_at: Callable[[int, int], tuple[tuple[str, Scalar], ...]] = lambda fragment, n: ()
    sets_aside: bool = False
    parts: list[Part] = field(default_factory=list)
    wrong_once: int = 0

    def __post_init__(self) -> None:
        """Empty parts: no version yet."""
        self.parts = [Part(hi=[0] * n, lo=[0] * n, trail=[""] * n) for n in self.num_chunks]

    # ------------------------------------------------------------ versions

    def make_genesis(self, chain: str, maker: str) -> tuple[str, ...]:
        """Version 0; two makers would make different bits."""
        for fragment, part in enumerate(self.parts):
            part.n, part.chain = 0, chain
            part.trail = [self.names.of(("genesis", maker, fragment, c)) for c in range(len(part.trail))]
        return tuple(self.digest(f) for f in range(len(self.parts)))

    def digest(self, fragment: int) -> str:
        """Digest of anchor and outer state."""
        return self.names.of(("anchor", fragment, tuple(self.parts[fragment].trail)))

    def step(self, *, samples: int, bad: bool) -> None:
        """One inner step on a bit set of samples; `bad`: it made something that is not finite, or not what is said."""
        for part in self.parts:
            must(not part.open() & samples, 6, "a member trained on a sample twice")
            part.d |= samples
            if bad:
                part.bad |= samples

    # ------------------------------------------------------------ contributing

    def encode(self, fragment: int, *, lies: bool) -> tuple[Payload, ...]:
        """Encode displacement and residual. Raises `NonFinite`; with `lies` a bad one is sent instead."""
        part = self.parts[fragment]
        whole = part.open()
        bad = bool(part.bad & whole)
        if bad and not lies:
            raise NonFinite("its displacement holds a step that was not finite")
        part.next_e = whole if self.feedback else 0
        part.sent_d, part.held = whole, None
        if self.sets_aside:
            must(not part.d & (part.aside or 0), 6, "a displacement is in two places")
            part.aside, part.d = whole, 0
        lo = part.e if self.feedback else 0
        return tuple(
            Payload(whole, lo, bad, self.names.of(("piece", fragment, c, whole, lo, bad)))
            for c in range(len(part.trail))
        )

    def hold_displacement(self) -> None:
        """Before the first step after an offer: keep what was offered."""
        for part in self.parts:
            if part.sent_d and part.held is None and not self.sets_aside:
                part.held = part.d

    def reduce(
        self, fragment: int, chunk: int, pieces: Sequence[tuple[Payload, float]], device: int, n: int
    ) -> Payload:
        """Result of one chunk from `(payload, coefficient)` in roster order; devices give different bits."""
        hi = lo = 0
        for place, (payload, _) in enumerate(pieces):
            if payload.bad:
                raise BadPiece("its sum of squares is not what was announced", place)
            must(not hi & payload.hi, 3, "two contributions of one roster overlap")
            must(not lo & payload.lo, 3, "two residuals of one roster overlap")
            hi |= payload.hi
            lo |= payload.lo
        made_of: tuple[Hashable, ...] = tuple((payload.digest, coefficient) for payload, coefficient in pieces)
        if settings := self.settings_at(fragment, n):  # the codec of results
            made_of = (*made_of, settings)
        return Payload(hi, lo, False, self.names.of(("result", fragment, chunk, made_of, device)))

    # ------------------------------------------------------------ the next version

    def next_digest(self, fragment: int, payloads: Sequence[Payload]) -> str:
        """Digest of the next version under a result; a device that computes wrongly once gives another."""
        part = self.parts[fragment]
        settings = self.settings_at(fragment, part.n)
        trail = tuple(
            self.names.of(stepped(old, p.digest, settings)) for old, p in zip(part.trail, payloads, strict=True)
        )
        if self.wrong_once:
            self.wrong_once -= 1
            return self.names.wrong(trail)
        return self.names.of(("anchor", fragment, trail))

    def apply(
        self, fragment: int, payloads: Sequence[Payload], *, n: int, chain: str, sealed: str, included: bool
    ) -> None:
        """Move to version `n`; raises `StateTorn` if the new version is not the sealed one."""
        part = self.parts[fragment]
        settings = self.settings_at(fragment, part.n)
        for chunk, payload in enumerate(payloads):
            part.hi[chunk], part.lo[chunk], part.trail[chunk] = absorb(
                self.names, part.hi[chunk], part.lo[chunk], part.trail[chunk], payload, settings
            )
        part.n, part.chain = n, chain
        if included and not self.sets_aside:
            part.d = 0 if part.held is None else part.d & ~part.held
        self._conclude(part, included=included)
        if self.digest(fragment) != sealed:
            raise StateTorn(f"fragment {fragment} version {n}: applied state differs from the sealed digest")

    def _conclude(self, part: Part, *, included: bool) -> None:
        part.e = rules.residual_after(part.e, part.next_e, included=included)
        part.aside = rules.aside_after(part.aside, included=included)
        part.next_e, part.sent_d, part.held = 0, 0, None
        part.bad &= part.open()

    # ------------------------------------------------------------ states of others

    def serve(self, fragment: int, chunk: int) -> StateChunk | None:
        """One chunk of the present state, or None."""
        part = self.parts[fragment]
        if part.n < 0:
            return None
        return StateChunk(part.n, part.chain, part.hi[chunk], part.lo[chunk], part.trail[chunk])

    def step_chunk(
        self, fragment: int, chunk: int, state: StateChunk, payloads: Sequence[Payload], *, n: int, chain: str
    ) -> StateChunk:
        """Bring a fetched chunk from version n-1 to `n` with that version's result."""
        settings = self.settings_at(fragment, n - 1)
        hi, lo, trail = absorb(self.names, state.hi, state.lo, state.trail, payloads[chunk], settings)
        return StateChunk(n, chain, hi, lo, trail)

    def digest_of_chunks(self, fragment: int, chunks: Sequence[StateChunk]) -> str:
        """Digest that `digest` would give for these chunks."""
        return self.names.of(("anchor", fragment, tuple(chunk.trail for chunk in chunks)))

    def install(self, fragment: int, chunks: Sequence[StateChunk], *, included: bool, fresh: bool) -> None:
        """Take over a fetched state. `fresh`: nothing is uncommitted; else the displacement is kept."""
        part = self.parts[fragment]
        part.hi, part.lo = [c.hi for c in chunks], [c.lo for c in chunks]
        part.trail = [c.trail for c in chunks]
        part.n, part.chain = chunks[0].n, chunks[0].chain
        if included and not self.sets_aside:
            part.d &= ~(part.held if part.held is not None else part.d)
        self._conclude(part, included=included)
        if fresh:
            part.d, part.aside = 0, None

    def reset(self) -> None:
        """Drop everything that is not committed."""
        for part in self.parts:
            if part.n >= 0:
                self._clear(part)

    @staticmethod
    def _clear(part: Part) -> None:
        part.d = part.e = part.next_e = part.sent_d = part.bad = 0
        part.held = part.aside = None


def stepped(trail: str, digest: str, settings: Hashable) -> Hashable:
    """What names a chunk of an anchor after a result, under the settings of the outer step."""
    return (trail, digest, settings) if settings else (trail, digest)


def absorb(names: Names, hi: int, lo: int, trail: str, payload: Payload, settings: Hashable) -> tuple[int, int, str]:
    """One chunk of an anchor after a result."""
    must(not hi & payload.hi, 4, "a sample is counted twice in an anchor")
    must(not lo & payload.lo, 6, "a residual is counted twice in an anchor")
    must(not payload.lo & ~hi, 6, "a residual of work that was never included arrives")
    return hi | payload.hi, lo | payload.lo, names.of(stepped(trail, payload.digest, settings))


class Store:
    """What one process serves: pieces and results by name (grouped by their prefix), results by content."""

    __slots__ = ("changed", "content", "groups")

    def __init__(self) -> None:
        self.groups: dict[str, dict[int, Payload]] = {}
        self.content: dict[tuple[int, str], Payload] = {}
        self.changed = True  # since it was last looked at

    def put(self, group: str, chunk: int, payload: Payload) -> None:
        """Store a chunk under its name."""
        self.groups.setdefault(group, {})[chunk] = payload
        self.changed = True

    def get(self, group: str, chunk: int) -> Payload | None:
        """A chunk by name."""
        return self.groups.get(group, {}).get(chunk)

    def discard(self, prefix: str) -> None:
        """Drop the groups at and below a prefix."""
        self.changed = True
        if self.groups.pop(prefix, None) is not None:  # a whole name: nothing is below it
            return
        below = prefix + "/"
        for group in [g for g in self.groups if g.startswith(below)]:
            del self.groups[group]


def num_versions(state: list[list[StateChunk]]) -> int:
    """How far a whole state is."""
    return sum(chunks[0].n for chunks in state)


class Path(Protocol):
    """What knows a journal's history."""

    def on_path(self, fragment: int, chain: str) -> bool:
        """Whether a version belongs to it."""
        ...


class Snapshots:
    """The run's folder of durable snapshots: whole states of all fragments, a few of the newest."""

    KEPT = 3

    def __init__(self) -> None:
        self.kept: list[list[list[StateChunk]]] = []
        self.pinned: list[list[list[StateChunk]]] = []

    def pin(self, state: list[list[StateChunk]]) -> None:
        """Keep what a rollback goes to, whatever is written meanwhile; the one before is kept no longer."""
        self.pinned = [state]

    def write(self, replica: Replica) -> None:
        """One more, of a replica that holds every fragment."""
        state = [
            [chunk for c in range(len(part.trail)) if (chunk := replica.serve(fragment, c)) is not None]
            for fragment, part in enumerate(replica.parts)
        ]
        self.kept = sorted([*self.kept, state], key=num_versions)[-self.KEPT :]

    def set_aside(self, versions: Sequence[int]) -> None:
        """The run went back to these versions: later ones are no part of its history."""
        self.kept = [
            state for state in self.kept if all(chunks[0].n <= n for chunks, n in zip(state, versions, strict=True))
        ]

    def newest_on_path(self, log: Path) -> list[list[StateChunk]] | None:
        """The newest one whose versions all belong to a journal's history."""
        for state in sorted([*self.pinned, *self.kept], key=num_versions, reverse=True):
            if all(log.on_path(fragment, chunks[0].chain) for fragment, chunks in enumerate(state)):
                return state
        return None
