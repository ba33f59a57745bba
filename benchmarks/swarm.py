"""What a pipeline on Ray reaches, as ratios inside one run: speed, recovery, buddies, a joiner, int8 boundaries.

    python -m benchmarks.swarm                  # all parts; goes on where it was stopped; keeps results/swarm.{json,md}
    python -m benchmarks.swarm --only paced     # one part
    python -m benchmarks.swarm --dry            # one tiny run, keeps nothing

Parts, each with the figure that it must reach:

    paced       peers that take their time: tokens a second over the smallest stage's summed speed, at least 0.85
    unequal     peers of speeds 1:2:4, placed by the controller, which knows their paces: over the best static
                assignment, at least 0.9
    plain       peers without pace in one process against the same stage functions in a loop: at least 0.85
    recovery    each process killed once: seconds until the next step, at most 2 for peers (trainers beside it)
    third       a third of the peers killed at once: the speed after the next move of peers over what those that are
                there can do, at least 0.85
    buddy       both peers of a stage killed: seconds until the next step, under 15 (10 M parameters a stage)
    boundaries  int8 against fp32 boundaries after equal tokens: loss at most 0.5 % off
    diloco      peers that step on their own against peers that add gradients after each step: bytes that leave a peer
                in a step, at most 0.2 of them
    delayed     updates that are delayed against updates that are waited for, peers that take their time: microbatches a
                second, at least as many
    lab         peers on three machines, 200 Mbit/s and 50 ms (one way) between each two, 300 ms a forward: the smallest
                stage's utilisation, at least 0.9

A peer's speed is what `pipeline.pace_s` makes it: a forward of s seconds and a backward of 2.5 s. A step fills and
drains the pipeline: the fastest way through three stages and back takes as long as 3 or 4 microbatches of a stage of
four peers, so that `unequal` and `third` make steps of 96 microbatches (with 24 they reached 0.71 and 0.68). The paces
leave most of two cores idle; on a machine where anything else runs the figures say nothing. `lab` needs the rights to
make network namespaces. Where a part fails the others go on. A peer that joins is measured in virtual time only
(`tests/unit/pipeline/test_pipeline_run.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, environment
from orchestrator.build import resolve
from orchestrator.config import RunConfig, load_config
from orchestrator.errors import UserError
from orchestrator.launch import RaySession
from orchestrator.pipeline.replay import replay
from orchestrator.prepare import prepare
from orchestrator.segments import read_run

TARGETS = {
    "paced": 0.85,
    "unequal": 0.9,
    "plain": 0.85,
    "recovery": 2.0,
    "third": 0.85,
    "buddy": 15.0,
    "boundaries": 0.005,
    "diloco": 0.2,
    "delayed": 1.0,
    "lab": 0.9,
}
AT_MOST = ("recovery", "buddy", "boundaries", "diloco")
WAIT_S = 300.0
BACKWARD = 2.5
SMALL = ["model.layers=4", "model.dim=64", "model.heads=4", "data.seq_len=64", "pipeline.microbatch_size=1"]
ENDLESS = "train.tokens=1000000000"


class Live:
    """A pipeline on a Ray of its own."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.config: RunConfig = resolve(load_config("swarm", overrides=[*SMALL, *overrides]).config)
        self.run_dir = folder / f"run-{time.time_ns()}"
        self.session = RaySession(self.config)

    def __enter__(self) -> Live:
        self.run_dir.mkdir(parents=True)
        (self.run_dir / "config.toml").write_text(self.config.to_toml())
        pack = prepare(self.config).pack
        self.session.__enter__()
        self.controller = self.session.start(self.run_dir, pack, [], resume=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.session.__exit__()
        history = replay(row.record for row in read_run(self.run_dir).rows)
        assert history.findings == [], history.findings

    def status(self, timeout_s: float = 0.02) -> dict[str, Any]:
        """What the controller says."""
        import ray

        found: dict[str, Any] = ray.get(self.controller.wait.remote(timeout_s), timeout=WAIT_S)
        return found

    def until(self, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Wait; fails with what it waited for."""
        deadline = time.monotonic() + WAIT_S
        while not condition(status := self.status()):
            assert not status["over"], f"the run ended waiting for {what}: {status['detail']}"
            assert time.monotonic() < deadline, f"waited {WAIT_S:g} s for {what}: {status}"
        return status

    def until_complete(self) -> dict[str, Any]:
        """Everybody serves, and every stage has its copy elsewhere."""
        wanted = self.config.pipeline.num_peers

        def complete(status: dict[str, Any]) -> bool:
            stages = status["stages"]
            served = sum(len(stage["peers"]) for stage in stages) == wanted
            return status["version"] > 0 and served and all(stage["buddies"] for stage in stages)

        return self.until(complete, "every peer to serve, every stage to have a buddy")

    def rows(self) -> list[dict[str, Any]]:
        """One a step, so far."""
        text = (self.run_dir / "pipeline.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def microbatches_per_s(self, num_steps: int) -> float:
        """Over some steps from now on; the one under way is left out."""
        start = self.status()["version"] + 1
        self.until(lambda status: status["version"] >= start + num_steps, f"{num_steps} steps")
        rows = {row["step"]: row["t_s"] for row in self.rows()}
        return num_steps * self.config.pipeline.microbatches / (rows[start + num_steps - 1] - rows[start - 1])

    def kill(self, *processes: str) -> float:
        """Seconds from a kill to the next step that is committed after the controller has heard of it."""
        pids, before = self.status()["pids"], len(self.status()["fault_rows"])
        began_s = time.monotonic()
        for process in processes:
            os.kill(pids[process], signal.SIGKILL)
        wanted = before + len(processes)
        version = self.until(lambda s: len(s["fault_rows"]) >= wanted, "the deaths to be noticed")["version"]
        self.until(lambda status: status["version"] > version, "the next step")
        return time.monotonic() - began_s


LONG_STEPS = ("pipeline.microbatches=96", "pipeline.in_flight=48")


def speed_of(config: RunConfig, assignment: Sequence[int]) -> float:
    """Microbatches a second that the slowest stage can do with these peers, by their paces."""
    pipeline = config.pipeline
    rates = [0.0] * len(set(assignment))
    for peer, stage in enumerate(assignment):
        rates[stage] += 1 / pipeline.pace_for(f"peer-{peer}")
    last = len(rates) - 1
    # The last stage has no forward of its own: its backward runs it.
    return min(rate / (BACKWARD + (stage < last)) for stage, rate in enumerate(rates))


def best_assignment(config: RunConfig) -> float:
    """Microbatches a second of the best of all assignments that stay as they are."""
    stages, peers = config.pipeline.stages or 1, config.pipeline.num_peers
    options = (one for one in product(range(stages), repeat=peers) if len(set(one)) == stages)
    return max(speed_of(config, one) for one in options)


def assigned(status: dict[str, Any], num_peers: int) -> list[int]:
    """Stage of each peer, by number."""
    found = {name.partition(".")[0]: stage["stage"] for stage in status["stages"] for name in stage["peers"]}
    return [found[f"peer-{i}"] for i in range(num_peers)]


def paced(folder: Path, *, steps: int) -> dict[str, Any]:
    """See the module."""
    overrides = [ENDLESS, "pipeline.microbatches=24", "pipeline.in_flight=24", "pipeline.pace_s=0.1"]
    with Live(folder, *overrides, "pipeline.rebalance_s=0") as run:
        status = run.until_complete()
        possible = speed_of(run.config, assigned(status, run.config.pipeline.num_peers))
        made = run.microbatches_per_s(steps)
        return {"ratio": made / possible, "microbatches_per_s": made, "possible": possible}


def unequal(folder: Path, *, steps: int) -> dict[str, Any]:
    """See the module. Peers with a pace take as long in every stage: the stages are nearly of one size."""
    paces = {f"peer-{i}": 0.4 / (1, 2, 4)[i % 3] for i in range(6)}
    table = [f"pipeline.pace_of.{name}={pace}" for name, pace in paces.items()]
    even = ["model.layers=6", "model.dim=128"]
    with Live(folder, ENDLESS, *LONG_STEPS, *even, *table) as run:
        run.until_complete()
        made, possible = run.microbatches_per_s(max(steps // 4, 1)), best_assignment(run.config)
        status = run.status()
        own = speed_of(run.config, assigned(status, run.config.pipeline.num_peers))
        return {
            "ratio": made / possible, "microbatches_per_s": made, "possible": possible, "possible_as_placed": own,
            "moves": status["moves"],
        }  # fmt: skip


def plain(folder: Path, *, steps: int) -> dict[str, Any]:
    """The peers' own code in one process, routed and counted, against a loop over the same stage functions."""
    import torch

    from strategies.swarm import split_layers
    from workers.config import ModelConfig
    from workers.model.shape import resolve_shape
    from workers.pipeline.layers import build_decoder_stage, decoder_costs
    from workers.pipeline.local import LocalPipeline
    from workers.pipeline.pieces import token_loss
    from workers.pipeline.stage import backward, backward_with_loss, forward

    torch.set_num_threads(1)
    model = ModelConfig(layers=4, dim=256, heads=8)
    shape = resolve_shape(model, vocab_size=512, seq_len=128)
    stages = split_layers(decoder_costs(shape), 3)
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, 512, (4, 129), generator=generator) for _ in range(8)]
    inputs, targets = [t[:, :-1].contiguous() for t in tokens], [t[:, 1:].contiguous() for t in tokens]
    models = [build_decoder_stage(shape, stage, seed=0) for stage in stages]

    def sgd(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.01)

    routed = LocalPipeline(
        num_stages=3,
        build=lambda stage: build_decoder_stage(shape, stages[stage], seed=0),
        peers={f"peer-{i}": (i % 3, 1.0) for i in range(3)},
        loss_fn=token_loss,
        optimizer=sgd,
        ordered=False,
    )
    optimizers = [sgd(list(model.names.values())) for model in models]

    def loop() -> None:
        sums: list[dict[str, torch.Tensor]] = [{}, {}, {}]
        for x, y in zip(inputs, targets, strict=True):
            one = forward(models[0], x)
            two = forward(models[1], one)
            results = [backward_with_loss(models[2], two, y, token_loss, weight=1 / len(inputs))]
            results.append(backward(models[1], one, _some(results[-1].input_gradient)))
            results.append(backward(models[0], x, _some(results[-1].input_gradient)))
            for total, result in zip(sums, reversed(results), strict=True):
                for name, gradient in result.gradients.items():
                    total[name] = gradient if name not in total else total[name] + gradient
        for model, optimizer, total in zip(models, optimizers, sums, strict=True):
            for name, parameter in model.names.items():
                parameter.grad = total[name]
            optimizer.step()

    ratios = []
    for _ in range(max(steps, 3)):
        times = []
        for work in (loop, lambda: routed.train_step(inputs, targets)):
            began_s = time.process_time()
            work()
            times.append(time.process_time() - began_s)
        ratios.append(times[0] / times[1])
    return {"ratio": statistics.median(ratios), "ratios": ratios}


def _some(gradient: Any) -> Any:
    assert gradient is not None, "not the first stage"
    return gradient


def recovery(folder: Path, *, steps: int) -> dict[str, Any]:
    """See the module."""
    seconds: dict[str, float] = {}
    with Live(folder, ENDLESS, "pipeline.trainers=2", "pipeline.pace_s=0.01", "pipeline.rebalance_s=0") as run:
        names = [f"peer-{i}" for i in range(run.config.pipeline.num_peers)] + ["trainer-0", "trainer-1"]
        for name in names[: max(steps, 1)] if steps < len(names) else names:
            run.until_complete()
            seconds[name] = run.kill(name)
    peers = [took_s for name, took_s in seconds.items() if name.startswith("peer")]
    return {"ratio": max(peers), "seconds": seconds}


def third(folder: Path, *, steps: int) -> dict[str, Any]:
    """See the module: what is possible is what the peers that are there afterwards can do, the new ones included."""
    overrides = [ENDLESS, *LONG_STEPS, "pipeline.peers=4", "pipeline.pace_s=0.1"]
    with Live(folder, *overrides, "pipeline.rebalance_s=2") as run:
        status = run.until_complete()
        stages, num_moves = status["stages"], len(status["moves"])
        dead = [name.partition(".")[0] for name in [*list(stages[0]["peers"])[:3], next(iter(stages[1]["peers"]))]]
        run.kill(*dead)
        run.until(lambda status: len(status["moves"]) > num_moves, "a move of peers")
        made = run.microbatches_per_s(max(steps // 2, 1))
        now = run.status()
        rates = [len(stage["peers"]) / 0.1 for stage in now["stages"]]
        possible = min(rate / (BACKWARD + (place < 2)) for place, rate in enumerate(rates))
        return {"ratio": made / possible, "microbatches_per_s": made, "possible": possible, "moves": now["moves"]}


def buddy(folder: Path, *, steps: int) -> dict[str, Any]:
    """See the module; 10 M parameters in each of three stages."""
    wide = ["model.layers=9", "model.dim=512", "model.heads=8", "model.tie_embeddings=false", "data.seq_len=64"]
    with Live(folder, ENDLESS, *wide, "pipeline.microbatches=4", "pipeline.in_flight=4") as run:
        status = run.until_complete()
        dead = [name.partition(".")[0] for name in status["stages"][1]["peers"]]
        version = status["version"]
        seconds = run.kill(*dead)
        params = [stage["params"] for stage in status["stages"]]
        assert run.status()["version"] >= version, "something committed was lost"
        return {"ratio": seconds, "params": params}


def boundaries(folder: Path, *, steps: int) -> dict[str, Any]:
    """See the module: the same samples, seeds and steps, with two codecs."""
    losses = {}
    for name in ("fp32", "int8"):
        tokens = steps * 10 * 8 * 64
        with Live(folder, f"train.tokens={tokens}", f"pipeline.boundary={name}", "pipeline.rebalance_s=0") as run:
            _to_the_end(run)
            losses[name] = statistics.fmean(row["loss"] for row in run.rows()[-10:])
    return {"ratio": abs(losses["int8"] / losses["fp32"] - 1), "losses": losses}


def diloco(folder: Path, *, steps: int) -> dict[str, Any]:
    """See the module: the same model, samples and codec."""
    found = {}
    own = ["strategy.name=diloco", "strategy.inner_steps=20", "codec.error_feedback=true"]
    num_steps = max(steps // 12, 1) * 40
    for name, settings in (("ddp", []), ("diloco", own)):
        tokens = num_steps * 8 * 64
        exact = ["codec.name=int8", "pipeline.buddies=false", "exchange.copies=1", "pipeline.rebalance_s=0"]
        with Live(folder, f"train.tokens={tokens}", *exact, *settings) as run:
            _to_the_end(run)
            rows = run.rows()
            summary = json.loads((run.run_dir / "summary.json").read_text())
            found[name] = {"bytes": summary["bytes_sent"], "loss": rows[-1]["loss"], "steps": len(rows)}
    # Activations cross the boundaries alike in both; what is left is between the peers of a stage.
    model = Live(folder, ENDLESS).config.model
    boundary = num_steps * 8 * 64 * model.dim * 4
    sent = {name: max(one["bytes"] - boundary, 1) for name, one in found.items()}
    return {"ratio": sent["diloco"] / sent["ddp"], "found": found, "boundary_bytes": boundary}


def delayed(folder: Path, *, steps: int) -> dict[str, Any]:
    """See the module: a model whose gradients take a while to be added."""
    made = {}
    for flag in ("false", "true"):
        settings = [*WIDE, ENDLESS, "pipeline.microbatches=12", "pipeline.in_flight=12", "pipeline.pace_s=0.05"]
        with Live(folder, *settings, "pipeline.rebalance_s=0", f"pipeline.delayed={flag}") as run:
            run.until_complete()
            made[flag] = run.microbatches_per_s(steps)
    return {"ratio": made["true"] / made["false"], "microbatches_per_s": made}


LINKS = "".join(f'[links."{a}:{b}"]\nrate_mbit = 200\ndelay_ms = 50\n' for a, b in (("a", "b"), ("a", "c"), ("b", "c")))
REGIONS = "".join(f'[regions.{name}]\nnodes = ["{name}-1"]\n' for name in "abc")
WIDE = ["model.layers=4", "model.dim=256", "model.heads=8", "data.seq_len=128", "pipeline.microbatch_size=1"]


def lab(folder: Path, *, steps: int) -> dict[str, Any]:
    """See the module: long steps, since filling and draining the pipeline takes some round trips of each."""
    from faults.lab.cluster import LabCluster
    from faults.lab.lab import Lab
    from orchestrator.topology import load_topology
    from tests.lab.live import LabRun

    (folder / "places.toml").write_text(f'description = "Three places."\n{REGIONS}{LINKS}')
    num_steps, microbatches = (2, 12) if steps < 3 else (5, 128)
    settings = [
        *WIDE, ENDLESS, f"pipeline.microbatches={microbatches}", f"pipeline.in_flight={min(microbatches, 32)}",
        "pipeline.pace_s=0.3", "pipeline.boundary=int8", "codec.name=int8", "pipeline.rebalance_s=0",
        "run.snapshot_every_s=100000", "eval.windows=4",
    ]  # fmt: skip
    config = resolve(load_config("swarm", overrides=settings).config)
    with Lab(load_topology(str(folder / "places.toml"))) as links:
        cluster = LabCluster(links, workers=3)
        cluster.start()
        with LabRun(cluster, folder, config) as run:
            rows = _lab_rows(run.run_dir / "pipeline.jsonl", num_steps + 1, run.process)
    possible = speed_of(config, assigned({"stages": rows[-1]["stages"]}, config.pipeline.num_peers))
    made = num_steps * microbatches / (rows[num_steps]["t_s"] - rows[0]["t_s"])
    return {"ratio": made / possible, "microbatches_per_s": made, "possible": possible, "seconds": rows[-1]["seconds"]}


def _lab_rows(path: Path, num: int, process: Any) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 4 * WAIT_S
    while True:
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if len(rows) >= num:
            return rows[:num]
        assert process.poll() is None, f"the run ended after {len(rows)} steps"
        assert time.monotonic() < deadline, f"{len(rows)} of {num} steps within {4 * WAIT_S:g} s"
        time.sleep(1.0)


def _to_the_end(run: Live) -> None:
    deadline = time.monotonic() + WAIT_S
    while not (status := run.status(0.5))["over"]:
        assert time.monotonic() < deadline, status
    assert status["reason"] == "done", status


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "paced": paced,
    "unequal": unequal,
    "plain": plain,
    "recovery": recovery,
    "third": third,
    "buddy": buddy,
    "boundaries": boundaries,
    "diloco": diloco,
    "delayed": delayed,
    "lab": lab,
}


def passed(name: str, ratio: float) -> bool:
    """Whether a figure reaches its target."""
    return ratio <= TARGETS[name] if name in AT_MOST else ratio >= TARGETS[name]


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a page."""
    lines = ["# Pipelines", "", "| part | figure | must reach | |", "|---|---|---|---|"]
    for name, result in results.items():
        sign = "at most" if name in AT_MOST else "at least"
        verdict = "yes" if passed(name, result["ratio"]) else "no"
        lines.append(f"| {name} | {result['ratio']:.3f} | {sign} {TARGETS[name]:g} | {verdict} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are lacking."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=sorted(PARTS), action="append", help="this part (may be repeated)")
    parser.add_argument("--again", action="store_true", help="also parts whose results are there")
    parser.add_argument("--dry", action="store_true", help="one short pass, keep nothing")
    options = parser.parse_args(arguments)
    path = RESULTS / "swarm.json"
    kept = json.loads(path.read_text())["parts"] if path.exists() and not options.dry else {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or PARTS:
            if name in kept and not options.again and not options.only:
                continue
            try:
                kept[name] = PARTS[name](Path(folder), steps=2 if options.dry else 12)
            except (AssertionError, OSError, RuntimeError, UserError) as error:
                failed.append(name)
                print(f"{name} did not end: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            print(f"{name}: {kept[name]['ratio']:.3f} ({'reached' if passed(name, kept[name]['ratio']) else 'missed'})")
            if not options.dry:
                path.write_text(json.dumps({"environment": environment(), "parts": kept}, indent=2) + "\n")
                path.with_suffix(".md").write_text(table(kept))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
