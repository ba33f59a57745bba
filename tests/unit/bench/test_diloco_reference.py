"""The whole stack against DiLoCo and data parallel training written down in plain torch, on the same samples.

The reference knows nothing of leases, exchanges or progress: its learning rate comes from the number of the step. What
it shares with the run are the model, the data reader and who was dealt which samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orchestrator.config import RunConfig, load_config
from orchestrator.local import LocalRun
from workers.data.pack import pack
from workers.data.permutation import sample_ids
from workers.data.reader import PackReader
from workers.model.factory import build_model

ISLANDS, BATCH, SEQ_LEN, STEPS = 3, 2, 16, 12
SETTINGS = [
    f"run.islands={ISLANDS}", f"train.tokens={ISLANDS * BATCH * SEQ_LEN * STEPS}", f"train.batch_size={BATCH}",
    "train.lr=0.01", "train.warmup=0.5", "train.device=cpu", "train.seed=3", "model.layers=1", "model.dim=16",
    "model.heads=2", "codec.name=fp32", "exchange.quorum=1.0", "eval.windows=8", "eval.every=0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    documents = [{"text": f"document {n}: {n * n % 97} {'ab' * (n % 31)}"} for n in range(1000)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps(document) for document in documents))
    pack([folder / "text.jsonl"], folder / "pack", text_field="text", seq_len=SEQ_LEN, val_fraction=0.1)
    return folder / "pack"


@dataclass(frozen=True)
class Trained:
    """What a run ended with."""

    config: RunConfig
    anchor: dict[str, Tensor]
    positions: dict[int, list[int]]
    live: dict[str, Tensor]


def train(overrides: list[str], pack_dir: Path, folder: Path) -> Trained:
    config = load_config("debug", overrides=[*SETTINGS, f"data.path={str(pack_dir)!r}", *overrides]).config
    run = LocalRun(config, folder / "run")
    run.start()
    finish = run.run(max_turns=2000)
    assert finish is not None and finish.reason == "done"
    sync = run.islands["island-0"].loop.island.sync
    assert sync is not None
    live = {name: value.detach().clone() for name, value in sync.replica.tensors.items()}
    anchor = {name: value.clone() for name, value in sync.replica.anchor_tensors().items()}
    members = run.host.coordinator.state.members.values()
    positions = {int(m.id.name.split("-")[1]): [p for a, b in m.leases for p in range(a, b)] for m in members}
    run.close()
    return Trained(config=run.config, anchor=anchor, positions=positions, live=live)


class Reference:
    """DiLoCo (arXiv 2311.08105, algorithm 1) and data parallel AdamW."""

    def __init__(self, trained: Trained, pack_dir: Path) -> None:
        self.config, self.positions = trained.config, trained.positions
        self.reader = PackReader(pack_dir)
        self.anchor = self.model()
        self.locals = [self.model() for _ in range(ISLANDS)]
        self.inner = [self.adamw(model) for model in self.locals]

    def model(self) -> nn.Module:
        vocab = self.reader.index.vocab_size
        return build_model(self.config.model, vocab_size=vocab, seq_len=SEQ_LEN, seed=self.config.train.seed).model

    def adamw(self, model: nn.Module) -> torch.optim.AdamW:
        train = self.config.train
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=train.eps)

    def loss(self, model: nn.Module, island: int, step: int) -> Tensor:
        mine = np.array(self.positions[island][step * BATCH : (step + 1) * BATCH])
        ids = sample_ids(mine, size=self.reader.num_samples("train"), seed=self.config.train.seed)
        tokens = torch.from_numpy(self.reader.batch(ids).astype(np.int64))
        logits = model(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def apply(self, model: nn.Module, optimizer: torch.optim.AdamW, step: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), self.config.train.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step)
        optimizer.step()
        optimizer.zero_grad()

    def rate(self, step: int) -> float:
        train, share = self.config.train, step / STEPS
        if share < train.warmup:
            return train.lr * (0.1 + 0.9 * share / train.warmup)
        half_turn = math.pi * (share - train.warmup) / (1 - train.warmup)
        return train.lr * (train.min_lr_ratio + (1 - train.min_lr_ratio) * 0.5 * (1 + math.cos(half_turn)))

    def data_parallel(self) -> None:
        optimizer = self.adamw(self.anchor)
        for step in range(STEPS):
            for island in range(ISLANDS):
                (self.loss(self.anchor, island, step) / ISLANDS).backward()
            self.apply(self.anchor, optimizer, step)

    def diloco(self) -> None:
        strategy = self.config.strategy
        outer = torch.optim.SGD(
            self.anchor.parameters(), lr=strategy.outer_lr, momentum=strategy.outer_momentum, nesterov=True
        )
        for first, last in self.rounds():
            for island, (model, inner) in enumerate(zip(self.locals, self.inner, strict=True)):
                model.load_state_dict(self.anchor.state_dict())
                for step in range(first, last):
                    self.loss(model, island, step).backward()
                    self.apply(model, inner, step)
            self.set_outer_gradient()
            if strategy.outer == "average" or first < strategy.warmup_sync * STEPS:
                with torch.no_grad():
                    for p in self.anchor.parameters():
                        assert p.grad is not None
                        p -= p.grad
            else:
                outer.step()

    def rounds(self) -> Iterator[tuple[int, int]]:
        strategy, first = self.config.strategy, 0
        while first < STEPS:
            length = 1 if first < strategy.warmup_sync * STEPS else strategy.inner_steps
            yield first, min(first + length, STEPS)
            first += length

    def set_outer_gradient(self) -> None:
        locals_of = zip(*(model.parameters() for model in self.locals), strict=True)
        for anchor, mine in zip(self.anchor.parameters(), locals_of, strict=True):
            anchor.grad = torch.stack([anchor.detach() - p.detach() for p in mine]).mean(0)


NESTEROV = ["strategy.name=diloco", "strategy.outer_lr=0.7", "strategy.outer_momentum=0.9"]


@pytest.mark.parametrize(
    "overrides",
    [
        [*NESTEROV, "strategy.inner_steps=4"],
        [*NESTEROV, "strategy.inner_steps=5"],
        [*NESTEROV, "strategy.inner_steps=4", "strategy.warmup_sync=0.34"],
        ["strategy.name=diloco", "strategy.inner_steps=4", "strategy.outer=average"],
        ["strategy.name=ddp", "strategy.inner_steps=1"],
    ],
    ids=["diloco", "last round shorter", "synchronous first", "averaging", "data parallel"],
)
def test_a_run_equals_the_algorithm_in_plain_torch(overrides: list[str], pack_dir: Path, tmp_path: Path) -> None:
    trained = train(overrides, pack_dir, tmp_path)
    reference = Reference(trained, pack_dir)
    start = {name: p.detach().clone() for name, p in reference.anchor.named_parameters()}
    if trained.config.strategy.name == "ddp":
        reference.data_parallel()
    else:
        reference.diloco()
    for name, expected in reference.anchor.named_parameters():
        moved = (expected.detach() - start[name]).abs().max()
        assert moved > 1e-3, f"{name} was not trained"
        found = trained.anchor[name]
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-4 * float(moved), msg=name)
