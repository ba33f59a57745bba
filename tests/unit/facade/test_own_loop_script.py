"""`atoll.Island` in a script: a run of one island in this process, with everything a run has."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import atoll
from orchestrator import revocation
from orchestrator.ledger import ledger_command
from orchestrator.rundir import RunDir, RunDirInUse
from tests.own_loops import CONFIG, NUM_IMAGES, NUM_STEPS, digest_of, images, loss_of, make, train_on
from tests.small_run import SEQ_LEN, make_pack
from workers import orders
from workers.data.permutation import sample_ids
from workers.loops import load_loop


def script(folder: Path, **values: object) -> atoll.Island:
    """An island of a script that trains on images."""
    model, optimizer = make()
    config = {**CONFIG, **values}
    island = atoll.Island(model, optimizer, config, dataset=images(NUM_IMAGES), loss_fn=loss_of, run_dir=folder / "run")
    return island


def train(island: atoll.Island, *, steps: int = 10**9) -> int:
    """Enter, train at most so many steps, leave; returns the steps made."""
    with island:
        return train_steps(island, steps)


def train_steps(island: atoll.Island, steps: int) -> int:
    """Train at most so many steps; returns the steps made."""
    model, optimizer, done = island._model, island._optimizer, 0
    for batch in island.batches():
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        island.step(loss)
        done += 1
        if done == steps:
            break
    return done


def test_a_script_is_a_whole_run(tmp_path: Path) -> None:
    model, optimizer = make()
    threads = set(threading.enumerate())
    config = {**CONFIG, "notify.command": f"tee -a {tmp_path / 'told'}"}
    with atoll.Island(
        model, optimizer, config, dataset=images(NUM_IMAGES), val_dataset=images(64, seed=1), loss_fn=loss_of,
        run_dir=tmp_path / "run",
    ) as island:  # fmt: skip
        assert (island.name, island.num_islands, island.run_dir) == ("island-0", 1, tmp_path / "run")
        assert RunDir(tmp_path / "run").state() == "running"
        losses = train_on(island, model, optimizer)
        assert island.progress == pytest.approx(1.0, abs=0.05)
    assert len(losses) == NUM_STEPS and np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
    assert set(threading.enumerate()) == threads
    summary = island.summary
    assert summary is not None and summary.exit_reason == "done" and summary.tokens_committed == 8 * NUM_STEPS
    assert summary.final_val_loss is not None and summary.initial_val_loss is not None
    assert summary.final_val_loss < 0.5 * summary.initial_val_loss
    assert RunDir(tmp_path / "run").state() == "done"
    assert ledger_command(tmp_path / "run", as_json=True) == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.toml", "versions.json", "journal.jsonl", "metrics.jsonl", "summary.json", "logs"} <= names
    assert "joined" in (tmp_path / "run" / "logs" / "controller.log").read_text()
    [told] = map(json.loads, (tmp_path / "told").read_text().splitlines())
    assert (told["kind"], told["detail"]) == ("finished", "done")
    assert atoll.load_config(tmp_path / "run").data.samples == NUM_IMAGES
    anchor = atoll.load_anchor(tmp_path / "run")
    assert all(torch.equal(anchor[name], parameter) for name, parameter in model.named_parameters())


def test_a_loop_that_reads_its_data_itself_gets_the_numbers_of_its_samples(tmp_path: Path) -> None:
    model, optimizer = make()
    pixels, labels = map(torch.from_numpy, images(40))
    seen: list[int] = []
    values = {"train.tokens": 100, "train.batch_size": 8, "data.samples": 40, "train.seed": 7}
    with atoll.Island(model, optimizer, {**CONFIG, **values}, run_dir=tmp_path / "run") as island:
        for ids in island.samples():
            seen += ids.tolist()
            loss = loss_of(model, (pixels[ids], labels[ids]))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            island.step(loss)
    assert seen == sample_ids(np.arange(100), size=40, seed=7).tolist()
    assert sorted(seen[:40]) == list(range(40))


def test_an_own_loop_on_a_pack_of_tokens(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(257, 8), nn.Linear(8, 257))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    values = {"train.tokens": 40 * SEQ_LEN, "data.path": make_pack(tmp_path), "train.batch_size": 4}
    with atoll.Island(model, optimizer, {**CONFIG, **values}, run_dir=tmp_path / "run") as island:
        for batch in island.batches():
            assert batch.shape == (4, SEQ_LEN + 1) and batch.dtype == torch.int64
            loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            island.step(loss)
    assert island.summary is not None and island.summary.tokens_committed == 40 * SEQ_LEN
    assert island.summary.final_val_loss is not None and island.summary.final_val_loss < 5.55


def test_a_break_can_be_resumed_and_ends_where_an_unbroken_run_does(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = script(tmp_path / "whole")
    train(whole)
    broken = script(tmp_path)
    assert train(broken, steps=47) == 47
    assert broken.summary is not None and broken.summary.exit_reason == "stopped"
    model, optimizer = make(seed=5)
    rest = atoll.Island(
        model, optimizer, dataset=images(NUM_IMAGES), loss_fn=loss_of, run_dir=tmp_path / "run", resume=True
    )
    assert train(rest) == NUM_STEPS - 47
    assert rest.summary is not None and rest.summary.exit_reason == "done"
    assert rest.summary.tokens_committed == 8 * NUM_STEPS and rest.summary.tokens_lost == 0
    assert ledger_command(tmp_path / "run", as_json=True) == 0
    assert digest_of(model) == digest_of(whole._model)
    with pytest.raises(atoll.LoopError, match=r"this run belongs to a script: go on with it there, by atoll\.Island"):
        load_loop(atoll.load_config(tmp_path / "run").train.loop or "")
    with pytest.raises(atoll.UserError, match="is done, there is nothing to resume"):
        train(atoll.Island(model, optimizer, dataset=images(NUM_IMAGES), run_dir=tmp_path / "run", resume=True))


def test_an_offer_whose_payload_died_with_its_process_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is stopped after a commit that its only holder did not hear of: it is revoked and made again."""
    monkeypatch.setattr(revocation, "ASK_AFTER_S", 0.1)
    monkeypatch.setattr(revocation, "ASK_AGAIN_S", 0.1)
    monkeypatch.setattr(orders, "DECISION_S", 0.0)  # it would wait for the news that never comes
    island = script(tmp_path)
    with island:
        train_steps(island, 45)  # nine rounds: the tenth commit is due
        assert island._run is not None and island._island is not None and island._island.sync is not None
        run, sync = island._run, island._island.sync
        deliver, context = sync.deliver, run.contexts["island-0"]
        context.deliver = lambda batch: deliver(batch._replace(rows_from=0, rows=()))
        sync.boundary()
        wait_until(lambda: run.host.coordinator.state.heads[0].version.n == 9, "commit 9")
    assert island.summary is not None and island.summary.exchanges_committed == 9
    model, optimizer = make(seed=5)
    rest = atoll.Island(model, optimizer, dataset=images(NUM_IMAGES), run_dir=tmp_path / "run", resume=True)
    assert train(rest) == NUM_STEPS - 45
    assert rest.summary is not None and rest.summary.tokens_committed == 8 * NUM_STEPS and rest.summary.tokens_lost == 0
    assert ledger_command(tmp_path / "run", as_json=True) == 0
    assert "revoke" in (tmp_path / "run" / "journal.jsonl").read_text()


def wait_until(true: Callable[[], bool], what: str) -> None:
    for _ in range(1000):
        if true():
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"{what} did not come")


def test_the_first_interrupt_stops_after_the_step_and_the_second_is_an_ordinary_one(tmp_path: Path) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        pytest.skip("something else handles SIGINT here")
    island, (model, optimizer), steps = script(tmp_path), make(), 0
    model, optimizer = island._model, island._optimizer
    with island:
        for batch in island.batches():
            if steps == 3:
                os.kill(os.getpid(), signal.SIGINT)
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            island.step(loss)
            steps += 1
    assert 4 <= steps < NUM_STEPS
    assert island.summary is not None and island.summary.exit_reason == "stopped" and island.summary.tokens_lost == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    island = script(tmp_path / "second")
    with pytest.raises(KeyboardInterrupt), island:
        for _ in island.batches():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    assert island.summary is not None and island.summary.exit_reason == "stopped"


def test_an_error_in_the_loop_fails_the_run_and_comes_through(tmp_path: Path) -> None:
    island = script(tmp_path)
    with pytest.raises(ZeroDivisionError), island:
        for _ in island.batches():
            _ = 1 / 0
    assert island.summary is not None and island.summary.exit_reason == "failed"
    assert island.summary.error == "island-0: ZeroDivisionError: division by zero"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["error"] == island.summary.error
    assert ledger_command(tmp_path / "run", as_json=True) == 0


def test_a_controller_that_fails_ends_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    island = script(tmp_path)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    with pytest.raises(atoll.RunFailed, match="controller failed: no journal any more"), island:
        assert island._run is not None

        def broken() -> None:
            raise RuntimeError("no journal any more")

        for number, batch in enumerate(island.batches()):
            if number == 2:
                island._run._jobs.put(broken)
                island._run._thread.join(10)
            loss = loss_of(island._model, batch)
            loss.backward()
            island._optimizer.step()
            island.step(loss)
    assert train(script(tmp_path / "next", **{"train.tokens": 80})) == 10


def test_a_run_directory_belongs_to_one_run(tmp_path: Path) -> None:
    with script(tmp_path) as island:
        with pytest.raises(RunDirInUse):
            train(script(tmp_path))
        island.stop()
        assert list(island.batches()) == []
    assert island.summary is not None and island.summary.exit_reason == "stopped"


def test_presets_and_islands_of_a_script(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make()
    data = {"dataset": images(NUM_IMAGES), "run_dir": tmp_path / "run"}
    with atoll.Island(model, optimizer, "demo", **data) as island:
        island.stop()
    assert "a script trains one island, the configuration has run.islands = 3" in caplog.text
    config = atoll.load_config(tmp_path / "run")
    assert (config.run.islands, config.data.samples, config.data.corpus) == (1, NUM_IMAGES, None)
    assert config.strategy == atoll.load_config("demo").strategy


def test_logs_go_to_the_run_directory_and_elsewhere_as_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers()]
    train(script(tmp_path, **{"train.tokens": 80}))
    assert [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers()] == before
    assert "joined" in (tmp_path / "run" / "logs" / "controller.log").read_text()
    assert "joined" not in caplog.text


def loggers() -> list[logging.Logger]:
    return [logging.getLogger("atoll.controller"), logging.getLogger("atoll.island")]
