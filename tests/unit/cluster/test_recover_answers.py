"""What `atoll up --recover-from-members` is told by the process that asks the run's controller."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import RayTaskError

from orchestrator import lost_journal
from orchestrator.errors import UserError
from orchestrator.segments import JournalError


def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], controller: object, answer: object) -> str:
    """The line that it prints where the controller's answer is this, or raised there."""

    def get(*_: object, **__: object) -> object:
        if isinstance(answer, Exception):
            raise RayTaskError("recover", "", answer).as_instanceof_cause()
        return answer

    monkeypatch.setattr(sys, "argv", ["lost_journal", "run", "--address", "h:1", "--node-ip", "h"])
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "get_actor", lambda *_, **__: controller)
    monkeypatch.setattr(ray, "get", get)
    assert lost_journal.main() == (0 if isinstance(answer, int) else 1)
    return str(json.loads(capsys.readouterr().out))


ISLANDS = SimpleNamespace(recover=SimpleNamespace(remote=lambda force: None))


def test_what_the_controller_refuses_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its errors are mistakes in values, as that of a name which nobody has: one was taken for the other."""
    assert ask(monkeypatch, capsys, ISLANDS, 17) == "{'rows': 17}"
    refused: list[tuple[Exception, str]] = [
        (JournalError("only 1 of 3 members answered"), "only 1 of 3 members answered"),
        (UserError("its journal is there", remedy="nothing"), "its journal is there"),
    ]
    for error, told in refused:
        assert told in ask(monkeypatch, capsys, ISLANDS, error)
    assert "it is a pipeline" in ask(monkeypatch, capsys, SimpleNamespace(), None)
