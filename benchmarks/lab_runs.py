"""Training on the clusters of a lab: a region cut off for a minute, exchanges against plain Flight, what overlap hides.

Called by `benchmarks.lab`. All start real Ray clusters across emulated links (`faults.lab.cluster`).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import overlap as paced
from benchmarks.lab_links import one_way_s, spread_of
from benchmarks.plain_flight import both_ways
from faults.lab.cluster import LabCluster
from faults.lab.lab import Lab
from orchestrator.config import load_config
from orchestrator.metrics import ExchangeRow, StepRow, read_rows
from orchestrator.topology import load_topology
from tests.lab.chain import make_chain_pack
from tests.lab.live import LabRun
from tests.small_run import small_config

Row = dict[str, Any]
EVERYBODY = {"island-0", "island-1", "island-2"}
CONNECTIONS = 8
END_S = 300.0
TARGETS = {"two-regions": (5, 0.90), "slow-pair": (0, 0.93)}
"""Of each topology: one-way delays that belong to the optimum, and the share of the optimum that is promised."""
CUT_SETTINGS = [
    "run.islands=3",
    "exchange.quorum=0.5",
    "exchange.staleness_limit=128",
    "strategy.inner_steps=10",
    "train.tokens=96000",
    "train.pace_s=0.15",
    "train.lr=2e-2",
    "eval.windows=256",
]
EXCHANGE_SETTINGS = [
    "run.islands=2",
    "model.layers=4",
    "model.dim=256",
    "model.heads=8",
    "strategy.inner_steps=4",
    "train.batch_size=1",
    "train.tokens=1536",
    "exchange.chunk_values=65536",
    f"exchange.connections={CONNECTIONS}",
]
OVERLAP_ROUNDS = 8
OVERLAP_MODEL = ("model.dim=144", "exchange.chunk_values=16384", "run.address=auto")
"""Whose exchange in fp32 takes as long over 10 Mbit/s and 40 ms as the steps between two."""


def cut(seconds: float, congestion: str) -> Row:
    """The same run twice on three continents, once with Europe cut off for a time."""
    topology = load_topology("three-continents").model_copy(update={"congestion": congestion})
    with tempfile.TemporaryDirectory() as scratch, Lab(topology) as lab:
        cluster = LabCluster(lab)
        cluster.start()
        config = small_config(make_chain_pack(Path(scratch)), *CUT_SETTINGS)
        losses, row = [], {}
        for name in ("uncut", "cut"):
            folder = Path(scratch) / name
            folder.mkdir()
            with LabRun(cluster, folder, config) as run:
                run.until(lambda run=run: run.last_commit_of(EVERYBODY), "a commit of all three")
                if name == "cut":
                    row = _cut(lab, run, seconds)
                losses.append(run.finish(within_s=END_S).final_val_loss)
    difference = abs(losses[1] / losses[0] - 1)
    row |= {"loss_uncut": losses[0], "loss_cut": losses[1], "loss_difference_percent": 100 * difference}
    good = row["same_processes"] and row["steps_counted"] > 10 and difference < 0.02
    return {"congestion": congestion, "cut_s": seconds, **row, "ok": bool(good)}


def _cut(lab: Lab, run: LabRun, seconds: float) -> Row:
    before, pids, lost = len(run.commits()), run.pids(), run.island_on("eu-1")
    lab.cut("eu")
    time.sleep(seconds)
    known = len(run.commits())
    lab.heal("eu")
    healed_s = time.monotonic()
    commit = run.until(lambda: run.last_commit_of({lost}, after=known), f"{lost} in a commit again")
    [entry] = [entry for entry in commit.roster if entry.member == lost]
    return {
        "commits_meanwhile": known - before,
        "contributed_after_s": round(time.monotonic() - healed_s, 1),
        "steps_counted": entry.num_steps,
        "same_processes": run.pids() == pids,
    }


def exchange(name: str, congestion: str) -> Row:
    """Exchanges of two islands against plain Flight with as many connections and as many bytes each way.

    An exchange is timed by the controller of a real run, from its closing to its commit: without the way of the offers,
    the pieces that owners pull while an offer is awaited, the way of the commit, and its application.
    """
    topology = load_topology(name).model_copy(update={"congestion": congestion})
    with tempfile.TemporaryDirectory() as scratch, Lab(topology) as lab:
        cluster = LabCluster(lab)
        cluster.start()
        config = small_config(make_chain_pack(Path(scratch)), *EXCHANGE_SETTINGS)
        with LabRun(cluster, Path(scratch), config) as run:
            run.finish()
            found = [row for row in read_rows(run.run_dir / "metrics.jsonl") if isinstance(row, ExchangeRow)]
        rows = found[1:]  # the first one opens connections
        num_bytes = int(statistics.median(row.bytes for row in rows)) // 2
        a, b = lab.nodes
        plain = both_ways(lab, a, b, num_bytes=num_bytes, connections=CONNECTIONS, repeats=len(rows))
    ours, theirs = statistics.median(row.seconds for row in rows), statistics.median(plain[1:])
    row = {
        "topology": name,
        "congestion": congestion,
        "mb_each_way": round(num_bytes / 1e6, 1),
        "exchange_s": round(ours, 3),
        "plain_flight_s": round(theirs, 3),
        "ratio": round(theirs / ours, 3),
        "exchanges": len(rows),
    }
    return row | judged(row)


def judged(row: Row) -> Row:
    """An exchange against its optimum: the plain transfer and, where distance counts, the five messages it needs.

    The optimum is that of a whole exchange, and what is timed is a part of one (`exchange`), so the share is this at
    most: a row can show that a promise is broken, not that it is kept. `benchmarks.exchange` times all of it.
    """
    topology = str(row["topology"])
    delays, at_least = TARGETS[topology]
    optimum_s = row["plain_flight_s"] + delays * one_way_s(load_topology(topology))
    of_optimum = optimum_s / row["exchange_s"]
    return {"optimum_s": round(optimum_s, 3), "of_optimum": round(of_optimum, 3), "ok": of_optimum >= at_least}


def overlap(repeats: int) -> Row:
    """Paced islands on `starved`: streaming in 4 bits with overlap, and blocking DiLoCo, against no synchronisation.

    The settings are those of `benchmarks.overlap`, on real hosts, with a model that fits the link; speeds count from
    the first step after the first round to the last before the last exchange.
    """
    topology = load_topology("starved")
    found: dict[str, list[tuple[float, float]]] = {case: [] for case in paced.CASES}
    with tempfile.TemporaryDirectory() as scratch, Lab(topology) as lab:
        cluster = LabCluster(lab)
        cluster.start()
        for repeat in range(repeats):
            for case, values in found.items():
                folder = Path(scratch) / f"{case}-{repeat}"
                folder.mkdir()
                values.append(_paced(cluster, folder, case))
    over_off = {
        case: [speed / off for (speed, _), (off, _) in zip(values, found["off"], strict=True)]
        for case, values in found.items()
    }
    waited = [share for _, share in found["blocking"]]
    half = 0.4 <= statistics.median(waited) <= 0.6
    return {
        "topology": "starved",
        "streaming_over_off": spread_of(over_off["streaming"], digits=3),
        "blocking_over_off": spread_of(over_off["blocking"], digits=3),
        "blocking_waited": spread_of(waited, digits=3),
        "off_waited": spread_of([share for _, share in found["off"]], digits=3),
        "ok": half and statistics.median(over_off["streaming"]) >= paced.GOAL,
    }


def _paced(cluster: LabCluster, folder: Path, case: str) -> tuple[float, float]:
    """Steps per second of all islands, and the share of the time that they waited."""
    config = load_config("diloco", overrides=[*paced.overrides(case, OVERLAP_ROUNDS), *OVERLAP_MODEL]).config
    with LabRun(cluster, folder, config) as run:
        run.finish(within_s=END_S)
        rows = [row for row in read_rows(run.run_dir / "metrics.jsonl") if isinstance(row, StepRow)]
    times = {name: sorted(row.t_s for row in rows if row.member == name) for name in {row.member for row in rows}}
    return paced.speed_of(times.values(), OVERLAP_ROUNDS)
