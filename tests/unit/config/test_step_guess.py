"""What the first line reckons with where no earlier run has timed its steps: a few steps, and who shares the cores."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
import torch

from orchestrator.calibration import StepTime
from orchestrator.config import RunConfig
from orchestrator.step_guess import StepGuess, crowding, time_here
from tests.small_run import make_pack, small_config
from workers import step_timing
from workers.model.errors import ModelError
from workers.step_timing import time_step


@pytest.fixture(autouse=True)
def threads_stay() -> None:
    """A step is timed with as many as the others of this process use."""
    assert torch.get_num_threads() == 1


def tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock takes a second: a pass takes one, and so does the optimizer."""
    clock = count()
    monkeypatch.setattr(step_timing, "perf_counter", lambda: float(next(clock)))


def timed(config: RunConfig, seq_len: int = 16) -> float | None:
    return time_step(config.model, config.train, vocab_size=64, seq_len=seq_len)


def test_the_pass_grows_with_the_batch_and_the_optimizer_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    tick(monkeypatch)
    config = small_config(Path("pack"), "train.batch_size=32")
    assert timed(config) == 2.0, "the whole batch is small enough"
    monkeypatch.setattr(step_timing, "MOST_FLOPS", 4.5 * 16 * flops_of(config))
    assert timed(config) == 32 / 4 + 1, "four samples are"


def flops_of(config: RunConfig) -> float:
    from workers.model.flops import flops_per_token
    from workers.model.shape import resolve_shape

    return flops_per_token(resolve_shape(config.model, vocab_size=64, seq_len=16))


def test_a_large_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_timing, "build_model", None)  # nor built
    assert timed(small_config(Path("pack"), "model.dim=1024", "model.layers=24")) is None
    monkeypatch.setattr(step_timing, "MOST_VALUES", 1000)
    assert timed(small_config(Path("pack"))) is None


def test_threads_share_the_processors() -> None:
    assert crowding(3, 1, 2) == 1.5 and crowding(2, 4, 4) == 2.0 and crowding(1, 2, 8) == 1.0


def test_a_run_on_this_machine_is_timed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tick(monkeypatch)
    monkeypatch.setattr("orchestrator.step_guess.num_cores", lambda: 2)
    pack = make_pack(tmp_path)
    config = small_config(pack, "run.islands=3")
    assert time_here(config, pack) == StepTime(seconds=3.0, run=None)
    guess = StepGuess(config, pack, tmp_path / "runs")
    guess.start()
    assert guess.result(wait_s=30) == StepTime(seconds=3.0, run=None)


@pytest.mark.parametrize(
    "value",
    [
        "run.address=127.0.0.1:1",
        "model.factory=tests.list_model:build",
        "train.pace_s=0.1",
        "train.fit_batch=true",
        "train.per_island.island-0.batch_size=2",
    ],
)
def test_where_a_step_here_says_nothing_of_the_islands_none_is_made(value: str, tmp_path: Path) -> None:
    pack = make_pack(tmp_path)
    assert time_here(small_config(pack, value), pack) is None
    assert time_here(small_config(pack), None) is None, "the data comes from a loop of one's own"


def test_what_does_not_fit_is_for_the_island_to_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ModelError("this processor has no bf16 instructions")

    monkeypatch.setattr(step_timing, "InnerLoop", refuse)
    pack = make_pack(tmp_path)
    assert time_here(small_config(pack), pack) is None
