"""Pipelines in one thread whose peers step on their own: what they must add up to, and the same without stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from orchestrator.pipeline.local import LocalSwarm
from orchestrator.pipeline.replay import PipelineHistory, replay
from workers.data.permutation import sample_ids
from workers.data.reader import PackReader
from workers.model.factory import next_token_loss
from workers.model.llama import Llama
from workers.pipeline.local_host import LocalHost
from workers.pipeline.records import StageCountRecord, StageSyncRecord
from workers.pipeline.state import spread_out


def finish(swarm: LocalSwarm) -> PipelineHistory:
    """Run to the end; the journal must add up, in every stage: committed, lost with a peer, or still somebody's."""
    swarm.run()
    assert swarm.finished is not None and swarm.finished.reason == "done", swarm.finished
    history = replay(swarm.records)
    assert history.findings == [] and history.version == swarm.spec.total_steps
    adds_up(swarm, history)
    return history


def adds_up(swarm: LocalSwarm, history: PipelineHistory) -> None:
    """Committed, partial, lost and open are all that was counted, in every stage."""
    size = swarm.spec.pipeline.microbatches
    for stage in range(history.num_stages):
        of = (history.committed, history.partial, history.lost, history.own_by_stage)
        parts = [one.get(stage, 0) for one in of]
        assert sum(parts) == history.version * size, (stage, parts)


def anchors(swarm: LocalSwarm) -> dict[str, Tensor]:
    """Parameters of the whole model, out of the anchors; all holders of a stage have the same."""
    found: dict[str, Tensor] = {}
    for process in swarm.processes.values():
        if process.alive and isinstance(process.host, LocalHost):
            for stage, state in process.host.held.items():
                if state.version != swarm.brain.held_version:
                    continue
                for name, value in spread_out(swarm.spec, stage, state.flats).items():
                    assert name not in found or torch.equal(found[name], value), name
                    found[name] = value
    return found


class Unsplit:
    """(Streaming) DiLoCo with torch's own optimizers on the whole model: a worker for each peer of a stage.

    A microbatch is computed with the parameters of the peers that counted it, stage by stage.
    """

    def __init__(self, swarm: LocalSwarm) -> None:
        self.swarm, self.spec = swarm, swarm.spec
        self.model = Llama(self.spec.shape, seed=self.spec.train.seed)
        self.anchor = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.momentum = {name: torch.zeros_like(p) for name, p in self.anchor.items()}
        self.names = [[n for u in self.spec.units_of(s) for n in self.spec.slots(u)] for s in range(3)]
        self.workers: dict[str, tuple[dict[str, Tensor], torch.optim.Optimizer]] = {}
        self.made: dict[str, dict[int, int]] = {}  # peer -> step -> microbatches
        self.since: dict[tuple[str, int], int] = {}  # peer, fragment -> steps that were sent
        self.under_way: list[tuple[int, dict[str, tuple[Tensor, dict[str, Tensor]]]]] = []
        self.losses: list[float] = []

    def follow(self) -> Unsplit:
        """Make every step of the run's journal, and every synchronisation after its step."""
        rows: dict[int, list[StageCountRecord]] = {}
        syncs: dict[int, list[StageSyncRecord]] = {}
        for record in self.swarm.records:
            if isinstance(record, StageCountRecord):
                rows.setdefault(record.step, []).append(record)
            elif isinstance(record, StageSyncRecord):
                syncs.setdefault(record.version, []).append(record)
        total, parts = self.spec.total_steps, self.spec.num_fragments
        for step, counted in sorted(rows.items()):
            self.step(step, [by_microbatch(row) for row in counted])
            self.receive(step + 1)
            if sent := syncs.get(step + 1):
                at_once = len(sent[0].fragments) == parts > 1 or step + 1 == total
                due = step + 1 if at_once else min(step + 1 + self.spec.strategy.overlap_steps, total)
                self.send(step + 1, sent[0].fragments, [one.contributors for one in sent], due)
                self.receive(step + 1)
        assert self.under_way == []
        return self

    def worker(self, peer: str, stage: int) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
        """Parameters and optimizer of a peer's own."""
        if peer not in self.workers:
            train = self.spec.train
            params = {name: self.anchor[name].clone().requires_grad_() for name in self.names[stage]}
            groups = [
                {"params": [p for p in params.values() if p.ndim >= 2], "weight_decay": train.weight_decay},
                {"params": [p for p in params.values() if p.ndim < 2], "weight_decay": 0.0},
            ]
            groups = [group for group in groups if group["params"]]
            optimizer = torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=train.eps)
            self.workers[peer] = (params, optimizer)
        return self.workers[peer]

    def step(self, step: int, counted: list[dict[int, str]]) -> None:
        """`counted`: for each stage, who computed each microbatch."""
        reader, pipeline, train = PackReader(self.spec.pack), self.spec.pipeline, self.spec.train
        size = pipeline.microbatch_size
        loss_sum = 0.0
        for microbatch in range(pipeline.microbatches):
            start = step * pipeline.samples_per_step + microbatch * size
            ids = sample_ids(
                np.arange(start, start + size, dtype=np.int64), size=reader.num_samples("train"), seed=train.seed
            )
            tokens = torch.from_numpy(reader.batch(ids))
            routed: dict[str, Tensor] = {}
            for stage, by in enumerate(counted):
                routed |= self.worker(by[microbatch], stage)[0]
            loss = next_token_loss(_with(self.model, routed), tokens)
            loss.backward()
            loss_sum += float(loss.detach()) / pipeline.microbatches
        self.losses.append(loss_sum)
        for by in counted:
            for peer in sorted(set(by.values())):
                params, optimizer = self.workers[peer]
                mine = sum(one == peer for one in by.values())
                for parameter in params.values():
                    assert parameter.grad is not None
                    parameter.grad /= mine
                torch.nn.utils.clip_grad_norm_(list(params.values()), train.grad_clip)
                for group in optimizer.param_groups:
                    group["lr"] = self.swarm.plan.rate(step)
                optimizer.step()
                optimizer.zero_grad()
                self.made.setdefault(peer, {})[step] = mine

    def _rate(self, peer: str, fragment: int) -> float:
        lacking = [num for step, num in self.made[peer].items() if step >= self.since.get((peer, fragment), 0)]
        return sum(lacking) / len(lacking) if lacking else 0.0

    def send(self, version: int, fragments: Sequence[int], contributors: list[tuple[str, ...]], due: int) -> None:
        """These fragments of every stage, with the displacements of their peers, weighed by microbatches a step."""
        found: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
        for stage, peers in enumerate(contributors):
            for unit in self.spec.units_of(stage):
                if (fragment := self.spec.fragment_of(unit)) not in fragments:
                    continue
                rates = {peer: self._rate(peer, fragment) for peer in peers}
                for name in self.spec.slots(unit):
                    moved = {p: (self.anchor[name] - self.workers[p][0][name]).detach().clone() for p in peers}
                    weighed = [rates[p] / sum(rates.values()) * moved[p] for p in peers]
                    found[name] = (torch.stack(weighed).sum(0), moved)
            self.since |= {(peer, fragment): version for peer in peers for fragment in fragments}
        self.under_way.append((due, found))

    def receive(self, version: int) -> None:
        """What is due after so many steps: outer step of the anchor, and the merge (protocol, 1.5) of all peers."""
        settings = self.spec.strategy
        alpha, kappa = settings.merge_alpha, settings.merge_kappa
        due = [found for at, found in self.under_way if at <= version]
        self.under_way = [(at, found) for at, found in self.under_way if at > version]
        for found in due:
            for name, (g, moved) in found.items():
                before = self.anchor[name]
                self.momentum[name] = settings.outer_momentum * self.momentum[name] + g
                after = before - settings.outer_lr * (g + settings.outer_momentum * self.momentum[name])
                for peer, d in moved.items():
                    theta = self.workers[peer][0][name]
                    progress = (before - theta.detach()) - d
                    theta.data.copy_(after - alpha * (after - (before - d)) - kappa * progress)
                self.anchor[name] = after


def _with(model: Llama, params: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda tokens: functional_call(model, params, (tokens,))


def by_microbatch(row: StageCountRecord) -> dict[int, str]:
    """Who counted each microbatch."""
    pairs = (entry.partition(":") for entry in row.counted)
    return {int(number): peer for peer, _, ids in pairs for number in ids.split(",")}
