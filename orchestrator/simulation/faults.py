"""The faults of a simulated run: when, to whom, for how long. All of them heal by themselves or by `heal_all`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator import events as ev
from orchestrator.simulation.scenario import FaultRates
from workers.records import MemberId

if TYPE_CHECKING:
    from orchestrator.simulation.cluster import Cluster
    from orchestrator.simulation.island import Island
    from orchestrator.simulation.symbols import StateChunk

HEAD = "head"
NOBODY = MemberId(name="", incarnation=0)


class Chaos:
    """Draws faults until it is told to stop."""

    def __init__(self, cluster: Cluster, rates: FaultRates) -> None:
        self.cluster, self.rates = cluster, rates
        self.active = True
        kinds: list[tuple[str, float, Callable[[], bool]]] = [
            ("kill", rates.kill, self._kill),
            ("kill_holders", rates.kill_holders, self._kill_holders),
            ("kill_all", rates.kill_all, self._kill_all),
            ("false_verdict", rates.false_verdict, self._false_verdict),
            ("hang", rates.hang, self._hang),
            ("stick", rates.stick, self._stick),
            ("slow", rates.slow, self._slow),
            ("cut", rates.cut, self._cut),
            ("cut_pair", rates.cut_pair, self._cut_pair),
            ("controller_crash", rates.controller_crash, self._controller_crash),
            ("crash_at_append", rates.crash_at_append, self._crash_at_append),
            ("zombie", rates.zombie, self._zombie),
            ("journal_full", rates.journal_full, self._journal_full),
            ("sync_error", rates.sync_error, self._sync_error),
            ("nan", rates.nan, self._nan),
            ("lie", rates.lie, self._lie),
            ("corrupt_anchor", rates.corrupt_anchor, self._corrupt_anchor),
            ("wrong_digest", rates.wrong_digest, self._wrong_digest),
            ("leave", rates.leave, self._leave),
            ("change_settings", rates.change_settings, self._change_settings),
            ("pause", rates.pause, self._pause),
            ("rollback", rates.rollback, self._rollback),
            ("distort", rates.distort, self._distort),
        ]
        self._names = [name for name, _, _ in kinds]
        self._weights = [weight for _, weight, _ in kinds]
        self._actions = {name: action for name, _, action in kinds}
        self.begun_s: float | None = None
        self._begin()

    def _begin(self) -> None:
        """The run goes on undisturbed for as many commits as the scenario says, or seconds, if there are none."""
        cluster, calm = self.cluster, self.cluster.scenario.calm_commits
        if len(cluster.exchange_rows) >= calm or cluster.time.now >= calm:
            self.begun_s = cluster.time.now
            self._next()
        else:
            cluster.time.after(0.2, self._begin)

    def _next(self) -> None:
        gap = self.cluster.rng.expovariate(1.0 / self.rates.mean_gap_s)
        self.cluster.time.after(gap, self._strike)

    def _strike(self) -> None:
        if not self.active:
            return
        name = self.cluster.rng.choices(self._names, self._weights)[0]
        self.inject(name)
        self._next()

    def inject(self, name: str) -> bool:
        """Cause one fault now; whether there was anything to do it to."""
        done = self._actions[name]()
        if done:
            self.cluster.counts[f"fault {name}"] += 1
            self.cluster.counts["faults"] += 1
        return done

    def is_over(self) -> bool:
        """Whether there were enough of them, or for long enough."""
        scenario = self.cluster.scenario
        enough = scenario.max_faults is not None and self.cluster.counts["faults"] >= scenario.max_faults
        late = self.begun_s is not None and self.cluster.time.now >= self.begun_s + scenario.fault_s
        return enough or late

    def heal_all(self) -> None:
        """Faults stop: links, processes and disk are well from now on; the dead stay dead."""
        cluster = self.cluster
        cluster.note("faults stop")
        self.active = cluster.faulty = False
        cluster.network.heal()
        cluster.disk.full = False
        for island in list(cluster.processes()):
            island.poison, island.replica.wrong_once, island.slowdown = 0, 0, 1.0
            island.distorts = False
            if island.frozen:
                island.thaw()
        if not cluster.controllers:
            cluster.start_controller()
        if self.rates.pause:
            self._go_on()

    # ------------------------------------------------------------ helpers

    def _pick(self) -> Island | None:
        islands = [island for island in self.cluster.processes() if not island.frozen]
        return self.cluster.rng.choice(islands) if islands else None

    def _span_s(self) -> float:
        """How long: mostly short, sometimes longer than limbo."""
        limbo = self.cluster.scenario.plan.exchange.limbo_s
        return self.cluster.rng.choice((0.3, 1.0, 2.0, limbo * 1.5)) * (0.5 + self.cluster.rng.random())

    # ------------------------------------------------------------ processes

    def _kill(self) -> bool:
        cluster, island = self.cluster, self._pick()
        if island is None or not cluster.may_kill(island):
            return False
        self._kill_one(island)
        return True

    def _kill_one(self, island: Island) -> None:
        cluster, nonce = self.cluster, island.machine.nonce
        cluster.note(f"FAULT kill {island.first_nonce}")
        cluster.kill(island)
        life = cluster.checks.book.lives.get(cluster.checks.book.by_nonce.get(nonce, NOBODY))
        if life is None or not life.live or cluster.rng.random() < 0.85:  # silence tells of a live member's death too
            cluster.report_death(island.name, nonce if cluster.rng.random() < 0.7 else None)

    def _kill_holders(self) -> bool:
        """Everybody who holds the newest commit of a fragment dies, if somebody holds an older version (C1, 1.8)."""
        cluster, book = self.cluster, self.cluster.checks.book
        if not book.commits:
            return False
        fragment = cluster.rng.randrange(len(book.commits))
        if not book.commits[fragment]:
            return False
        head = book.commits[fragment][-1]
        keys = {(fragment, digest) for digest in head.chunk_digests}
        holders: list[Island] = []
        others: list[Island] = []
        for island in cluster.processes():
            holds = island.replica.parts[fragment].chain == head.chain or keys <= island.store.content.keys()
            (holders if holds else others).append(island)
        if not others or not cluster.survives(others):
            return False
        for island in holders:
            self._kill_one(island)
        return bool(holders)

    def _false_verdict(self) -> bool:
        island = self._pick()
        if island is None:
            return False
        self.cluster.note(f"FAULT false verdict on {island.first_nonce}")
        self.cluster.report_death(island.name, island.machine.nonce)
        return True

    def _hang(self) -> bool:
        island = self._pick()
        if island is None:
            return False
        span = self._span_s()
        self.cluster.note(f"FAULT hang {island.first_nonce} for {span:.1f} s")
        island.freeze()
        self.cluster.time.after(span, self._thaw, island)
        return True

    def _thaw(self, island: Island) -> None:
        if island.alive and island.frozen:
            self.cluster.note(f"thaw {island.first_nonce}")
            island.thaw()

    def _stick(self) -> bool:
        """A training thread never comes back from a step, while its process goes on with everything else."""
        island = self._pick()
        if island is None or island.stuck or not self.cluster.may_kill(island):
            return False
        island.stuck = island.doomed = True  # it will be ended: what it holds does not count
        self.cluster.note(f"FAULT {island.first_nonce} is stuck in a step")
        if self.cluster.rng.random() < 0.5:  # some come back, before the verdict or after it
            self.cluster.time.after(8.0 * self.cluster.rng.random(), island.unstick)
        return True

    def _slow(self) -> bool:
        island = self._pick()
        if island is None or island.slowdown != 1.0:
            return False
        island.slowdown = self.cluster.rng.choice((3.0, 10.0))
        self.cluster.note(f"FAULT {island.first_nonce} takes {island.slowdown:g} times as long for a step")
        self.cluster.time.after(self._span_s(), self._quick, island)
        return True

    def _quick(self, island: Island) -> None:
        island.slowdown = 1.0

    def _kill_all(self) -> bool:
        """Every process dies at once; only if a sound snapshot is on the journal's path."""
        cluster = self.cluster
        snapshot = cluster.snapshots.newest_on_path(cluster.checks)
        if snapshot is None:
            return False
        names, book = cluster.names, cluster.checks.book
        for fragment, chunks in enumerate(snapshot):
            digest = names.of(("anchor", fragment, tuple(chunk.trail for chunk in chunks)))
            if digest != book.digests[fragment][chunks[0].chain] or cluster.checks.doubted(fragment):
                return False
        for island in list(cluster.processes()):
            self._kill_one(island)
        return True

    # ------------------------------------------------------------ links

    def _cut(self) -> bool:
        """Cut a member from the controller (one way or both), or from everybody."""
        rng, names = self.cluster.rng, list(self.cluster.islands)
        name = rng.choice(names)
        pairs = rng.choice(([(name, HEAD)], [(HEAD, name)], [(name, HEAD), (HEAD, name)]))
        if rng.random() < 0.4:
            pairs = [(a, b) for o in (*names, HEAD) if o != name for a, b in ((name, o), (o, name))]
        self._cut_links(pairs)
        return True

    def _cut_pair(self) -> bool:
        """Two members cannot reach each other; the controller reaches both."""
        names = list(self.cluster.islands)
        if len(names) < 2:
            return False
        one, other = self.cluster.rng.sample(names, 2)
        self._cut_links([(one, other), (other, one)])
        return True

    def _cut_links(self, pairs: list[tuple[str, str]]) -> None:
        span = self._span_s()
        self.cluster.note(f"FAULT cut {pairs} for {span:.1f} s")
        for source, target in pairs:
            self.cluster.network.block(source, target)
        self.cluster.time.after(span, self._heal_links, pairs)

    def _heal_links(self, pairs: list[tuple[str, str]]) -> None:
        self.cluster.note(f"heal {pairs}")
        for source, target in pairs:
            self.cluster.network.unblock(source, target)

    # ------------------------------------------------------------ controller and journal

    def _controller_crash(self) -> bool:
        cluster = self.cluster
        if not cluster.controllers:
            return False
        machine = cluster.rng.random() < 0.3
        cluster.note(f"FAULT controller crash, {'its machine too' if machine else 'process only'}")
        if machine:
            cluster.crash_head()
        else:
            cluster.lost(cluster.rng.choice(cluster.controllers), "crash")
        return True

    def _crash_at_append(self) -> bool:
        """The controller ends at one of the steps of its next append of a commit."""
        cluster = self.cluster
        if not cluster.controllers:
            return False
        stage = cluster.rng.choice(("before write", "after write", "after sync"))
        cluster.note(f"FAULT the controller will end {stage} of its next commit")
        cluster.rng.choice(cluster.controllers).doomed_at = stage
        return True

    def _zombie(self) -> bool:
        """A second controller starts while the first still lives."""
        if len(self.cluster.controllers) != 1:
            return False
        self.cluster.note("FAULT second controller")
        self.cluster.start_controller()
        return True

    def _leave(self) -> bool:
        island = self._pick()
        if island is None or island.name in self.cluster.leaving or not self.cluster.may_kill(island):
            return False
        self.cluster.note(f"{island.name} shall leave")
        self.cluster.leave(island.name, self._span_s())
        return True

    # ------------------------------------------------------------ what the user asks for

    def _change_settings(self) -> bool:
        rng = self.cluster.rng
        value = rng.choice(
            (
                ("strategy.outer_lr", rng.choice((0.3, 0.7, 1.0))),
                ("strategy.inner_steps", rng.choice((1, 2, 3, 4))),
                ("exchange.grace_s", rng.choice((0.0, 0.1, 0.5))),
                ("codec.name", rng.choice(("int4", "int8"))),
            )
        )
        return self._ask(ev.SettingsRequested(values=(value,)), f"set {value[0]} = {value[1]}")

    def _pause(self) -> bool:
        """A pause, and the order to go on a while later, unless a controller loses it: then `heal_all` gives it."""
        self.cluster.time.after(self._span_s(), self._go_on)
        return self._ask(ev.PauseRequested(paused=True, why="the simulator asks for it"), "pause")

    def _go_on(self) -> None:
        self._ask(ev.PauseRequested(paused=False, why="the simulator asks for it"), "resume")
        if not self.active and not self.cluster.finished:
            self.cluster.time.after(1.0, self._go_on)

    def _rollback(self) -> bool:
        """Back to a sound snapshot, if one is on the path."""
        cluster, book = self.cluster, self.cluster.checks.book
        kept = [s for s in cluster.snapshots.kept if all(self._is_sound(f, chunks) for f, chunks in enumerate(s))]
        if not kept or cluster.disk.full:
            return False
        snapshot = cluster.rng.choice(kept)
        versions, chains = tuple(c[0].n for c in snapshot), tuple(c[0].chain for c in snapshot)
        if all(n == len(commits) for n, commits in zip(versions, book.commits, strict=True)):
            return False
        cluster.snapshots.pin(snapshot)
        event = ev.RollbackRequested(name=f"v{max(versions)}", versions=versions, chains=chains, why="simulated")
        return self._ask(event, f"roll back to {versions}")

    def _is_sound(self, fragment: int, chunks: list[StateChunk]) -> bool:
        cluster = self.cluster
        digest = cluster.names.of(("anchor", fragment, tuple(chunk.trail for chunk in chunks)))
        return (
            cluster.checks.on_path(fragment, chunks[0].chain)
            and digest == (cluster.checks.book.digests[fragment][chunks[0].chain])
        )

    def _ask(self, event: ev.Event, what: str) -> bool:
        cluster = self.cluster
        if not cluster.controllers:
            return False
        cluster.note(f"the user asks: {what}")
        for controller in cluster.controllers:
            controller.handle(event)
        return True

    def _journal_full(self) -> bool:
        if self.cluster.disk.full:
            return False
        self.cluster.note("FAULT journal full")
        self.cluster.disk.full = True
        self.cluster.time.after(self._span_s(), self._space)
        return True

    def _space(self) -> None:
        self.cluster.disk.full = False

    def _sync_error(self) -> bool:
        if not self.cluster.controllers:
            return False
        self.cluster.note("FAULT next sync fails")
        self.cluster.controllers[0].fail_next_sync = True
        return True

    # ------------------------------------------------------------ bad numbers

    def _nan(self) -> bool:
        island = self._pick()
        if island is None:
            return False
        self.cluster.note(f"FAULT nan in {island.first_nonce}")
        island.poison, island.lies = 1, False
        return True

    def _lie(self) -> bool:
        island = self._pick()
        if island is None:
            return False
        self.cluster.note(f"FAULT {island.first_nonce} announces what it does not send")
        island.poison, island.lies = 1, True
        return True

    def _distort(self) -> bool:
        """One member at a time reduces wrongly for others: two that do it alike could not be told from honest ones."""
        island = self._pick()
        if island is None or any(other.distorts for other in self.cluster.processes()):
            return False
        self.cluster.note(f"FAULT {island.first_nonce} reduces wrongly for others")
        island.distorts = True
        self.cluster.time.after(self._span_s(), setattr, island, "distorts", False)
        return True

    def _corrupt_anchor(self) -> bool:
        """A bit flips in an anchor; only if somebody else holds the version."""
        cluster, island = self.cluster, self._pick()
        if island is None or not cluster.may_kill(island) or not island.machine.holds_all():
            return False
        if cluster.scenario.plan.exchange.copies < 2:
            return False  # what a member with such an anchor alone computes is sealed: nobody could tell
        fragment = cluster.rng.randrange(len(island.replica.parts))
        cluster.note(f"FAULT corrupt anchor of {island.first_nonce}, fragment {fragment}")
        island.corrupt = True
        part = island.replica.parts[fragment]
        part.trail[0] = cluster.names.of(("flipped", part.trail[0]))
        return True

    def _wrong_digest(self) -> bool:
        island = self._pick()
        if island is None or self.cluster.scenario.plan.exchange.copies < 2:
            return False  # with one copy nobody notices: that is what the setting costs
        self.cluster.note(f"FAULT {island.first_nonce} computes one digest wrongly")
        island.replica.wrong_once = 1
        return True
