"""Attackers of a run that goes on: they hear what others offer, fetch it as any member can, and send last."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from faults import attacks, eavesdrop
from faults.chaos import Chaos
from faults.plan import STEALTHY, parse_fault
from orchestrator.errors import UserError
from orchestrator.fault_plan import read_faults
from strategies.config import CodecConfig, StrategyConfig
from strategies.fragments import TensorSpec, plan_fragments
from strategies.registry import build_strategy, decode_payload
from tests.small_run import small_config
from workers import messages as msg
from workers.config import TrainConfig
from workers.context import IslandContext
from workers.jobs import MemberStore, piece_key
from workers.records import MemberId, OfferId, Term
from workers.replica import Encoded, Replica, as_bytes
from workers.transport.loopback import LoopbackNetwork, LoopbackTransport

NAMES = ("island-0", "island-1", "island-2", "island-3")
NUM, CHUNK = 9000, 4096
TERM = Term(lineage=0, number=1, controller="c")


class Member:
    """An island as far as its contributions go; it has moved away from the anchor in a direction of its own."""

    def __init__(self, name: str, network: LoopbackNetwork) -> None:
        strategy = build_strategy(
            StrategyConfig(inner_steps=1), CodecConfig(name="fp32"), lr_at=lambda progress: 1e-3, train=TrainConfig()
        )
        specs = plan_fragments([TensorSpec(name="p", shape=(NUM,))], num_fragments=1, pattern="strided",
                               chunk_values=CHUNK)  # fmt: skip
        values = torch.zeros(NUM)
        self.replica = Replica(specs=specs, strategy=strategy, tensors={"p": values}, total_samples=100)
        self.replica.make_genesis("genesis")
        drawn = np.random.default_rng(NAMES.index(name)).normal(1.0, 0.3, NUM)
        values.sub_(torch.from_numpy(drawn.astype(np.float32)))
        self.name, self.store = name, MemberStore()
        self.store.replica = self.replica
        self.transport = LoopbackTransport(network, name, self.store)
        self.transport.start()
        context = IslandContext(
            spec=cast(Any, SimpleNamespace(name=name, run_dir=Path())), nonce=name, node="here", store=self.store,
            transport=self.transport, post=lambda envelope: None, clock=time.monotonic,
        )  # fmt: skip
        self.chaos = Chaos(context)
        self.chaos.context.deliver = lambda batch: None
        self.hear(msg.Peers(peers=tuple((f"{other}.1", f"loopback://{other}", (0,)) for other in NAMES)))

    def hear(self, *bodies: Any) -> None:
        assert self.chaos.context.deliver is not None
        self.chaos.context.deliver(
            msg.Batch(run_id="r", term=TERM, name="x", incarnation=1, nonce="n", rows_from=0, rows=(), bodies=bodies)
        )

    def offer(self, n: int = 0) -> tuple[Encoded, msg.Announce]:
        """Publish what it sends, and what the controller tells of it."""
        encoded, me = self.replica.encode(0), MemberId(name=self.name, incarnation=1)
        for chunk, payload in enumerate(encoded.payloads):
            key = piece_key(0, OfferId(member=me, seq=1), chunk)
            self.store.put(key, as_bytes(payload), digest_hex=encoded.digests[chunk])
        offer = msg.Offer(
            fragment=0, base=msg.Version(n=n, chain="x"), seq=1, born=0, since=0, upto=1, ranges=((0, 1),),
            num_steps=1, weight=1, chunk_digests=encoded.digests, sumsq=encoded.sumsq, num_bytes=encoded.num_bytes,
        )  # fmt: skip
        return encoded, msg.Announce(offer_by=me, address=self.transport.address, offer=offer, owners=())

    def begin(self, text: str) -> None:
        self.chaos.apply(parse_fault(text, NAMES))


@pytest.fixture
def members() -> Iterator[list[Member]]:
    network = LoopbackNetwork()
    made = [Member(name, network) for name in NAMES]
    yield made
    for member in made:
        member.transport.stop()


def sent(encoded: Encoded) -> Tensor:
    parts = [decode_payload(p, num_values=min(CHUNK, NUM - i * CHUNK)) for i, p in enumerate(encoded.payloads)]
    return torch.cat(parts)


def test_a_copy_cat_sends_what_another_one_sends(members: list[Member]) -> None:
    cat, victim = members[3], members[1]
    honest = cat.replica.encode(0)
    cat.begin("copy_cat:island-3")
    copied, announced = victim.offer()
    # It is at its send point before the other one is.
    threading.Timer(0.05, cat.hear, (announced,)).start()
    assert cat.replica.encode(0).digests == copied.digests != honest.digests
    cat.begin("scale:island-3")  # one attack at a time
    assert torch.equal(sent(cat.replica.encode(0)), attacks.scale(sent(honest)))


@pytest.mark.parametrize(("option", "z"), [("", attacks.little_z(4, 1)), (",factor=1.5", 1.5)])
def test_a_little_is_enough_is_worked_out_from_what_all_others_send(
    members: list[Member], option: str, z: float
) -> None:
    attacker = members[3]
    attacker.begin(f"little_is_enough:island-3{option}")
    others = [member.offer() for member in members[:3]]
    for _, announced in others:
        attacker.hear(announced)
    found = sent(attacker.replica.encode(0))
    expected = attacks.little_is_enough([sent(encoded) for encoded, _ in others], 1, z=z)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert float(found.norm()) < 1.2 * max(float(sent(encoded).norm()) for encoded, _ in others), "it is not far out"


def test_who_hears_nobody_is_honest_and_says_so(
    members: list[Member], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(eavesdrop, "FIRST_WITHIN_S", 0.05)
    cat = members[3]
    honest = cat.replica.encode(0)
    cat.begin("copy_cat:island-3")
    cat.hear(members[0].offer(n=7)[1], cat.offer()[1])  # of another version, and its own
    with caplog.at_level(logging.WARNING, "atoll.chaos"):
        assert cat.replica.encode(0).digests == honest.digests
    assert "it knows what nobody of version 0 sends" in caplog.text


def test_what_cannot_be_fetched_is_not_used(members: list[Member], caplog: pytest.LogCaptureFixture) -> None:
    attacker, gone = members[3], members[0]
    attacker.begin("little_is_enough:island-3,factor=1")
    others = [member.offer() for member in members[:3]]
    attacker.hear(*[announced for _, announced in others])
    gone.transport.stop()
    expected = attacks.little_is_enough([sent(encoded) for encoded, _ in others[1:]], 1, z=1.0)
    assert torch.equal(sent(attacker.replica.encode(0)), expected)
    assert "island-0.1 is not heard" in caplog.text


# ---------------------------------------------------------------- labels


class Bigram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.table(tokens))


def test_flipped_labels_are_trained_on_as_long_as_it_was_asked_for(members: list[Member]) -> None:
    member, model = members[0], Bigram()
    tokens = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    inner = SimpleNamespace(loss_fn=loss_fn)
    member.chaos.context.inner = cast(Any, inner)
    member.begin("label_flip:island-0,for=100ms")
    flipped = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), 7 - tokens[:, 1:].flatten())
    assert torch.equal(inner.loss_fn(model, tokens), flipped) and not torch.equal(flipped, loss_fn(model, tokens))
    deadline_s = time.monotonic() + 10.0
    while inner.loss_fn is not loss_fn:
        assert time.monotonic() < deadline_s, "waited for the attack to end"
        time.sleep(0.005)
    assert member.replica.tamper is None, "what it sends is what it trained"


def test_labels_of_code_of_ones_own_are_not_flipped(tmp_path: Path, members: list[Member]) -> None:
    with pytest.raises(ValueError, match="a loop of its own"):
        members[0].begin("label_flip:island-0")
    config = small_config(tmp_path, "train.loop=my.module:train")
    with pytest.raises(UserError, match=r"train\.loop is set"):
        read_faults(config, ["label_flip:island-0"], NAMES)
    assert len(read_faults(config, [f"{kind}:island-0" for kind in STEALTHY if kind != "label_flip"], NAMES)) == 3
    assert len(read_faults(small_config(tmp_path), ["label_flip:island-0"], NAMES)) == 1
