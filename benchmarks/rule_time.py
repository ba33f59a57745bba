"""Whether an exchange takes longer under the preset's rule: `python -m benchmarks.rule_time`, two minutes.

Whole exchanges of production code, from the first offer to the last application of the result: controller, members,
codec (int8) and Arrow Flight transports on real sockets, 8 members of 4 M values as threads of one process. Three runs
are alive at the same time and make one exchange each in turn, in changing order: plain averaging, the rule of
`robust.toml`, and plain averaging once more, which says how much two runs of the *same* rule differ on this machine.
`robust.verify` is off: it is for something else, and may double the traffic of contributions. Contributions differ in
length, so that about half of them are shortened.

Places: `paced`, every member's uplink carries 50 Mbit/s and every fetch takes a round trip of 40 ms, as in
`benchmarks/gossip_sync.py`; `loopback`, nothing is paced, and the cores decide, which 8 members share here.

Every place that is measured is kept in `results/rule_time.json` at once, and not measured again (`--fresh`).
Goal: at most 10 % more, in both places.
"""

from __future__ import annotations

import argparse
import json
import queue
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, keep, spread
from benchmarks.overlap import ONE_WAY_S, Link, LinkedTransport
from benchmarks.robust_plan import NUM_ISLANDS, PRESET
from orchestrator.desk import RunPlan
from orchestrator.host import Host
from orchestrator.settings import ExchangeConfig, RobustConfig
from strategies.config import CodecConfig, StrategyConfig
from strategies.fragments import TensorSpec, default_chunk_values, plan_fragments
from strategies.registry import build_strategy, warm_up
from workers import messages as msg
from workers.actions import EvaluateNow, Finished, SaveNow, TrainOn, WaitFor
from workers.config import TrainConfig
from workers.jobs import MemberStore
from workers.member import MemberMachine
from workers.memory import keep_heap
from workers.replica import Replica
from workers.sync import IslandSync, SyncSettings
from workers.transport.flight import FlightTransport

NAME, NUM_VALUES, BYTES_PER_S, LIMIT = "rule_time", 1 << 22, 50e6 / 8, 0.10
PLACES = {"paced": 15, "loopback": 30}
"""How often each run makes an exchange, one that warms up aside."""
CASES = {"mean": "mean", PRESET: PRESET, "mean again": "mean"}
SAMPLES, LIMIT_S = 1_000_000, 120.0


class Member:
    """One member: a training thread that makes one step when it is told to, and offers it."""

    def __init__(self, fleet: Fleet, rank: int, values: torch.Tensor, step: torch.Tensor) -> None:
        """Its transport serves at once; nothing else runs before `start`."""
        self.fleet, self.values, self.step, self.name = fleet, values, step, f"island-{rank}"
        store = MemberStore()
        self.transport = FlightTransport(store, host="127.0.0.1", token=fleet.token, num_connections=2)
        self.transport.start()
        strategy = build_strategy(
            StrategyConfig(inner_steps=1), CodecConfig(name="int8"), lr_at=lambda progress: 1e-3, train=TrainConfig()
        )
        for codec in (strategy.codec, strategy.result_codec):
            warm_up(codec)
        specs = plan_fragments(
            [TensorSpec(name="p", shape=(values.numel(),))], num_fragments=1, pattern="strided",
            chunk_values=default_chunk_values(values.numel(), strategy.codec.block),
        )  # fmt: skip
        self.machine = MemberMachine(
            run_id=NAME, name=self.name, nonce=f"{self.name}-benchmark", num_chunks=[s.num_chunks for s in specs],
            info=msg.ProcessInfo(address=self.transport.address, node=self.name, weight=1, batch_size=1),
        )  # fmt: skip
        reached: Any = self.transport
        if fleet.bytes_per_s is not None:
            fleet.links[self.transport.address] = Link(fleet.bytes_per_s)
            reached = LinkedTransport(self.transport, fleet.links)
        self.pool = ThreadPoolExecutor(4)  # as an island on Ray
        self.sync = IslandSync(
            machine=self.machine,
            replica=Replica(specs=specs, strategy=strategy, tensors={"p": values}, total_samples=SAMPLES),
            store=store,
            transport=reached,
            post=lambda envelope: fleet.jobs.put(lambda: fleet.host.receive(envelope)),
            clock=time.monotonic,
            settings=SyncSettings(
                batch_size=1, timeout_s=LIMIT_S, wait_s=LIMIT_S, heartbeat_s=1.0, bound_rounds=4.0,
                total_samples=SAMPLES,
            ),
            executor=self.pool,
        )  # fmt: skip
        self.may_step = threading.Semaphore(0)
        self.over = False
        self.thread = threading.Thread(target=self._train, name=f"train-{self.name}")

    def start(self) -> None:
        """Join, and train when it is told to."""
        self.sync.start()
        self.thread.start()

    def close(self) -> None:
        """End everything of it."""
        self.over = True
        self.may_step.release()
        self.thread.join()
        self.sync.close()
        self.pool.shutdown()
        self.transport.stop()

    def _train(self) -> None:
        said = -1
        while not self.over:
            action = self.sync.boundary()
            now, state = time.monotonic(), self.machine.fragments[0]
            if state.pending is not None:
                self.fleet.offered.setdefault(state.n, now)
            elif state.n > said:
                said = state.n
                self.fleet.arrived.put((said, now))
            match action:
                case TrainOn(ranges=todo):
                    self.may_step.acquire()
                    self.values.add_(self.step)
                    self.sync.stepped(sum(stop - start for start, stop in todo))
                case WaitFor(timeout_s=timeout_s):
                    self.sync.wait(timeout_s)
                case EvaluateNow(samples=samples):
                    self.sync.say(msg.Evaluated(versions=(state.n,), samples=samples, val_loss=None))
                case SaveNow(order=order):
                    self.sync.say(msg.Saved(name=order.name, versions=(state.n,), local=order.local))
                case Finished():
                    return


class Fleet:
    """A run of 8 members under one rule, which makes an exchange when it is told to."""

    def __init__(self, rule: str, num_values: int, bytes_per_s: float | None, folder: Path) -> None:
        """`bytes_per_s`: of every member's uplink; None: it is not paced."""
        self.bytes_per_s, self.token = bytes_per_s, secrets.token_hex(16)
        self.links: dict[str, Link] = {}
        self.jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.offered: dict[int, float] = {}
        self.arrived: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
        folder.mkdir()
        names = tuple(f"island-{rank}" for rank in range(NUM_ISLANDS))
        plan = RunPlan(
            run_id=NAME, islands=names, total_samples=SAMPLES, seq_len=1, strategy=StrategyConfig(inner_steps=1),
            exchange=ExchangeConfig(quorum=1.0, timeout_s=LIMIT_S, progress_timeout_s=LIMIT_S, suspect_s=60.0),
            robust=RobustConfig.model_validate({"rule": rule}), eval_every=2.0, start_timeout_s=LIMIT_S,
            snapshot_every_s=1e9, replace_dead=False, max_restarts=0, judges_hangs=False,
        )  # fmt: skip
        self.host = Host(
            plan=plan, run_dir=folder, controller="benchmark", clock=time.monotonic, deliver=self._deliver,
            spawn=lambda name, why: None, end=lambda name, nonce, save_stack: None,
        )  # fmt: skip
        self.host.open()
        first = torch.from_numpy(np.random.default_rng(0).normal(size=num_values).astype(np.float32))
        self.members: dict[str, Member] = {}
        for rank, name in enumerate(names):
            # Lengths from 0.9 to 1.1 of a usual one: half of them above the median.
            draw = np.random.default_rng(1 + rank).normal(
                scale=1e-3 * (0.9 + 0.2 * rank / NUM_ISLANDS), size=num_values
            )
            self.members[name] = Member(self, rank, first.clone(), torch.from_numpy(draw.astype(np.float32)))
        self.thread = threading.Thread(target=self._control, name="controller")
        self.thread.start()
        for member in self.members.values():
            member.start()
        self._all_at(0)

    def _deliver(self, batch: Any) -> None:
        self.members[batch.name].sync.deliver(batch)

    def _control(self) -> None:
        while True:
            try:
                job: Callable[[], None] | None = self.jobs.get(timeout=0.1)
            except queue.Empty:
                job = self.host.tick
            if job is None:
                return
            job()

    def _all_at(self, n: int) -> float:
        """Wait until every member has version `n`; when the last one got there."""
        last, left = 0.0, NUM_ISLANDS
        while left:
            version, at_s = self.arrived.get(timeout=LIMIT_S)
            left -= version == n
            last = max(last, at_s)
        return last

    def exchange(self, n: int) -> float:
        """Make version `n`: seconds from the first offer to the last application."""
        for member in self.members.values():
            member.may_step.release()
        return self._all_at(n) - self.offered[n - 1]

    def close(self) -> None:
        """End members and controller."""
        for member in self.members.values():
            member.close()
        self.jobs.put(None)
        self.thread.join()
        self.host.close()


def measure(place: str, num_values: int, rounds: int) -> dict[str, Any]:
    """Exchanges of the three runs in turn; each round's are compared with each other."""
    rate = BYTES_PER_S if place == "paced" else None
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    fleets: dict[str, Fleet] = {}
    with tempfile.TemporaryDirectory(prefix="atoll-rule-time-") as folder:
        try:
            for case, rule in CASES.items():
                fleets[case] = Fleet(rule, num_values, rate, Path(folder) / case.replace(" ", "-"))
            order = list(CASES)
            for n in range(1, rounds + 2):
                order = [*order[1:], order[0]]
                for case in order:
                    seconds[case].append(fleets[case].exchange(n))
        finally:
            for fleet in fleets.values():
                fleet.close()
    kept = {case: values[1:] for case, values in seconds.items()}
    ratios = {
        case: [mine / base for mine, base in zip(kept[case], kept["mean"], strict=True)]
        for case in (PRESET, "mean again")
    }
    return {
        "values": num_values,
        "members": NUM_ISLANDS,
        "seconds": {case: spread(values) for case, values in kept.items()},
        "over_mean": {case: spread(values) for case, values in ratios.items()},
    }


def goals(result: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Of each place: the goal, what was found, whether it is met."""
    out = []
    for place in PLACES:
        if place not in result:
            continue
        over = result[place]["over_mean"]
        cost, same = over[PRESET]["median"] - 1.0, over["mean again"]["median"] - 1.0
        link = f"{8e-6 * BYTES_PER_S:g} Mbit/s a member" if place == "paced" else "loopback, not paced"
        text = f"an exchange of {NUM_ISLANDS} under the preset's rule, {link}: at most {100 * LIMIT:g} % longer"
        found = f"{100 * cost:+.1f} % (plain averaging against itself {100 * same:+.1f} %)"
        out.append((text, found, cost <= LIMIT))
    return out


def kept() -> dict[str, Any]:
    """What was measured so far, by place."""
    path = RESULTS / f"{NAME}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return {place: found[place] for place in PLACES if place in found}


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, keep and report it; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="measure what was measured before, too")
    parser.add_argument("--values", type=int, default=NUM_VALUES, help="parameters of the model")
    parser.add_argument("--rounds", type=int, default=0, help="exchanges of each run in each place")
    parser.add_argument("--dry", action="store_true", help="keep nothing")
    options = parser.parse_args(arguments)
    keep_heap()
    torch.set_num_threads(1)
    result = {} if options.fresh or options.dry else kept()
    for place, rounds in PLACES.items():
        if place not in result:
            result[place] = measure(place, options.values, options.rounds or rounds)
            if not options.dry:
                keep(NAME, {"one_way_s": ONE_WAY_S, "bytes_per_s": BYTES_PER_S, **result})
    for text, found, met in goals(result):
        print(f"{text}: {found}, {'met' if met else 'missed'}")
    return int(not all(met for _, _, met in goals(result)))


if __name__ == "__main__":
    sys.exit(main())
