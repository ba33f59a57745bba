"""Models that diverge: the run says so, and does not end as if it had trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.finish import build_summary
from orchestrator.local import LocalRun
from orchestrator.summary import Summary
from tests.small_run import make_pack, small_config

MODEL = """
import torch

def build(options):
    model = torch.nn.Sequential(torch.nn.Embedding(257, 8), torch.nn.Linear(8, 257))
    seen = [0]

    def loss_fn(model, batch):
        seen[0] += 1
        logits = model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        sick = torch.is_grad_enabled() and options["from"] < seen[0] <= options["to"]
        return loss * float("nan") if sick else loss

    return model, loss_fn
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "sick_model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "model.factory=sick_model:build"


def run(tmp_path: Path, *values: str) -> Summary:
    local = LocalRun(small_config(make_pack(tmp_path), *values), tmp_path / "run")
    local.start()
    assert local.run(max_turns=5000) is not None
    summary = build_summary(local.host, local.config)
    local.close()
    return summary


def test_a_run_that_only_diverges_fails_and_says_why(factory: str, tmp_path: Path) -> None:
    summary = run(tmp_path, factory, "model.options.from=0", "model.options.to=1000000", "train.tokens=5120")
    assert summary.exit_reason == "failed" and summary.tokens_committed == 0
    assert summary.error is not None
    assert summary.error.startswith("island-0 is given up after 3 refused updates in a row: its update is not finite")
    assert [fault.kind for fault in summary.faults] == ["refused"] * 3


def test_a_model_that_recovers_loses_no_sample(factory: str, tmp_path: Path) -> None:
    """A round that is not finite: its samples are issued again, and all of them are committed in the end."""
    summary = run(tmp_path, factory, "model.options.from=42", "model.options.to=44", "train.tokens=5120")
    assert (summary.exit_reason, summary.tokens_committed) == ("done", 5120)
    assert summary.tokens_lost == 8 * 4 * 16, "one round of 8 steps"
    assert summary.tokens_reissued >= summary.tokens_lost
    assert {fault.kind for fault in summary.faults} == {"refused"}
