"""Each mistake in a loop of one's own has an error that says what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import atoll
from orchestrator.config import make_config
from orchestrator.inline import InlineRun
from orchestrator.rundir import RunDir
from tests.own_loops import CONFIG, NUM_IMAGES, ConvNet, images, loss_of, make
from tests.small_run import make_pack
from workers.context import enter

SMALL = {**CONFIG, "train.tokens": 4000, "strategy.inner_steps": 1000}


def island(folder: Path, model: nn.Module, optimizer: Any, **arguments: Any) -> atoll.Island:
    data = {"config": SMALL, "dataset": images(NUM_IMAGES), **arguments}
    return atoll.Island(model, optimizer, run_dir=folder / "run", **data)


def test_a_step_that_is_missing_and_one_too_many(tmp_path: Path) -> None:
    model, optimizer = make()
    with pytest.raises(atoll.LoopError, match=r"must be called once for each batch.*it was not called"):
        with island(tmp_path, model, optimizer) as one:
            for _ in one.batches():
                pass
    with pytest.raises(atoll.LoopError, match="called without a new batch"):
        with island(tmp_path / "2", model, optimizer) as one:
            for batch in one.batches():
                loss = loss_of(model, batch)
                one.step(loss)
                one.step(loss)
    with pytest.raises(atoll.LoopError, match=r"works inside `with atoll\.Island"):
        next(iter(island(tmp_path / "3", model, optimizer).batches()))


def test_an_optimizer_that_never_steps(tmp_path: Path) -> None:
    model, optimizer = make()
    with pytest.raises(atoll.LoopError, match=r"no parameter has changed in 32 steps: call optimizer\.step\(\)"):
        with island(tmp_path, model, optimizer) as one:
            for batch in one.batches():
                one.step(loss_of(model, batch))


def test_gradient_accumulation_over_batches_is_no_mistake(tmp_path: Path) -> None:
    model, optimizer = make()
    config = {**SMALL, "train.tokens": 480}
    with island(tmp_path, model, optimizer, config=config) as one:
        for number, batch in enumerate(one.batches()):
            loss = loss_of(model, batch)
            loss.backward()
            if number % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
            one.step(loss)
    assert one.summary is not None and one.summary.exit_reason == "done"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.half(), r"must be float32.*conv\.weight \(torch\.float16\).*and 2 more.*torch\.autocast"),
        (lambda model: model.requires_grad_(False), "ConvNet has no trainable parameter"),
        (lambda model: model.to("meta"), "on the device 'meta'"),
        (lambda model: model.head.to("meta"), r"on one device, and this one is on 2: conv\.weight on cpu"),
    ],
)
def test_a_model_that_cannot_be_synchronised(tmp_path: Path, spoil: Any, message: str) -> None:
    model = ConvNet()
    spoil(model)
    with pytest.raises(atoll.LoopError, match=message):
        island(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.1)).__enter__()
    assert not (tmp_path / "run").exists()


def test_a_model_on_another_device_than_the_setting(tmp_path: Path) -> None:
    model, optimizer = make()
    with pytest.raises(atoll.LoopError, match=r"train\.device = 'cuda:1', but the model is on cpu.*atoll\.device"):
        island(tmp_path, model, optimizer, config={**SMALL, "train.device": "cuda:1"}).__enter__()


def test_an_optimizer_of_another_model(tmp_path: Path) -> None:
    _, optimizer = make()
    with pytest.raises(atoll.LoopError, match="6 of the 6 parameters in the optimizer do not belong to the model"):
        island(tmp_path, ConvNet(), optimizer).__enter__()


def test_parameters_that_are_left_out_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ConvNet()
    with island(tmp_path, model, torch.optim.SGD(model.head.parameters(), lr=0.1)) as one:
        one.stop()
    assert "not in the optimizer, so they stay as they are: conv.weight, conv.bias, norm.weight" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.head, "weight", nn.Parameter(model.head.weight.detach().clone())),
        lambda model: setattr(model.head.weight, "data", model.head.weight.data.clone()),
        lambda model: model.head.weight.requires_grad_(False),
    ],
)
def test_parameters_that_change_under_the_island(tmp_path: Path, change: Any) -> None:
    model, optimizer = make()
    with pytest.raises(atoll.LoopError, match=r"parameter 'head\.weight' is not the tensor any more"):
        with island(tmp_path, model, optimizer) as one:
            for batch in one.batches():
                change(model)
                one.step(loss_of(model, batch))


def test_weights_may_be_loaded_in_place(tmp_path: Path) -> None:
    model, optimizer = make()
    with island(tmp_path, model, optimizer) as one:
        for batch in one.batches():
            model.load_state_dict(ConvNet(seed=9).state_dict())
            one.step(loss_of(model, batch))
            break


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (iter([1, 2]), "dataset is a .*iterator.*IterableDataset or a DataLoader"),
        ([], "dataset is empty"),
        ((np.zeros(3), np.zeros(4)), r"different numbers of samples: \[0\] has 3, \[1\] has 4"),
    ],
)
def test_a_dataset_that_has_no_numbered_samples(tmp_path: Path, dataset: Any, message: str) -> None:
    model, optimizer = make()
    with pytest.raises(atoll.LoopError, match=message):
        island(tmp_path, model, optimizer, dataset=dataset).__enter__()


def test_data_that_does_not_fit_the_configuration(tmp_path: Path) -> None:
    model, optimizer = make()
    with pytest.raises(atoll.LoopError, match=r"the dataset has 300 samples and data\.samples = 60"):
        island(tmp_path, model, optimizer, config={**SMALL, "data.samples": 60}).__enter__()
    with pytest.raises(atoll.UserError, match=r"data\.path = '.*' and data\.samples = 300 are both set"):
        island(tmp_path, model, optimizer, config={**SMALL, "data.path": make_pack(tmp_path)}).__enter__()
    with pytest.raises(atoll.UserError, match="needs a configuration outside of a run"):
        atoll.Island(model, optimizer).__enter__()
    with pytest.raises(atoll.LoopError, match=r"island\.batches\(\) needs something to read.*island\.samples"):
        with island(tmp_path, model, optimizer, config={**SMALL, "data.samples": 60}, dataset=None) as one:
            next(iter(one.batches()))
    with pytest.raises(atoll.LoopError, match="val_dataset is evaluated with loss_fn"):
        island(tmp_path / "2", model, optimizer, val_dataset=images(8)).__enter__()


def test_another_configuration_inside_a_run(tmp_path: Path) -> None:
    config = make_config({**SMALL, "data.samples": NUM_IMAGES, "run.islands": 1})
    folder = tmp_path / "run"
    folder.mkdir()
    run = InlineRun(config, RunDir(folder), pack=None)
    run.start()
    model, optimizer = make()
    data = {"dataset": images(NUM_IMAGES)}
    with enter(run.context()):
        other = make_config({"train.tokens": 77, "exchange.wait_s": 3.0}, base=config)
        message = r"train\.tokens = 77 here and 4000 in the run; exchange\.wait_s = 3\.0 here and 10\.0 in the run"
        with pytest.raises(atoll.LoopError, match=f"this is island-0 of the run run, .*: {message}"):
            atoll.Island(model, optimizer, other, **data).__enter__()
        with pytest.raises(atoll.LoopError, match="run_dir and resume are for a script"):
            atoll.Island(model, optimizer, run_dir=tmp_path, **data).__enter__()
        with pytest.raises(atoll.LoopError, match=r"set data\.samples|the dataset has 8 samples"):
            atoll.Island(model, optimizer, dataset=images(8)).__enter__()
        with atoll.Island(model, optimizer, config, **data) as one:
            with pytest.raises(atoll.LoopError, match="a run's process makes one island"):
                atoll.Island(model, optimizer, **data).__enter__()
            with pytest.raises(atoll.LoopError, match=r"island\.stop\(\) is for a script"):
                one.stop()
    run.stop(save=False)
    assert run.finish().exit_reason == "stopped"
