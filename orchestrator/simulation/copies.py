"""Local states that are kept twice, in symbols: the counterpart of `workers/buddy.py`, with the same rules inside.

What counts here are residuals: one that is restored although its maker's last offer has sent it on is counted twice in
an anchor, which `symbols.absorb` refuses. A change in `workers/buddy.py` belongs here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.simulation.requests import Fetch, FetchFailed, Job, busy
from workers import member_events as ev
from workers import messages as msg
from workers.copies import Copy, KeptFragment, Manifest, last_seq, newest_first, residual_fate, why_unfit

if TYPE_CHECKING:
    from orchestrator.simulation.island import Island


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """A copy: what it says of itself, and the residual of each fragment."""

    manifest: Manifest
    residuals: tuple[int, ...]


class Copies:
    """The copies of one process."""

    def __init__(self, island: Island, *, staleness_limit: int) -> None:
        """Nothing is kept yet."""
        self.island, self.staleness_limit = island, staleness_limit
        self.buddy = ""
        self.served: dict[str, Kept] = {}
        self.mine: Copy | None = None
        self.kept: dict[str, Copy] = {}
        self.made: tuple[int, ...] = ()
        self.inheriting, self.begun = False, -1
        self.inherited: Kept | None = None
        self.owed: dict[int, Kept] = {}

    def told(self, body: msg.Keeping | msg.Inherit) -> None:
        """Who keeps what, or who kept what of those that had this place before."""
        machine = self.island.machine
        if isinstance(body, msg.Inherit):
            if body.sources and machine.consumed == 0 and self.begun != machine.incarnation:
                self.inheriting, self.begun = True, machine.incarnation or 0
                self.island._work(self._inherit(body.sources))
            return
        self.buddy = body.buddy
        if self.mine is not None and body.held == self.mine.digest:
            self._withdraw()
        for name in [name for name in self.kept if name not in body.keep]:
            del self.served[self.kept.pop(name).digest]
        self._tell()
        for copy in body.wards:
            peer = machine.peers.get(str(copy.member))
            if self.kept.get(copy.member.name) != copy and peer is not None:
                self.island._work(self._fetch(copy, peer[0]))

    def _tell(self) -> None:
        self.island.machine.kept = tuple(copy for _, copy in sorted(self.kept.items()))

    def _withdraw(self) -> None:
        if self.mine is not None:
            self.served.pop(self.mine.digest, None)
        self.mine = self.island.machine.copy = None

    def forget(self) -> None:
        """The incarnation is over."""
        self._withdraw()
        self.inherited, self.owed, self.made = None, {}, ()

    def at_boundary(self) -> bool:
        """Begin from what was inherited, or make a copy. Whether training is to wait for the former."""
        machine, counts = self.island.machine, self.island.cluster.counts
        if self.inheriting:
            return True
        if self.inherited is not None:
            found, self.inherited = self.inherited, None
            assert machine.incarnation is not None
            limit = self.staleness_limit
            if not why_unfit(found.manifest, machine.log, incarnation=machine.incarnation, staleness_limit=limit):
                counts["copies restored"] += 1
                self.owed = {f: found for f, part in enumerate(found.manifest.fragments) if part.has_residual}
        for fragment, found in list(self.owed.items()):
            state = machine.fragments[fragment]
            assert machine.incarnation is not None
            fate = residual_fate(found.manifest, fragment, machine.log, incarnation=machine.incarnation, held=state.n)
            if fate != "wait" and state.pending is None:
                del self.owed[fragment]
                counts[f"residuals owed: {fate}"] += 1
                if fate == "yes":
                    self.island.replica.parts[fragment].e |= found.residuals[fragment]
        self._copy_if_due()
        return False

    def _copy_if_due(self) -> None:
        machine, parts = self.island.machine, self.island.replica.parts
        versions = tuple(state.n for state in machine.fragments)
        if self.mine is not None or not self.buddy or not machine.consumed or versions == self.made:
            return
        self.made = versions
        fragments = tuple(
            KeptFragment(
                n=state.n,
                chain=state.chain,
                seq=last_seq(machine.log, f, machine.id, upto=state.n),
                has_residual=part.e > 0,
            )
            for f, (state, part) in enumerate(zip(machine.fragments, parts, strict=True))
        )
        manifest = Manifest(
            run_id=machine.run_id, member=machine.id, steps=machine.steps, fragments=fragments, pieces=(), num_bytes=1
        )
        name = manifest.encode().hex()
        self.served[name] = Kept(manifest=manifest, residuals=tuple(part.e for part in parts))
        self.mine = machine.copy = Copy(member=machine.id, versions=versions, digest=name, num_bytes=1)
        self.island.cluster.counts["copies made"] += 1

    def _fetch(self, copy: Copy, address: str) -> Job:
        yield busy(self.island)
        try:
            found = yield Fetch(address, lambda server: _served(server, copy))
        except FetchFailed:
            return None
        old = self.kept.get(copy.member.name)
        if old is not None:
            self.served.pop(old.digest, None)
        self.kept[copy.member.name] = copy
        self.served[copy.digest] = found
        self._tell()
        return ev.Tick()

    def _inherit(self, sources: Sequence[tuple[Copy, str]]) -> Job:
        addresses = {copy.digest: address for copy, address in sources}
        self.inherited = None
        for copy in newest_first([copy for copy, _ in sources]):
            try:
                self.inherited = yield Fetch(addresses[copy.digest], lambda server, c=copy: _served(server, c))  # type: ignore[misc]
                break
            except FetchFailed:
                continue
        self.inheriting = False
        return ev.Tick()


def _served(server: Island, copy: Copy) -> Kept | None:
    return server.copies.served.get(copy.digest) if server.copies is not None else None
