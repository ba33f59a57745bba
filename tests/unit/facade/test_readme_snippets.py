"""The README's "your own model" and "your own loop" do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import atoll
from orchestrator.local import LocalRun
from tests.own_loops import CONFIG, NUM_IMAGES, images, loss_of, make
from tests.readme import blocks
from tests.small_run import SEQ_LEN, make_pack, small_config


@pytest.fixture
def my_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The README's file, where Python finds it."""
    (code,) = blocks("Your own model", "python")
    name = code.splitlines()[0].removeprefix("# ")
    assert name == "my_model.py" and len(code.strip().splitlines()) <= 5
    (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / name


def test_your_own_model(my_model: Path, tmp_path: Path) -> None:
    values = ["model.factory=my_model:build", "model.options.width=8", "codec.name=fp32", "train.tokens=2560"]
    run = LocalRun(small_config(make_pack(tmp_path), *values), tmp_path / "run")
    run.start()
    finished = run.run(max_turns=1000)
    run.close()
    assert finished is not None and finished.reason == "done"
    losses = [evaluation.val_loss for evaluation in run.host.coordinator.state.evaluations]
    assert losses[0] == pytest.approx(5.6, abs=0.3) and losses[-1] < losses[0]


def test_your_own_loop(tmp_path: Path) -> None:
    code = blocks("Your own loop", "python")[0]
    assert len(code.strip().splitlines()) <= 5
    model = nn.Sequential(nn.Embedding(257, 8), nn.Linear(8, 257))

    def my_loss(model: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    names = {
        "atoll": atoll,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "config": {**CONFIG, "train.tokens": 40 * SEQ_LEN, "data.path": make_pack(tmp_path)},
        "my_loss": my_loss,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(code, names)
    island = names["island"]
    assert isinstance(island, atoll.Island) and island.summary is not None
    assert island.summary.exit_reason == "done"
    assert (tmp_path / "runs" / "latest" / "summary.json").exists()


def test_your_own_loop_on_images(tmp_path: Path) -> None:
    code = blocks("Your own loop", "python")[0].replace(", config)", ", config, dataset=(pixels, labels))")
    model, optimizer = make()
    pixels, labels = images(NUM_IMAGES)
    names = {"atoll": atoll, "model": model, "optimizer": optimizer, "my_loss": loss_of}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(code, {**names, "pixels": pixels, "labels": labels, "config": {**CONFIG, "train.tokens": 80}})
    assert atoll.load_anchor(tmp_path / "runs" / "latest").keys() == dict(model.named_parameters()).keys()
