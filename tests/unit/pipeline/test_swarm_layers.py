"""Runs of models that are given as a list of layers, and cuts by measured time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from orchestrator.artifacts import export, load_anchor, sample
from orchestrator.config import parse_config
from orchestrator.pipeline.local import LocalSwarm
from orchestrator.pipeline.plan import check_memory, cut_model, outer_states, pipeline_plan, pipeline_spec
from orchestrator.pipeline.replay import replay
from orchestrator.prepare import layer_table
from strategies.errors import SettingError
from tests.small_run import make_pack
from workers.data.index import load_index
from workers.data.permutation import sample_ids
from workers.data.reader import PackReader
from workers.model.errors import ModelError
from workers.model.sample import generate
from workers.model.shape import resolve_shape
from workers.pipeline.layer_table import LayerRow, LayerTable, read_table
from workers.pipeline.pieces import token_loss
from workers.pipeline.user_layers import load_layers
from workers.pipeline.whole import build_whole
from workers.records import FenceRecord
from workers.samples import evenly_spread

NUM_STEPS = 4
TOML = """
[train]
lr = 1e-2
grad_clip = 0.0
device = "cpu"
[model]
factory = "tests.list_model:build"
options = {width = 16, vocab = VOCAB, depth = 3}
[strategy]
name = "ddp"
inner_steps = 1
[codec]
name = "fp32"
[eval]
every = 1.0
windows = 4
[pipeline]
stages = 3
peers = 2
microbatches = 6
microbatch_size = 2
in_flight = 4
boundary = "fp32"
rebalance_s = 0.0
"""


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack"))


def make(pack_dir: Path, run_dir: Path, *overrides: str) -> LocalSwarm:
    vocab = load_index(pack_dir).vocab_size
    tokens = f"train.tokens={NUM_STEPS * 12 * 16}"
    toml = TOML.replace("VOCAB", str(vocab))
    config = parse_config(toml, overrides=[f"data.path={pack_dir}", tokens, *overrides]).config
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.toml").write_text(config.to_toml())
    table = layer_table(config, pack_dir)
    assert table is not None
    table.write(run_dir)
    assert read_table(run_dir) == table
    spec = pipeline_spec(config, run_id="local", run_dir=run_dir, pack=pack_dir)
    check_memory(
        spec.shape,
        config.pipeline,
        machine_bytes=1 << 34,
        on_one_machine=True,
        table=table,
        outer_states=outer_states(config),
    )
    return LocalSwarm(spec=spec, plan=pipeline_plan(config, spec, run_dir))


def finish(swarm: LocalSwarm) -> list[str]:
    swarm.run()
    assert swarm.finished is not None and swarm.finished.reason == "done", swarm.finished
    history = replay(swarm.records)
    assert history.findings == [] and history.version == NUM_STEPS
    return [history.commits[step][stage].digest for step in sorted(history.commits) for stage in range(3)]


@pytest.mark.parametrize("whole", ["true", "false"])
def test_losses_are_those_of_the_list_in_a_row(pack_dir: Path, tmp_path: Path, whole: str) -> None:
    swarm = make(pack_dir, tmp_path, f"model.options.whole={whole}")
    finish(swarm)
    spec, train = swarm.spec, swarm.spec.train
    assert spec.factory is not None
    builders, _ = load_layers(spec.factory, spec.options, seed=train.seed)
    model = torch.nn.Sequential(*(build() for build in builders))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=train.eps)
    reader, size = PackReader(spec.pack), spec.pipeline.samples_per_step
    for step, mine in enumerate(swarm.steps):
        positions = np.arange(step * size, (step + 1) * size, dtype=np.int64)
        batch = reader.batch(sample_ids(positions, size=reader.num_samples("train"), seed=train.seed))
        tokens = torch.from_numpy(batch)
        for group in optimizer.param_groups:
            group["lr"] = swarm.plan.rate(step)
        optimizer.zero_grad()
        loss = token_loss(model(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        optimizer.step()
        assert mine.loss == pytest.approx(float(loss.detach()), rel=1e-4)


def test_dropout_and_deaths_change_no_bit(pack_dir: Path, tmp_path: Path) -> None:
    quiet = make(pack_dir, tmp_path / "quiet", "model.options.dropout=0.2")
    expected = finish(quiet)
    swarm = make(pack_dir, tmp_path / "kills", "model.options.dropout=0.2")
    swarm.run(lambda: swarm.brain.version == 2)
    swarm.kill(victim := swarm.brain.roster.serving(1)[0].process)
    assert finish(swarm) == expected
    assert [r.member for r in swarm.records if isinstance(r, FenceRecord)] == [victim]
    without = make(pack_dir, tmp_path / "without")
    without.run(lambda: len(without.steps) == 1)
    assert without.steps[0].loss != quiet.steps[0].loss, "there was no dropout"
    _is_what_was_trained(quiet, tmp_path / "quiet", tmp_path / "out")


def _is_what_was_trained(swarm: LocalSwarm, run_dir: Path, out: Path) -> None:
    """Samples and exports are of the model whose loss the run said last."""
    model = build_whole(swarm.spec)
    assert model.load_state_dict(load_anchor(run_dir), strict=True) is not None
    reader = PackReader(swarm.spec.pack)
    tokens = torch.from_numpy(reader.batch(evenly_spread(reader.num_samples("val"), 4), "val"))
    model.eval()
    with torch.no_grad():
        loss = float(token_loss(model(tokens[:, :-1]), tokens[:, 1:]))
    assert loss == pytest.approx(replay(swarm.records).evaluations[-1].val_loss, rel=1e-5)
    text = sample(run_dir, "reef", max_new_tokens=4, temperature=0.0)
    assert text == generate(model, reader.tokenizer, "reef", 4, 0.0, 0)
    export(run_dir, out)
    written = load_file(out / "model.safetensors")
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(written[name], value) for name, value in model.state_dict().items())
    told = json.loads((out / "config.json").read_text())
    assert (told["factory"], told["options"]["width"]) == ("tests.list_model:build", 16)
    assert (out / "tokenizer.json").exists()


def test_a_loss_of_its_own_and_diloco(pack_dir: Path, tmp_path: Path) -> None:
    own = ["model.factory=tests.list_model:with_loss", "strategy.name=diloco", "strategy.inner_steps=2"]
    swarm = make(pack_dir, tmp_path, *own)
    swarm.run()
    assert swarm.finished is not None and swarm.finished.reason == "done", swarm.finished
    assert replay(swarm.records).num_syncs == 3 * NUM_STEPS // 2
    plain = make(pack_dir, tmp_path / "plain")
    plain.run(lambda: len(plain.steps) == 1)
    assert swarm.steps[0].loss != pytest.approx(plain.steps[0].loss, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model.factory=tests.list_model:broken",), "layers.1 .Linear. cannot take .1, 16, 8."),
        (("model.factory=tests.list_model:shared",), "parameter 'weight' of layer 2 is the same as one of layer 0"),
        (("model.factory=tests.list_model:nothing",), "returned int; a pipeline needs a list of layers"),
        (("pipeline.stages=6", "pipeline.microbatches=8"), "6 stages, but the model has 5 layers"),
        (("pipeline.peer_memory_bytes=30000",), "the largest of 6 peers has 30,000"),
        (("pipeline.trainer_memory_bytes=1000",), "and may take 1,000"),
    ],
)
def test_what_is_no_pipeline_is_refused(pack_dir: Path, tmp_path: Path, overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises((ModelError, SettingError), match=words):
        make(pack_dir, tmp_path, *overrides)


TIMED = """
[train]
device = "cpu"
[model]
layers = 2
dim = 16
heads = 2
[strategy]
name = "ddp"
inner_steps = 1
[pipeline]
stages = 2
microbatches = 4
in_flight = 4
split = "time"
"""


def test_a_cut_by_time_is_by_the_measured_times(pack_dir: Path) -> None:
    rows = tuple(
        LayerRow(name=f"layers.{i}", shapes=(("weight", (4, 4)),), out_values=4, saved_bytes=16, seconds=seconds)
        for i, seconds in enumerate((1.0, 1.0, 1.0, 6.0))
    )
    config = parse_config(TIMED, overrides=[f"data.path={pack_dir}"]).config
    shape = resolve_shape(config.model, vocab_size=64, seq_len=16)
    stages = cut_model(shape, config.pipeline, LayerTable(rows=rows))
    assert [stage.names for stage in stages] == [("layers.0", "layers.1", "layers.2"), ("layers.3",)]


def test_the_decoder_is_measured_layer_by_layer(pack_dir: Path) -> None:
    config = parse_config(TIMED, overrides=[f"data.path={pack_dir}"]).config
    table = layer_table(config, pack_dir)
    assert table is not None and table.is_decoder and len(table.rows) == 4
    assert all(row.seconds > 0 and row.saved_bytes > 0 for row in table.rows)


def test_peers_are_placed_by_what_stages_cost_where_that_was_measured(pack_dir: Path, tmp_path: Path) -> None:
    config = parse_config(TIMED, overrides=[f"data.path={pack_dir}"]).config
    spec = pipeline_spec(config, run_id="run", run_dir=tmp_path, pack=pack_dir)
    layout = pipeline_plan(config, spec, tmp_path).layout
    assert layout.work == layout.seconds == tuple(stage.seconds for stage in spec.stages)
    by_size = config.model_copy(update={"pipeline": config.pipeline.model_copy(update={"split": "params"})})
    assert pipeline_plan(by_size, spec, tmp_path).layout.work == tuple(stage.num_params for stage in spec.stages)
