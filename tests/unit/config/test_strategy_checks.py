"""What a strategy could not do is refused when the configuration is read: the reason, and the nearest valid value."""

from __future__ import annotations

import pytest

from orchestrator.config import load_config
from orchestrator.errors import UserError

REFUSED = {
    "label that no machine can have": (["run.labels.größe=ja"], "'größe' cannot be the key of a label", "atoll join"),
    "label with a space": (["run.labels.region=eu west"], "'eu west' cannot be the value of a label", "A-Z a-z 0-9"),
    "alpha": (
        ["strategy.name=streaming", "strategy.merge_alpha=1.5"],
        "merge_alpha = 1.5 is not allowed: it takes a number from 0 up to 1",
        "1, the nearest that is allowed",
    ),
    "tau": (
        ["strategy.name=streaming", "strategy.overlap_steps=10"],
        "longer than a fragment's slot: it is sent again after strategy.inner_steps = 10",
        "9 or less",
    ),
    "period": (
        ["strategy.name=streaming", "strategy.num_fragments=2", "strategy.inner_steps=11"],
        "is no multiple of the 2 fragments",
        "10 or 12",
    ),
    "tau without streaming": (["strategy.overlap_steps=2"], "has no meaning with strategy.name = 'diloco'", "0"),
    "nesterov": (
        ["strategy.outer_lr=1.5", "strategy.outer_momentum=0.9"],
        "diverges near an optimum from 1.36 on",
        "1.3 or less",
    ),
    "sgd": (["strategy.outer=sgd", "strategy.outer_lr=2.5"], "diverges near an optimum from 2 on", "1.9 or less"),
    "a round late": (
        ["strategy.name=delayed", "strategy.outer_lr=0.7", "strategy.outer_momentum=0.9"],
        "'nesterov' applied a round late diverges near an optimum from 0.506 on",
        "0.5 or less",
    ),
    "adam": (
        ["strategy.outer=adam", "strategy.outer_eps=1e-8", "strategy.outer_lr=0.7"],
        "diverges near an optimum from 0.01 on",
        "0.0099 or less",
    ),
    "delayed Nesterov": (
        ["strategy.name=async-dn", "strategy.outer_lr=3.0", "strategy.momentum_every=4"],
        "'nesterov' of pushes diverges near an optimum",
        "or less",
    ),
    "weight of the momentum in between": (
        [
            "strategy.name=async-dn",
            "strategy.outer_lr=0.4",
            "strategy.momentum_every=4",
            "strategy.momentum_spread=0.3",
        ],
        "the 4 versions of a window would take more than the whole momentum",
        "0.24 or less",
    ),
    "a codec for GPUs": (
        ["codec.backend=triton", "train.device=cpu"],
        "codec.backend = 'triton' runs on GPUs, train.device = 'cpu'",
        "train.device = 'cuda', or codec.backend = 'auto'",
    ),
    "a codec without that form": (
        ["codec.backend=triton", "train.device=cuda", "codec.name=sign", "codec.error_feedback=true"],
        "codec.name = 'sign' has no such form",
        "'auto', or one of int8, int4, fp4, e3m0",
    ),
    "asynchronous with another outer step": (
        ["strategy.name=async-dn", "strategy.outer=adam", "strategy.outer_lr=0.1"],
        "has delayed Nesterov for it",
        "strategy.outer = 'nesterov'",
    ),
    "asynchronous warm-up": (
        ["strategy.name=async-dn", "strategy.outer_lr=0.4", "strategy.warmup_sync=0.1"],
        "is in step",
        "strategy.warmup_sync = 0",
    ),
    "asynchronous quorum": (
        ["strategy.name=async-dn", "strategy.outer_lr=0.4", "exchange.quorum=1.0"],
        "nobody is waited for",
        "exchange.min_members",
    ),
    "window without pushes": (["strategy.momentum_every=4"], "has no meaning with strategy.name = 'diloco'", "8"),
    "radial average of others": (
        ["strategy.name=streaming", "strategy.aggregate=radial"],
        "has no meaning with strategy.name = 'streaming'",
        "'mean'",
    ),
    "load by speed while fragments are under way": (
        ["strategy.name=decoupled", "run.load=by_speed"],
        "counts steps until a result is due",
        "run.load = 'equal'",
    ),
    "eager adam": (
        ["strategy.name=eager", "strategy.outer=adam", "strategy.outer_lr=0.1"],
        "is not linear",
        "'nesterov' or 'heavy-ball'",
    ),
    "delayed warm-up": (
        ["strategy.name=delayed", "strategy.outer_lr=0.4", "strategy.warmup_sync=0.1"],
        "would apply a step late",
        "strategy.warmup_sync = 0",
    ),
    "two ways to name fragments": (
        ["strategy.num_fragments=2", 'strategy.fragments=[["a"], ["b"], ["*"]]'],
        "strategy.fragments names 3 of them",
        "remove it",
    ),
    "quadratic rule, constant rate": (
        ["strategy.qsr_alpha=0.01", "train.schedule=constant"],
        "as the learning rate falls",
        "train.schedule = 'cosine'",
    ),
    "quadratic rule, fragments": (
        ["strategy.qsr_alpha=0.01", "strategy.num_fragments=2"],
        "could not share evenly",
        "strategy.num_fragments = 1",
    ),
    "muloco": (["strategy.name=muloco"], "trains with Muon", "train.optimizer = 'muon'"),
    "sparseloco": (["strategy.name=sparseloco"], "sends the largest values", "codec.name = 'topk'"),
    "sparseloco without feedback": (
        ["strategy.name=sparseloco", "codec.name=topk"],
        "the others later",
        "codec.error_feedback = true",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_with_its_reason_and_the_nearest_valid_value(case: str) -> None:
    overrides, reason, remedy = REFUSED[case]
    with pytest.raises(UserError) as refused:
        load_config("debug", overrides=overrides)
    assert reason in str(refused.value)
    assert remedy in str(refused.value)


@pytest.mark.parametrize("name", ["streaming", "eager", "delayed", "muloco", "sparseloco", "async-dn", "decoupled"])
def test_the_presets_of_the_strategies_load(name: str) -> None:
    config = load_config(name).config
    assert (config.strategy.name, config.run.name) == (name, name)
    assert config.train.tokens == load_config("ddp").config.train.tokens, "to be compared with data parallel"


def test_fragments_of_your_own_survive_the_run_directory() -> None:
    config = load_config("debug", overrides=['strategy.fragments=[["*embed*", "*.0.*"], ["*"]]']).config
    assert config.strategy.total_fragments == 2
    assert 'fragments = [["*embed*", "*.0.*"], ["*"]]' in config.to_toml()
