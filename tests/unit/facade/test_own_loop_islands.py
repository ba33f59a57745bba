"""A loop of the user's own on several islands: threads of this process, with the production controller between them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import atoll
from orchestrator.config import make_config
from orchestrator.inline import InlineRun
from orchestrator.ledger import ledger_command
from orchestrator.metrics import EvalRow, read_rows
from orchestrator.rundir import RunDir
from orchestrator.summary import Summary
from tests.own_loops import (
    CONFIG,
    NUM_IMAGES,
    NUM_STEPS,
    ConvNet,
    digest_of,
    images,
    loss_of,
    make,
    train_images,
    train_on,
)
from workers.context import enter

DATA = {"data.samples": NUM_IMAGES}


def run_islands(folder: Path, loop: Callable[[], None], **values: object) -> Summary:
    """`loop` on every island of a run, each on a thread of its own."""
    config = make_config({**CONFIG, **DATA, **values})
    run = InlineRun(config, RunDir(folder), pack=None)
    folder.mkdir()
    run.start()

    def island(index: int) -> None:
        context = run.context(index)
        with enter(context):
            try:
                loop()
            except atoll.LoopError as error:
                run.fail(context, error)

    assert isinstance(config.run.islands, int)
    threads = [threading.Thread(target=island, args=(index,)) for index in range(config.run.islands)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "an island did not come to its end"
    return run.finish()


def test_three_islands_train_a_model_that_atoll_has_never_seen(tmp_path: Path) -> None:
    summary = run_islands(tmp_path / "run", train_images, **{"run.islands": 3})
    assert summary.exit_reason == "done"
    assert summary.tokens_committed == CONFIG["train.tokens"]
    assert summary.initial_val_loss is not None and summary.final_val_loss is not None
    assert summary.final_val_loss < 0.6 * summary.initial_val_loss
    assert ledger_command(tmp_path / "run", as_json=True) == 0
    ends = [(tmp_path / "run" / f"end-island-{i}.txt").read_text().split() for i in range(3)]
    model = ConvNet()
    model.load_state_dict(atoll.load_anchor(tmp_path / "run"))
    assert {end[0] for end in ends} == {digest_of(model)}
    assert sum(int(end[1]) for end in ends) >= NUM_STEPS


def test_without_anything_to_evaluate_on_a_run_still_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def loop() -> None:
        model, optimizer = make()
        with atoll.Island(model, optimizer, dataset=images(NUM_IMAGES)) as island:
            train_on(island, model, optimizer)

    with caplog.at_level(logging.INFO):
        summary = run_islands(tmp_path / "run", loop, **{"run.islands": 2, "train.tokens": 400})
    assert summary.exit_reason == "done"
    assert (summary.initial_val_loss, summary.final_val_loss) == (None, None)
    assert not [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if isinstance(row, EvalRow)]
    assert "no evaluation: the loop gave no val_dataset" in caplog.text
    assert ledger_command(tmp_path / "run", as_json=True) == 0


def test_statistics_of_batch_norm_are_named_once_and_stay_local(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models: dict[str, ConvNet] = {}

    def loop() -> None:
        model, optimizer = make(batch_norm=True)
        with atoll.Island(model, optimizer, dataset=images(NUM_IMAGES)) as island:
            train_on(island, model, optimizer)
            models[island.name] = model

    run_islands(tmp_path / "run", loop, **{"run.islands": 2, "train.tokens": 400})
    warnings = [record.getMessage() for record in caplog.records if "not synchronised" in record.getMessage()]
    assert len(warnings) == 2  # one for each island
    assert "norm.running_mean, norm.running_var, norm.num_batches_tracked" in warnings[0]
    one, two = models.values()
    assert torch.equal(one.conv.weight, two.conv.weight)
    assert not torch.equal(one.norm.running_mean, two.norm.running_mean)


def test_gradients_are_averaged_in_an_own_loop_without_its_optimizer(tmp_path: Path) -> None:
    models: dict[str, ConvNet] = {}

    def loop() -> None:
        model, optimizer = make()
        with atoll.Island(model, optimizer, dataset=images(NUM_IMAGES)) as island:
            for batch in island.batches():
                loss = loss_of(model, batch)
                loss.backward()
                island.step(loss)
            models[island.name] = model

    values = {"run.islands": 2, "train.tokens": 320, "strategy.name": "ddp", "strategy.inner_steps": 1}
    summary = run_islands(tmp_path / "run", loop, **values)
    assert summary.exit_reason == "done"
    assert len({digest_of(model) for model in models.values()}) == 1


def test_the_optimizer_of_the_loop_has_no_place_in_ddp(tmp_path: Path) -> None:
    values = {"run.islands": 1, "train.tokens": 320, "strategy.name": "ddp", "strategy.inner_steps": 1}
    summary = run_islands(tmp_path / "run", train_images, **values)
    assert summary.exit_reason == "failed"
    assert summary.error is not None and "leave out optimizer.step() and optimizer.zero_grad()" in summary.error


def test_one_island_that_fails_leaves_the_others_to_finish(tmp_path: Path) -> None:
    def loop() -> None:
        model, optimizer = make()
        with atoll.Island(model, optimizer, dataset=images(NUM_IMAGES)) as island:
            for number, batch in enumerate(island.batches()):
                loss = loss_of(model, batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                island.step(loss)
                if island.name == "island-1" and number == 7:
                    island.step(loss)

    summary = run_islands(tmp_path / "run", loop, **{"run.islands": 2, "train.tokens": 800})
    assert summary.exit_reason == "done"
    assert summary.tokens_committed == 800
    assert ledger_command(tmp_path / "run", as_json=True) == 0
