from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from strategies.codecs.base import Codec
from strategies.codecs.e3m0 import E3m0
from strategies.codecs.fp4 import Fp4
from strategies.codecs.int4 import Int4, Int4Stochastic
from strategies.codecs.int8 import Int8, Int8Stochastic
from strategies.codecs.none import Bf16, Fp32
from strategies.codecs.sign import Sign
from strategies.codecs.topk import TopK
from strategies.config import CodecConfig, StrategyConfig, StrategyName
from strategies.outer import Average, Nesterov, OuterAdamW
from strategies.registry import STRATEGIES, build_strategy
from strategies.strategy import Strategy, result_codec_of


def train_settings(**changes: Any) -> Any:
    return SimpleNamespace(
        **{
            "optimizer": "adamw",
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "grad_clip": 1.0,
            **changes,
        }
    )


def build(codec: CodecConfig | None = None, train: Any = None, **settings: Any) -> Strategy:
    return build_strategy(
        StrategyConfig(**settings),
        codec or CodecConfig(),
        lr_at=lambda progress: 1e-3 * (1 - progress),
        train=train or train_settings(),
    )


def test_diloco_is_the_record_that_its_settings_say() -> None:
    strategy = build(inner_steps=30, outer_lr=0.8, outer_momentum=0.5, num_fragments=3, pattern="sequential")
    assert (strategy.name, strategy.contribution) == ("diloco", "displacement")
    assert strategy.inner_steps(0.0) == strategy.inner_steps(1.0) == 30
    assert strategy.outer_at(0.3) == Nesterov(lr=0.8, momentum=0.5, backend=strategy.codec.backend)
    assert (strategy.num_states, strategy.num_fragments, strategy.pattern) == (1, 3, "sequential")
    assert (strategy.overlap_steps, strategy.merge_alpha, strategy.merge_kappa) == (0, 0.0, 1.0)
    assert strategy.codec.name == "int8"


def test_plain_averaging_has_no_state() -> None:
    strategy = build(outer="average")
    assert strategy.outer_at(0.5) == Average()
    assert strategy.num_states == 0


def test_fragments_must_divide_the_period() -> None:
    with pytest.raises(ValueError, match=r"strategy\.inner_steps = 100 .* strategy\.num_fragments = 3"):
        build(inner_steps=100, num_fragments=3)


@pytest.mark.parametrize("outer", ["nesterov", "average"])
def test_warmup_sync_averages_after_every_step_and_leaves_momentum_at_zero(outer: str) -> None:
    strategy = build(outer=outer, inner_steps=30, warmup_sync=0.1)
    assert [strategy.inner_steps(p) for p in (0.0, 0.0999, 0.1, 1.0)] == [1, 1, 30, 30]
    assert isinstance(strategy.outer_at(0.05), Average)
    assert isinstance(strategy.outer_at(0.1), Nesterov if outer == "nesterov" else Average)
    assert {strategy.outer_at(p).num_states for p in (0.0, 0.05, 0.1, 1.0)} == {strategy.num_states}
    anchor, states = torch.ones(3), tuple(torch.zeros(3) for _ in range(strategy.num_states))
    g = torch.full((3,), 0.25)
    for version in range(4):
        anchor, states = strategy.outer_at(0.0).step(anchor, states, g, scale=None, version=version, progress=0.0)
    assert torch.equal(anchor, torch.zeros(3))
    assert all(torch.equal(state, torch.zeros(3)) for state in states)


def test_error_feedback_only_where_something_is_lost() -> None:
    assert build(CodecConfig(name="int8", error_feedback=True, feedback_decay=0.9)).error_feedback
    assert build(CodecConfig(name="int8", error_feedback=True, feedback_decay=0.9)).feedback_decay == 0.9
    assert not build(CodecConfig(name="fp32", error_feedback=True)).error_feedback
    assert not build(CodecConfig(name="int8")).error_feedback


@pytest.mark.parametrize(
    ("codec", "result"),
    [
        (Fp32(), Fp32()),
        (Bf16(), Bf16()),
        (Int8(64, "numba"), Int8(64, "numba")),
        (Int8Stochastic(64, key=3), Int8(64)),
        (Int4(), Int4()),
        (Int4Stochastic(512, key=3), Int4(512)),
        (Fp4(32), Fp4(32)),
        (E3m0(), E3m0()),
        (Sign(64), Int8()),
        (TopK(backend="numba"), Int8(backend="numba")),
    ],
    ids=lambda c: c.name,
)
def test_results_are_sent_elementwise_and_rounded_to_nearest(codec: Codec, result: Codec) -> None:
    assert result_codec_of(codec) == result
    assert type(result_codec_of(codec)) is type(result)
    assert result.elementwise
    strategy = build(CodecConfig(name=codec.name))
    assert strategy.result_codec.name == result.name
    assert replace(strategy, result=Fp32()).result_codec == Fp32()


def test_members_round_with_their_own_random_numbers() -> None:
    config = CodecConfig(name="int4-stochastic")
    codecs = [
        build_strategy(StrategyConfig(), config, lr_at=lambda p: 0.0, train=train_settings(), codec_key=key).codec
        for key in (1, 2)
    ]
    assert codecs[0] == Int4Stochastic(backend=codecs[0].backend, key=1)
    payloads = [codec.encode(torch.linspace(-1, 1, 500)) for codec in codecs]
    assert not torch.equal(*payloads)


def test_ddp_takes_the_optimizer_of_the_inner_loop() -> None:
    strategy = build(name="ddp")
    assert (strategy.name, strategy.contribution) == ("ddp", "gradient")
    assert strategy.inner_steps(0.5) == 1
    outer = strategy.outer_at(0.5)
    assert isinstance(outer, OuterAdamW)
    assert outer.lr_at(0.5) == 5e-4
    assert (outer.beta1, outer.beta2, outer.weight_decay, outer.clip) == (0.9, 0.95, 0.1, 1.0)
    assert strategy.num_states == 2


def test_ddp_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"train\.optimizer = 'muon'.*set it to 'adamw'"):
        build(name="ddp", train=train_settings(optimizer="muon"))
    with pytest.raises(ValueError, match=r"strategy\.num_fragments = 2"):
        build(name="ddp", num_fragments=2)
    with pytest.raises(ValueError, match=r"strategy\.warmup_sync = 0\.1"):
        build(name="ddp", warmup_sync=0.1)


def test_every_strategy_of_the_configuration_is_registered() -> None:
    names = {"diloco", "ddp", "streaming", "eager", "delayed", "muloco", "sparseloco", "async-dn", "decoupled"}
    names |= {"noloco", "gossip"}
    assert set(STRATEGIES) == names == set(get_args(StrategyName))
    sparse = CodecConfig(name="topk", error_feedback=True)
    for name in names:
        train = train_settings(optimizer="muon") if name == "muloco" else train_settings()
        assert build(sparse if name == "sparseloco" else None, train, name=name).name == name
    with pytest.raises(
        ValueError, match=r"strategy\.name = 'fedavg' is not known; known are async-dn, ddp, decoupled, delayed, diloco"
    ):
        build_strategy(
            StrategyConfig.model_construct(name="fedavg"), CodecConfig(), lr_at=lambda p: 0.0, train=train_settings()
        )


def test_the_settings_of_the_workers_fit() -> None:
    from workers.config import TrainConfig

    assert build(name="ddp", train=TrainConfig()).num_states == 2
