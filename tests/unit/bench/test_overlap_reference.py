"""The whole stack against Streaming DiLoCo, delayed and eager updates, MuLoCo and SparseLoCo in plain torch.

As in `test_diloco_reference.py`: the references know nothing of leases, exchanges or schedules. The learning rate is
constant here, because progress counts what is committed in every fragment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import test_diloco_reference
import torch
from test_diloco_reference import ISLANDS, STEPS, Reference, Trained, train
from torch import Tensor, nn

from strategies.codecs.int8 import Int8
from strategies.codecs.topk import TopK

LAYERS = 2
CONSTANT = ["train.warmup=0", "train.schedule=constant", f"model.layers={LAYERS}"]

pack_dir = test_diloco_reference.pack_dir


def number_of(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


class Overlapped(Reference):
    """A list of named parameters for each fragment, and one torch optimizer for each as outer step."""

    def __init__(self, trained: Trained, pack_dir: Path, *, num_fragments: int) -> None:
        super().__init__(trained, pack_dir)
        self.strategy = trained.config.strategy
        self.named = [dict(model.named_parameters()) for model in self.locals]
        self.anchors = dict(self.anchor.named_parameters())
        names: list[list[str]] = [[] for _ in range(num_fragments)]
        seen = False
        for name in self.anchors:
            number = number_of(name)
            seen = seen or number is not None
            place = number % num_fragments if number is not None else (num_fragments - 1 if seen else 0)
            names[place].append(name)
        self.fragments = names
        self.outer = [self.sgd([self.anchors[n] for n in group]) for group in names]
        self.sent: list[tuple[int, dict[str, list[Tensor]]] | None] = [None] * num_fragments
        self.covered = [0] * num_fragments

    def sgd(self, parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
        lr, momentum = self.strategy.outer_lr, self.strategy.outer_momentum
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, nesterov=self.strategy.outer == "nesterov")

    def rate(self, step: int) -> float:
        return self.config.train.lr

    def inner_step(self, step: int) -> None:
        for island, (model, inner) in enumerate(zip(self.locals, self.inner, strict=True)):
            self.loss(model, island, step).backward()
            self.apply(model, inner, step)

    def deltas(self, fragment: int) -> dict[str, list[Tensor]]:
        group = self.fragments[fragment]
        return {n: [self.anchors[n].detach() - mine[n].detach() for mine in self.named] for n in group}

    def outer_step(self, fragment: int, deltas: dict[str, list[Tensor]]) -> None:
        for name, each in deltas.items():
            self.anchors[name].grad = torch.stack(each).mean(0)
        self.outer[fragment].step()


class Streaming(Overlapped):
    """arXiv 2501.18512, algorithm 2; `kept` is the weight of the steps made in flight."""

    def run(self) -> None:
        parts, steps, tau = len(self.fragments), self.strategy.inner_steps, self.strategy.overlap_steps
        for done in range(STEPS + 1):
            for p in range(parts):
                sent = self.sent[p]
                if sent is not None and (done - sent[0] >= tau or done == STEPS):
                    self.receive(p)
                due = (done - (p + 1) * steps // parts) % steps == 0 and done >= (p + 1) * steps // parts
                if done > self.covered[p] and (due or done == STEPS):
                    self.sent[p], self.covered[p] = (done, self.deltas(p)), done
                    if tau == 0 or done == STEPS:
                        self.receive(p)
            if done < STEPS:
                self.inner_step(done)

    @torch.no_grad()
    def receive(self, p: int) -> None:
        sent = self.sent[p]
        assert sent is not None
        snapshots = {n: [self.anchors[n] - delta for delta in each] for n, each in sent[1].items()}
        with torch.enable_grad():
            self.outer_step(p, sent[1])
        alpha, kept = self.strategy.merge_alpha, self.strategy.merge_kappa
        for name, each in snapshots.items():
            for mine, snapshot in zip(self.named, each, strict=True):
                in_flight = mine[name] - snapshot
                mine[name].copy_(alpha * snapshot + (1 - alpha) * self.anchors[name] + kept * in_flight)
        self.sent[p] = None


class Delayed(Overlapped):
    """Contributions of a round are applied at the end of the next one, and live parameters start at the anchor."""

    def run(self) -> None:
        for done in range(STEPS + 1):
            if done and done % self.strategy.inner_steps == 0:
                deltas = self.deltas(0)
                if self.sent[0] is not None:
                    self.outer_step(0, self.sent[0][1])
                self.sent[0] = (done, deltas)
                for model in self.locals:
                    model.load_state_dict(self.anchor.state_dict())
            if done < STEPS:
                self.inner_step(done)
        assert self.sent[0] is not None
        self.outer_step(0, self.sent[0][1])


class Eager(Overlapped):
    """arXiv 2502.12996, algorithm 3: each member has outer parameters and an outer optimizer of its own."""

    def run(self) -> None:
        own = [self.model() for _ in range(ISLANDS)]
        optimizers = [self.sgd(model.parameters()) for model in own]
        before = [[torch.zeros_like(p) for p in model.parameters()] for model in own]
        for done in range(STEPS + 1):
            if done and done % self.strategy.inner_steps == 0:
                fresh = [
                    [a.detach() - p.detach() for a, p in zip(o.parameters(), m.parameters(), strict=True)]
                    for o, m in zip(own, self.locals, strict=True)
                ]
                if any(d.any() for d in before[0]):
                    self.outer_step(0, self.by_name(before))
                for island, (mine, optimizer) in enumerate(zip(own, optimizers, strict=True)):
                    for place, p in enumerate(mine.parameters()):
                        stale = torch.stack([each[place] for each in before]).mean(0)
                        p.grad = (fresh[island][place] - before[island][place]) / ISLANDS + stale
                    optimizer.step()
                    self.locals[island].load_state_dict(mine.state_dict())
                before = fresh
            if done < STEPS:
                self.inner_step(done)
        self.outer_step(0, self.by_name(before))

    def by_name(self, deltas: list[list[Tensor]]) -> dict[str, list[Tensor]]:
        return {name: [each[place] for each in deltas] for place, name in enumerate(self.anchors)}


class MuLoCo(Delayed):
    """DiLoCo whose hidden matrices are trained by `torch.optim.Muon`, the others by AdamW."""

    def __init__(self, trained: Trained, pack_dir: Path, *, num_fragments: int) -> None:
        super().__init__(trained, pack_dir, num_fragments=num_fragments)
        self.muons = [self.muon(model) for model in self.locals]

    def muon(self, model: nn.Module) -> torch.optim.Muon:
        train = self.config.train
        hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and number_of(name) is not None]
        assert len(hidden) == 7 * LAYERS, "attention and MLP matrices"
        return torch.optim.Muon(hidden, lr=train.muon_lr, momentum=train.muon_momentum, weight_decay=train.weight_decay)

    def adamw(self, model: nn.Module) -> torch.optim.AdamW:
        optimizer = super().adamw(model)
        hidden = {id(p) for n, p in model.named_parameters() if p.ndim == 2 and number_of(n) is not None}
        optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if id(p) not in hidden]
        return optimizer

    def inner_step(self, step: int) -> None:
        for island, (model, inner) in enumerate(zip(self.locals, self.inner, strict=True)):
            self.loss(model, island, step).backward()
            nn.utils.clip_grad_norm_(model.parameters(), self.config.train.grad_clip)
            self.muons[island].step()
            for group in inner.param_groups:
                group["lr"] = self.config.train.lr
            inner.step()
            model.zero_grad()

    def run(self) -> None:
        for done in range(STEPS):
            self.inner_step(done)
            if (done + 1) % self.strategy.inner_steps == 0:
                self.outer_step(0, self.deltas(0))
                for model in self.locals:
                    model.load_state_dict(self.anchor.state_dict())


class SparseLoCo(Overlapped):
    """arXiv 2508.15706: `e <- 0.95 e + D`, the largest values are sent, `e <- e - sent`; the codec is tested alone."""

    def run(self) -> None:
        size = sum(p.numel() for p in self.anchors.values())
        residuals = [torch.zeros(size) for _ in range(ISLANDS)]
        codec, result = TopK(), Int8()
        for done in range(STEPS):
            self.inner_step(done)
            if (done + 1) % self.strategy.inner_steps:
                continue
            total = torch.zeros(size)
            for island, mine in enumerate(self.named):
                delta = torch.cat([(a - mine[n]).detach().flatten() for n, a in self.anchors.items()])
                residuals[island] = 0.95 * residuals[island] + delta
                sent = self.over_the_wire(codec, residuals[island])
                residuals[island] -= sent
                total += sent / ISLANDS
            received, start = self.over_the_wire(result, total), 0
            with torch.no_grad():
                for a in self.anchors.values():
                    a -= self.strategy.outer_lr * received[start : start + a.numel()].view_as(a)
                    start += a.numel()
            for model in self.locals:
                model.load_state_dict(self.anchor.state_dict())

    @staticmethod
    def over_the_wire(codec: TopK | Int8, values: Tensor) -> Tensor:
        pieces = values.split(4096)  # exchange.chunk_values
        return torch.cat([codec.decode(codec.encode(piece), num_values=piece.numel()) for piece in pieces])


def outer(lr: float, momentum: float, rule: str = "nesterov") -> list[str]:
    return [f"strategy.outer_lr={lr}", f"strategy.outer_momentum={momentum}", f"strategy.outer={rule}"]


def merge(alpha: float, kappa: float) -> list[str]:
    return [f"strategy.merge_alpha={alpha}", f"strategy.merge_kappa={kappa}"]


SPARSE = [
    "codec.name=topk", "codec.error_feedback=true", "codec.feedback_decay=0.95", "exchange.chunk_values=4096",
]  # fmt: skip
Kind = Callable[..., Streaming | Delayed | Eager | MuLoCo | SparseLoCo]
STREAMING = ["strategy.name=streaming", "strategy.inner_steps=4"]
CASES: dict[str, tuple[Kind, int, list[str]]] = {
    "streaming, blocking": (Streaming, 2, [*STREAMING, *outer(0.7, 0.9), "strategy.num_fragments=2"]),
    "streaming, as published": (
        Streaming,
        2,
        [*STREAMING, *outer(0.4, 0.9), "strategy.num_fragments=2", "strategy.overlap_steps=1", *merge(0.5, 0.5)],
    ),
    "streaming, two exchanges under way": (
        Streaming,
        2,
        [*STREAMING, *outer(0.7, 0.5), "strategy.num_fragments=2", "strategy.overlap_steps=3", *merge(0.25, 1.0)],
    ),
    "delayed": (Delayed, 1, ["strategy.name=delayed", "strategy.inner_steps=3", *outer(0.4, 0.9)]),
    "delayed, heavy ball": (
        Delayed,
        1,
        ["strategy.name=delayed", "strategy.inner_steps=3", *outer(0.5, 0.5, "heavy-ball")],
    ),
    "eager": (Eager, 1, ["strategy.name=eager", "strategy.inner_steps=3", *outer(0.4, 0.9)]),
    "muloco": (
        MuLoCo,
        1,
        ["strategy.name=muloco", "strategy.inner_steps=4", "train.optimizer=muon", *outer(0.8, 0.9)],
    ),
    "sparseloco": (
        SparseLoCo,
        1,
        ["strategy.name=sparseloco", "strategy.inner_steps=3", *outer(1.0, 0.0, "sgd"), *SPARSE],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_equals_the_algorithm_in_plain_torch(case: str, pack_dir: Path, tmp_path: Path) -> None:
    kind, num_fragments, overrides = CASES[case]
    trained = train([*CONSTANT, *overrides], pack_dir, tmp_path)
    reference = kind(trained, pack_dir, num_fragments=num_fragments)
    start = {name: p.detach().clone() for name, p in reference.anchor.named_parameters()}
    reference.run()
    tolerance = 0.05 if case == "muloco" else 2e-4  # Muon iterates in bf16, which makes a last bit a hundredth
    for name, expected in reference.anchor.named_parameters():
        moved = float((expected.detach() - start[name]).abs().max())
        assert moved > 1e-3, f"{name} was not trained"
        torch.testing.assert_close(trained.anchor[name], expected.detach(), rtol=0, atol=tolerance * moved, msg=name)


BITS = {
    "one fragment, nothing under way": ["strategy.inner_steps=4"],
    "a last round that is shorter": ["strategy.inner_steps=5"],
    "synchronous first": ["strategy.inner_steps=4", "strategy.warmup_sync=0.34"],
}


@pytest.mark.parametrize("case", BITS)
def test_streaming_without_overlap_is_diloco_to_the_bit(case: str, pack_dir: Path, tmp_path: Path) -> None:
    ends = []
    for name in ("diloco", "streaming"):
        folder = tmp_path / name
        folder.mkdir()
        ends.append(train([f"strategy.name={name}", *outer(0.7, 0.9), *BITS[case]], pack_dir, folder).anchor)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_alpha_1_moves_the_anchor_and_not_the_islands(pack_dir: Path, tmp_path: Path) -> None:
    # S2: the members train as if they were alone, to the bit; the anchor follows them all the same.
    ends = []
    for number, lr in enumerate((0.5, 1.0)):
        folder = tmp_path / str(number)
        folder.mkdir()
        alone = [*STREAMING, *outer(lr, 0.0), "strategy.num_fragments=2", "strategy.overlap_steps=2"]
        ends.append(train([*CONSTANT, *alone, "strategy.merge_alpha=1.0"], pack_dir, folder))
    assert all(torch.equal(ends[0].live[name], ends[1].live[name]) for name in ends[0].live)
    assert any(not torch.equal(ends[0].anchor[name], ends[1].anchor[name]) for name in ends[0].anchor)
